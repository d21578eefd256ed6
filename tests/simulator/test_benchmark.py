"""`python -m benchmarks.placement` on traces of a few lines: every kind of replay, and every table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.placement import AT_ONCE, FILES, SECTIONS, Cell, Told, run, tables
from benchmarks.simulator.names import Format
from tests.simulator.test_traces import RECORDS, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for format, name in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, RECORDS[format] * 3)
    return tmp_path


def small(cell: Cell) -> Cell:
    """The same replay of a few turns in a store of a few chunks."""
    sessions = None if cell.sessions is None else 10
    ssd = 20_000 if cell.ssd_tokens else 0
    return replace(cell, dram_tokens=4096, ssd_tokens=ssd, sessions=sessions, warm_up=0, count=None)


def test_sections(data: Path) -> None:
    """Their cells differ, and each section makes a table of whatever comes out."""
    cells = [cell for section in SECTIONS.values() for cell in section()]
    assert len(set(cells)) == len(cells)
    for name, section in SECTIONS.items():
        of = [small(cell) for cell in section()]
        said = tables([run(data, cell) for cell in dict.fromkeys(of)])
        assert said.startswith(f"### {name}\n\n| ")
        assert "anticipating" in said or name == "bounds"


@pytest.mark.parametrize("format", ["agentic", "mooncake"])
@pytest.mark.parametrize("told", ["", "tables", "ends", "gaps"])
def test_what_is_told_changes_no_trace(data: Path, format: Format, told: Told) -> None:
    """More knowledge changes what hits, never what is asked."""
    cell = Cell("bounds", format, "anticipating", 4096, machine=AT_ONCE, told=told)
    told_row, row = run(data, cell), run(data, replace(cell, told=""))
    assert (told_row["requests"], told_row["prompt_tokens"]) == (row["requests"], row["prompt_tokens"])
    assert 0 < told_row["hit_tokens"] <= told_row["prompt_tokens"]
