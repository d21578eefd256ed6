"""Conversations 2 to 10 times as long as the window: what truncation costs, and what others would.

    python -m benchmarks.truncation --model DIR --text FILE [--only text,recall,ttft,hits] [--json FILE] [--plots DIR]

DIR: a byte-level model of books, from `python -m benchmarks.truncation.book_model DIR`. FILE: a book it has not read.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.truncation.book_model import read_text as read_file
from benchmarks.truncation.quality import TIMES, Quality, converse, read_text
from benchmarks.truncation.speed import MODES, Hits, Overflow, measure_hits, measure_ttft
from benchmarks.turns import _cpu
from inference.config import InferenceConfig
from inference.embedded.windows import Encoder
from inference.model import LoadedModel, load_model
from inference.truncation import Window

SECTIONS = ("text", "recall", "ttft", "hits")
_CHUNKS = 8  # in a window


def main(
    model: Annotated[Path, typer.Option(help="A byte-level model of books.")],
    text: Annotated[Path, typer.Option(help="A text that it has not read, gzipped or not.")],
    only: Annotated[str, typer.Option(help="Sections, separated by commas.")] = ",".join(SECTIONS),
    texts: Annotated[int, typer.Option(help="Stretches of the text, ten windows each.")] = 6,
    conversations: Annotated[int, typer.Option(help="Conversations of the embedded model, ten windows each.")] = 4,
    repeats: Annotated[int, typer.Option(help="Truncations timed per method.")] = 3,
    recorded: Annotated[Path, typer.Option(help="Recorded conversations, for hit rates.")] = Path(
        "../shared/data/text/wildchat.jsonl.gz"
    ),
    joined: Annotated[int, typer.Option(help="Conversations of each length, made of those.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures there; other sections stay.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw pictures into this directory (needs matplotlib).")] = None,
) -> None:
    """Measure quality, time and hits of contexts that are truncated, beside the other ways."""
    console = Console()
    with (
        tempfile.TemporaryDirectory() as home,
        Progress(
            TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress,
    ):

        def run(name: str, total: int, work: Callable[[Callable[[], None]], Sequence[Any]]) -> Sequence[Any]:
            if name not in only.split(","):
                return []
            task = progress.add_task(name, total=total)
            return work(lambda: progress.advance(task))

        def of_text(step: Callable[[], None]) -> list[Quality]:
            loaded, window = _load(str(model), Path(home))
            ids = loaded.tokenizer(read_file(text), add_special_tokens=False).input_ids
            return read_text(loaded, window, ids, texts, step)

        def of_facts(step: Callable[[], None]) -> list[Quality]:
            loaded, window = _load("embedded", Path(home))
            return converse(loaded, window, Encoder(loaded.tokenizer.backend_tokenizer), conversations, step)

        found = {
            "text": run("text", 3 * texts, of_text),
            "recall": run("recall", 3 * conversations, of_facts),
            "ttft": run("ttft", len(MODES) * repeats, lambda step: measure_ttft(repeats, 64, step)),
            "hits": run(
                "hits",
                2 * len(TIMES) * joined,
                lambda step: measure_hits(recorded, Path(home) / "small", joined, step),
            ),
        }
    for title in ("text", "recall"):
        if found[title]:
            console.print(_quality_table(title, found[title]))
    if found["ttft"]:
        console.print(_ttft_table(found["ttft"]))
    if found["hits"]:
        console.print(_hits_table(found["hits"]))
    record = _record(found, json_file)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record, indent=1) + "\n")
    if plots is not None:
        _draw(record["sections"], plots)


def _load(model: str, home: Path) -> tuple[LoadedModel, Window]:
    config = InferenceConfig(model, home, "ipc://unused", "ipc://unused", dtype="float32")
    loaded = load_model(config)
    torch.set_num_threads(max(1, torch.get_num_threads()))
    return loaded, Window(loaded.max_context, loaded.max_context // _CHUNKS)


def _quality_table(title: str, found: Sequence[Quality]) -> Table:
    table = Table(title=f"{title}: perplexity behind the first window, by length in windows")
    for column in ("", *(f"{times} windows" for times in TIMES), "tokens", "recalled"):
        table.add_column(column, justify="left" if not column else "right")
    for one in found:
        recall = f"{one.recalled / one.asked:.1%} of {one.asked}" if one.asked else ""
        table.add_row(one.method, *(f"{one.perplexity[t]:.3f}" for t in TIMES), f"{one.tokens:,}", recall)
    return table


def _ttft_table(found: Sequence[Overflow]) -> Table:
    table = Table(title="the turn in which the context overflows")
    for column in ("", "cached", "of prompt", "TTFT median", "min", "max", "against CA"):
        table.add_column(column, justify="left" if not column else "right")
    base = statistics.median(one.ttft_s for one in found if one.method == "CA")
    for name in MODES:
        turns = [one for one in found if one.method == name]
        ttft = [one.ttft_s for one in turns]
        seconds = (statistics.median(ttft), min(ttft), max(ttft))
        table.add_row(
            name,
            *(f"{statistics.median(n):,.0f}" for n in zip(*((t.cached, t.prompt_tokens) for t in turns), strict=True)),
            *(f"{s * 1e3:.0f} ms" for s in seconds),
            f"{seconds[0] / base:.1f}x",
        )
    return table


def _hits_table(found: Sequence[Hits]) -> Table:
    table = Table(title="conversations that outgrow the window")
    for column in ("", "windows", "conversations", "turns", "truncated", "tokens hit", "turns hit"):
        table.add_column(column, justify="left" if not column else "right")
    for one in found:
        counts = (one.windows, one.conversations, one.turns, one.truncated)
        table.add_row(one.method, *map(str, counts), f"{one.rate:.1%}", f"{one.rate_of_turns:.1%}")
    return table


def _record(found: dict[str, Sequence[Any]], json_file: Path | None) -> dict[str, Any]:
    """All figures, by section, with the command that made each; those of sections that did not run stay."""
    known = json.loads(json_file.read_text()) if json_file is not None and json_file.exists() else {"sections": {}}
    command = " ".join(["python -m benchmarks.truncation", *sys.argv[1:]])
    for name, rows in found.items():
        if rows:
            known["sections"][name] = {"command": command, "cpu": _cpu(), "rows": [asdict(row) for row in rows]}
    return known


def _draw(sections: dict[str, Any], directory: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    shown = [(title, sections[title]["rows"]) for title in ("text", "recall") if title in sections]
    if shown:
        picture, all_axes = pyplot.subplots(1, len(shown), figsize=(4.5 * len(shown), 3.2), squeeze=False)
        for axes, (title, rows) in zip(all_axes[0], shown, strict=True):
            for row, marker in zip(rows, "os^", strict=True):
                values = list(row["perplexity"].values())
                axes.plot(TIMES, values, marker=marker, label=row["method"], alpha=0.7)
            axes.set_yscale("log")
            axes.set_xlabel("length, in windows")
            axes.set_ylabel("perplexity")
            axes.set_title(
                {"text": "a book, byte by byte", "recall": "answers of the embedded model"}[title], fontsize=10
            )
            axes.legend(fontsize=8)
        picture.tight_layout()
        picture.savefig(directory / "truncation-quality.svg")
    if "ttft" in sections:
        picture, axes = pyplot.subplots(figsize=(5, 2.2))
        rows = sections["ttft"]["rows"]
        names = list(dict.fromkeys(row["method"] for row in rows))
        medians = [statistics.median(row["ttft_s"] for row in rows if row["method"] == name) for name in names]
        axes.barh(names[::-1], [1e3 * s for s in medians[::-1]])
        axes.set_xlabel("TTFT of the turn that overflows, ms")
        picture.tight_layout()
        picture.savefig(directory / "truncation-ttft.svg")


if __name__ == "__main__":
    typer.run(main)
