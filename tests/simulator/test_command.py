"""`cachedattention simulate`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulator.names import Format
from tests.cli.running import cli
from tests.simulator.test_traces import RECORDS, write


def simulate(path: Path, format: str, *more: str, policy: str = "anticipating", dram: str = "4096") -> tuple[int, str]:
    arguments = ("--trace", str(path), "--format", format, "--policy", policy, "--dram-tokens", dram, *more)
    done = cli("simulate", *arguments)
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("format", ["agentic", "mooncake", "text"])
def test_each_format(tmp_path: Path, format: Format) -> None:
    """A table for people and JSON for programs; the limit beside it."""
    path = write(tmp_path / "trace.jsonl.gz", RECORDS[format])
    code, said = simulate(path, format, "--ssd-tokens", "8192", "--seed", "3", "--json", str(tmp_path / "out.json"))
    assert code == 0, said
    assert "hit tokens" in said
    assert "belady" in said
    figures: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    names = ["prompt_tokens", "hit_tokens", "hit_tokens_dram", "hit_tokens_ssd", "late_tokens", "bytes_written"]
    assert all(isinstance(figures[name], int) for name in [*names, "requests"])
    assert figures["wall_s"] > 0
    assert figures["hit_tokens"] == figures["hit_tokens_dram"] + figures["hit_tokens_ssd"]
    assert 0 < figures["hit_tokens"] <= figures["belady"]["hit_tokens"]
    assert figures["belady"]["prompt_tokens"] == figures["prompt_tokens"]


def test_drawn_sessions_without_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", RECORDS["text"])
    out = tmp_path / "out.json"
    code, said = simulate(path, "text", "--sessions", "30", "--arrival-rate", "5", "--no-belady", "--json", str(out))
    assert code == 0, said
    figures = json.loads(out.read_text())
    assert (figures["requests"], figures["belady"]) == (60, None)


@pytest.mark.parametrize(
    ("format", "options", "complaint"),
    [
        ("text", (), "no trace of format text"),
        ("mooncake", ("--arrival-rate", "1"), "arrivals of its own"),
        ("mooncake", ("--policy", "nonsense"), "anticipating"),
        ("mooncake", ("--policy", "arc", "--ssd-tokens", "9999"), "one tier"),
        ("mooncake", ("--dram-tokens", "5"), "no chunk of 512"),
        ("mooncake", ("--dram-tokens", "-5"), "--dram-tokens"),
        ("mooncake", ("--prefill-rate", "nan"), "--prefill-rate"),
        ("mooncake", ("--json", "/nowhere/out.json"), "/nowhere"),
        ("mooncake", ("--trace", "/nowhere/trace"), "/nowhere"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, format: str, options: tuple[str, ...], complaint: str) -> None:
    path = write(tmp_path / "trace.jsonl", RECORDS["mooncake"])
    code, said = simulate(path, format, *options)
    assert code == 2
    assert complaint in said
    assert "Traceback" not in said
