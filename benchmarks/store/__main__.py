"""The store's speed as ratios to what this machine can do, and beside LMCache.

    python -m benchmarks.store [--only dram,ssd,acquire,index,peer] [--json FILE] [--plots DIR]

Compared things alternate within one run; figures are medians, ratios are of medians.
"""

from __future__ import annotations

import functools
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.store import acquire, dram, index, peer, ssd
from benchmarks.store.figures import Section, facts, plot, table
from benchmarks.turns import _cpu

Measure = Callable[[Path, bool, Callable[[], None]], Section]
SECTIONS: dict[str, Measure] = {
    "dram": dram.measure,
    "ssd": ssd.measure,
    "acquire": acquire.measure,
    "index": index.measure,
    "peer": peer.measure,
}


def main(
    only: Annotated[str, typer.Option(help="Sections to run, by comma.", metavar="LIST")] = ",".join(SECTIONS),
    disk: Annotated[Path | None, typer.Option(help="A directory on the disk to measure; default: temporary.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: proves that it runs; its figures mean nothing.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw pictures into this directory (needs matplotlib).")] = None,
) -> None:
    """Measure the store against the machine it runs on."""
    chosen = only.split(",")
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; choose from {', '.join(SECTIONS)}", param_hint="--only")
    console = Console()
    directory = disk or Path(tempfile.gettempdir())
    found: list[Section] = []
    for name in chosen:
        columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(name, total=None)
            section = SECTIONS[name](directory, quick, functools.partial(progress.advance, task))
        found.append(section)
        console.print(table(section))
        console.print(facts(section))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": " ".join(["python -m benchmarks.store", *sys.argv[1:]]),
            "machine": {"cpu": _cpu(), "python": platform.python_version(), "kernel": platform.release()},
            "quick": quick,
            "sections": {section.name: section.to_json() for section in found},
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")
    if plots is not None:
        for section in found:
            for path in plot(section, plots):
                console.print(f"drawn: {path}")


if __name__ == "__main__":
    typer.run(main)
