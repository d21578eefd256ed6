"""Pages of docs/ that tell what the program says, checked against the program."""

from __future__ import annotations

import re

import pytest

from cli import reference
from cli.settings import Settings
from tests.cli.test_provisioning import ROOT

PACKAGES = ("protocol", "monitoring", "gateway", "inference", "kvdaemon", "cli")


@pytest.fixture(scope="module")
def source() -> str:
    """All code, with the parts of implicitly joined strings put together."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_messages_in_troubleshooting_are_what_the_program_says(source: str) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [
        message
        for section in page.split("\n## ")
        if section.startswith("Messages")
        for message in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    ]
    assert len(messages) > 25
    for message in messages:
        for words in message.replace("Address already in use", "…").split("…"):  # that one is the system's
            assert words.strip(" ?") in source, message


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_reference_of_settings_is_current() -> None:
    """docs/configuration.md is what `python -m cli.reference` writes, and has every setting."""
    assert reference.PAGE.read_text(encoding="utf-8") == reference.text()
    for name in Settings.model_fields:
        assert f"| `--{name.replace('_', '-')}` |" in reference.text()


def test_every_setting_is_an_option_of_a_service() -> None:
    """What `up` hands to the services can be given to each that is started alone."""
    rows = [line for line in reference.text().splitlines() if line.startswith("| `--")]
    assert len(rows) == len(Settings.model_fields)
    for row in rows:
        assert re.search(r" \| (all|gateway|inference|kvdaemon)(, \w+)? \| ", row), row
