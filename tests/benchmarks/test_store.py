"""The store's benchmark in its quick form: it runs, and what it writes can be read. No figure is judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.store import lmcache_environment
from benchmarks.store.figures import Figure, Section, Series, alternate, plot

EXPECTED = {
    "dram": ["load, bytes only", "load, keys rotated", "save", "verified as by default", "verified always"],
    "ssd": ["SSD to arena, cold", "write-behind", "read from the device for each byte"],
    "acquire": ["acquire p50", "acquire p99"],
    "index": ["index, chunks on SSD", "start-up", "evicting one chunk from DRAM", "prefetching 4 chunks"],
}


def run_quick(section: str, directory: Path) -> dict[str, Any]:
    """The section of the JSON that `--quick` writes."""
    path = directory / "found.json"
    command = [sys.executable, "-m", "benchmarks.store", "--quick", "--only", section, "--json", str(path)]
    done = subprocess.run([*command, "--disk", str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    assert record["quick"] is True
    assert list(record["sections"]) == [section]
    return dict(record["sections"][section])


def check_figures(figures: list[dict[str, Any]]) -> None:
    assert figures
    for figure in figures:
        assert math.isfinite(figure["value"]), figure
        assert figure["value"] > 0, figure
        if figure["against"] is not None:
            assert math.isfinite(figure["ratio"]), figure
            assert figure["ratio"] == pytest.approx(figure["value"] / figure["against"])
        held = figure["ratio"] if figure["ratio"] is not None else figure["value"]
        if figure["at_least"] is not None:
            assert figure["met"] is (held >= figure["at_least"])
        elif figure["at_most"] is not None:
            assert figure["met"] is (held <= figure["at_most"])
        else:
            assert figure["met"] is None


@pytest.mark.parametrize("section", EXPECTED)
def test_quick(section: str, tmp_path: Path) -> None:
    """Each section measures the real parts to their end and writes every figure that it promises, all finite."""
    found = run_quick(section, tmp_path)
    check_figures(found["figures"])
    for expected in EXPECTED[section]:
        assert any(expected in figure["name"] for figure in found["figures"]), expected


def test_beside_lmcache(tmp_path: Path) -> None:
    """Without LMCache the section says how to get it; with it, ours delivers no wrong byte and survives kill -9."""
    found = run_quick("peer", tmp_path)
    if lmcache_environment.problem():
        assert "LMCache" in found["facts"]
        assert found["figures"] == []
        return
    check_figures(found["figures"])
    assert {"put into RAM", "get from RAM", "get from cold disk"} <= {figure["name"] for figure in found["figures"]}
    assert found["facts"]["kill -9, ours"].startswith("4 right, 0 wrong, 0 missing")
    assert " 0 wrong" in found["facts"]["bit flips on disk, ours"]


def test_unknown_section_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.store", "--only", "dram,tape"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "tape" in done.stderr


def test_contenders_alternate() -> None:
    """Every contender runs once a round, each round begins with the next one, and numbers move on."""
    calls: list[tuple[str, int]] = []

    def contender(name: str) -> Any:
        def run(i: int) -> float:
            calls.append((name, i))
            return float(i)

        return run

    found = alternate(2, {"a": contender("a"), "b": contender("b")}, lambda: None)
    assert calls == [("a", 0), ("b", 1), ("b", 2), ("a", 3)]
    assert found == {"a": [0.0, 3.0], "b": [1.0, 2.0]}


def test_plots(tmp_path: Path) -> None:
    """One picture of the ratios and one for each set of lines."""
    section = Section(
        "made",
        "Made up",
        [Figure("fast", 2.0, "GB/s", 1.0, "slow", at_least=0.8), Figure("alone", 3.0, "s", at_most=1.0)],
        [Series("Growth", "chunks", "us", {"a": [(1.0, 2.0), (10.0, 2.5)]})],
    )
    assert [path.name for path in plot(section, tmp_path)] == ["store-made.png", "store-made-0.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
