"""The three services under load, beside a real Prometheus and a receiver of traces: what an operator gets to see."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.cli.running import Up, eventually, running_up
from tests.cli.test_provisioning import DASHBOARDS
from tests.monitoring.otlp import Receiver, Span, running_receiver
from tests.monitoring.prometheus import Prometheus, promtool, running_prometheus
from tests.monitoring.test_rules import ALERTS, RECORDED, RULES

SCRAPED_EVERY = "1s"
TRACE = "0af7651916cd43dd8448eb211c80319c"  # of a caller that traces, too
CALLER = "b7ad6b7169203331"

# DESIGN.md section 9: what there is at least, and where.
SECTION_9 = {
    "gateway": (
        *("ttft_seconds", "prefill_seconds", "tpot_seconds", "queue_wait_seconds", "queue_depth", "running_jobs"),
        *("prompt_tokens_total", "missed_tokens_total", "conversations"),
    ),
    "inference": (
        *("prefill_seconds_saved_total", "load_seconds", "save_seconds", "overlap_ratio"),
        "context_truncations_total",
    ),
    "kvdaemon": (
        *("chunks", "bytes", "capacity_bytes", "evictions_total", "prefetch_total", "written_bytes_total"),
        *("corrupt_total", "lease_revoked_total", "rpc_seconds"),
    ),
}
# Panels whose graphs are of things that a short, untroubled run may be without: there, no number is an answer.
MAY_HAVE_NO_NUMBER = {"Read by the scrub"}


@dataclass
class Live:
    up: Up
    metrics: dict[str, str]  # job: URL
    prometheus: Prometheus
    receiver: Receiver
    usage: dict[str, Any]  # of the traced turn

    @property
    def turn_lines(self) -> list[dict[str, Any]]:
        """The gateway's log lines of turns."""
        lines = (json.loads(line) for line in self.up.said().splitlines() if line.startswith("{"))
        return [line for line in lines if line["event"] == "turn" and line["service"] == "gateway"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch, running_receiver() as receiver:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        # Nothing is retained on the device, so that histories are loaded, and DRAM holds not all of them.
        options = ("--log-format", "json", "--otlp-endpoint", receiver.url, "--retain", "0", "--dram", "6MiB")
        with running_up(directory / "data", *options) as up:
            metrics = {job: url for url, job in re.findall(r"^metrics +(\S+) +\((\w+)\)$", up.said(), re.MULTILINE)}
            targets = {job: httpx.URL(url).netloc.decode() for job, url in metrics.items()}
            with running_prometheus(directory / "prometheus", targets, SCRAPED_EVERY) as prometheus:
                eventually(lambda: prometheus.scrapes(targets), "Prometheus scrapes all three services")
                usage = put_load_on(up.url)
                turns = "sum(cachedattention_turns_total) == on () (sum(cachedattention_ttft_seconds_count) + 1)"
                eventually(lambda: prometheus.query(turns), "the load's end is scraped")
                for name in RECORDED:
                    eventually(lambda name=name: prometheus.query(name), f"{name} is recorded")
                yield Live(up, metrics, prometheus, receiver, usage)
                assert up.interrupt() == 0  # with traces on, too, everything ends in order


def put_load_on(url: str) -> dict[str, Any]:
    """Conversations side by side, longer than DRAM, a request that fails, and at last a follow-up that is traced.

    Returns the usage of that one.
    """
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client, ThreadPoolExecutor(6) as pool:

        def ask(messages: list[dict[str, str]], **headers: str) -> dict[str, Any]:
            body = {"model": "embedded", "messages": messages, "max_tokens": 12, "temperature": 0}
            response = client.post("/v1/chat/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text
            return dict(response.json())

        def talk(number: int) -> list[dict[str, str]]:
            messages: list[dict[str, str]] = []
            for turn in range(3):
                facts = " ".join(f"Fact {turn} {number} {n}: my friend {n} lives in Rome." for n in range(8))
                messages.append({"role": "user", "content": facts})
                messages.append(ask(messages)["choices"][0]["message"])
            return messages

        conversations = list(pool.map(talk, range(12)))
        too_long = {"model": "embedded", "messages": [{"role": "user", "content": "word " * 4000}]}
        too_long["truncation"] = "disabled"
        assert client.post("/v1/chat/completions", json=too_long).status_code == 400
        follow_up = [*conversations[-1], {"role": "user", "content": "Where does my friend 3 live?"}]
        return dict(ask(follow_up, traceparent=f"00-{TRACE}-{CALLER}-01")["usage"])


def test_what_the_processes_expose_is_as_prometheus_wants_it(live: Live) -> None:
    """Names, units and help of every metric, by promtool; and those that DESIGN.md lists are there."""
    for job, url in live.metrics.items():
        text = httpx.get(url, timeout=10, trust_env=False).content
        checked = promtool("check", "metrics", stdin=text)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, b""), job
        for name in SECTION_9[job]:
            assert re.search(rf"^cachedattention_{name}(_bucket)?[ {{]".encode(), text, re.MULTILINE), (job, name)


def panels() -> list[tuple[str, str, list[str]]]:
    """Dashboard, title and queries of every panel."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            queries = [target["expr"].replace("$__rate_interval", "2m") for target in panel["targets"]]
            found.append((path.stem, panel["title"], queries))
    return found


def test_every_panel_shows_something(live: Live) -> None:
    """Every query of every dashboard parses and has series, and every panel has a number to show."""
    dark = []
    for board, title, queries in panels():
        values = [live.prometheus.query(query) for query in queries]
        if not all(values):
            dark.append((board, title, "a query without series"))
        elif title not in MAY_HAVE_NO_NUMBER and not any(math.isfinite(value) for series in values for value in series):
            dark.append((board, title, "no number"))
    assert not dark


def test_rules_are_evaluated_and_a_well_system_sets_off_no_alert(live: Live) -> None:
    """No rule fails, every metric that an alert watches is there, and none fires."""

    def are_evaluated() -> bool:
        found = [rule for group in live.prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert len(found) == len(RULES)
        return all(rule["health"] == "ok" for rule in found)

    eventually(are_evaluated, "all rules are evaluated")
    for alert in ALERTS:
        for name in re.findall(r"cachedattention[_:][\w:]+", alert["expr"]):
            assert live.prometheus.query(name), (alert["alert"], name)
    assert not live.prometheus.query('ALERTS{alertstate="firing"}')


def test_a_turn_is_one_tree_of_spans_through_all_processes(live: Live) -> None:
    """Under the caller's own span, each part where it belongs and inside its parent's time."""
    eventually(lambda: "save_manifest" in {span.name for span in live.receiver.trace(TRACE)}, "the turn is exported")
    eventually(lambda: "turn" in {span.name for span in live.receiver.trace(TRACE)}, "its root is exported")
    eventually(lambda: "inference" in {span.name for span in live.receiver.trace(TRACE)}, "inference's is exported")
    spans = live.receiver.trace(TRACE)
    by_id = {span.id: span for span in spans}
    assert len(by_id) == len(spans)

    def path(span: Span) -> tuple[str, ...]:
        parent = by_id.get(span.parent)
        return (*(path(parent) if parent else ()), f"{span.service}: {span.name}")

    turn = ("gateway: turn",)
    inference = (*turn, "gateway: dispatch", "inference: inference")
    save = (*inference, "inference: save")
    assert {path(span) for span in spans} >= {
        turn,
        (*turn, "gateway: queue"),
        (*turn, "gateway: dispatch"),
        inference,
        *((*inference, f"inference: {name}") for name in ("admission", "load", "prefill", "decode", "save")),
        (*inference, "kvdaemon: acquire"),
        (*save, "kvdaemon: commit"),
        (*save, "kvdaemon: save_manifest"),
    }
    (root,) = (span for span in spans if span.name == "turn")
    assert root.parent == CALLER
    assert all(path(span)[0] == turn[0] for span in spans), "a span without a parent"
    slack_ns = 20_000_000  # clocks are read one after the other
    for span in spans:
        assert span.began_ns <= span.ended_ns
        assert root.began_ns <= span.began_ns + slack_ns
        if span.name not in ("save", "commit", "save_manifest"):
            assert span.ended_ns <= root.ended_ns + slack_ns, span
    assert root.attributes["gen_ai.usage.input_tokens"] == live.usage["prompt_tokens"]
    assert root.attributes["cachedattention.dram_tokens"] == live.usage["cachedattention"]["dram"]


def test_a_turn_is_one_line_of_the_log(live: Live) -> None:
    """With what an operator asks for, the trace among it; a turn that failed has a line, too, with the reason."""
    line = next(line for line in live.turn_lines if line.get("trace") == TRACE)
    parts = live.usage["cachedattention"]
    assert line["status"] == "done"
    assert line["finish_reason"] in ("stop", "length")
    assert {key: line[key] for key in ("hbm", "dram", "ssd", "computed")} == {
        key: parts[key] for key in ("hbm", "dram", "ssd", "computed")
    }
    assert line["missed"] == parts["missed"]
    assert line["prompt_tokens"] == live.usage["prompt_tokens"]
    assert line["completion_tokens"] == live.usage["completion_tokens"]
    assert (line["worker"], line["model"], line["attempts"]) == ("inference", "embedded", 1)
    assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["duration_s"]
    assert line["ttft_s"] == pytest.approx(parts["ttft_s"], abs=1e-3)
    assert re.fullmatch("[0-9a-f]{32}", line["turn"])
    (failed,) = (line for line in live.turn_lines if line["status"] == "failed")
    assert failed["code"] == "context_length_exceeded"
    assert failed["ttft_s"] is None
    assert len(live.turn_lines) == 12 * 3 + 2
