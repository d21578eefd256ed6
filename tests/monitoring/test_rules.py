"""Recording and alert rules, by promtool."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.cli.test_provisioning import exposed_names
from tests.monitoring.prometheus import CONFIG, ROOT, promtool

RULES = [
    rule
    for path in sorted((CONFIG / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
UNIT_TESTS = Path(__file__).with_name("rules_test.yml")


def test_the_configuration_and_its_rules_are_good() -> None:
    for name in ("prometheus.yml", "up.yml"):
        checked = promtool("check", "config", CONFIG / name)
        assert checked.returncode == 0, checked.stderr.decode()
        assert b"15 rules found" in checked.stdout


def test_rules_record_and_set_off_what_they_should() -> None:
    """The cases are in rules_test.yml: each alert by its own trouble alone, and none by a busy system that is well."""
    tested = promtool("test", "rules", UNIT_TESTS)
    assert tested.returncode == 0, tested.stdout.decode() + tested.stderr.decode()


def test_every_rule_has_a_unit_test() -> None:
    text = UNIT_TESTS.read_text(encoding="utf-8")
    for rule in RULES:
        name = rule.get("alert") or rule["record"]
        assert re.search(rf"{re.escape(name)}\b", text), name


def test_rules_ask_for_metrics_that_exist() -> None:
    exposed = exposed_names()
    for rule in RULES:
        assert set(re.findall(r"cachedattention_\w+", rule["expr"])) <= exposed, rule
        assert set(re.findall(r"cachedattention:[\w:]+", rule["expr"])) <= RECORDED, rule


def test_every_alert_says_what_to_do() -> None:
    """A severity that somebody can route by, a sentence, and a section of a page that is there."""
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("page", "ticket"), alert
        assert alert["annotations"]["summary"]
        path, _, anchor = alert["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, (alert["alert"], anchor)
