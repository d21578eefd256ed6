"""Time to first token against recomputing, for links from slow to unlimited and histories from short to long.

    python -m benchmarks.load_or_compute [--json FILE] [--plot FILE]

Two stacks run at a time, one that may load (its link slowed down to what the row says) and one that recomputes
(--no-reuse); turns go to them in alternation. Nothing is retained on the device. Held to: at most 1.05 times the
recomputing engine's time, everywhere.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.models import bench_88m
from benchmarks.stack import Stack, running_stack
from benchmarks.turns import Conversation, Reply, settle, write_json

HELD_TO = 1.05
LINKS = (10_000_000, 30_000_000, 100_000_000, 300_000_000, 0)  # bytes per second; 0: no limit
HISTORIES = (64, 256, 1024, 3500)
_TEMPLATE_TOKENS = 4  # of one more user message in the benchmark's chat template
_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Sample:
    """One turn, played on both stacks."""

    link_bytes_per_s: int
    history: int  # tokens, when the conversation began
    turn: int
    loaded: int  # tokens
    computed_instead: int
    ours_s: float  # time to first token over HTTP
    recompute_s: float


def measure(link: int, model: Path, histories: tuple[int, ...], turns: int, repeats: int, new: int) -> list[Sample]:
    found = []
    common = {"log_level": "warning", "dram": "1GiB", "ssd": 0, "retain": 0}
    with (
        running_stack(model, **common, link_bandwidth=link) as ours,
        running_stack(model, **common, no_reuse="true") as recompute,
    ):
        warm_up(ours, recompute)
        for repeat in range(repeats):
            for history in histories:
                found += play(link, ours, recompute, history, turns, new, repeat)
    return found


def warm_up(ours: Stack, recompute: Stack) -> None:
    """Both rates are known after it."""
    for stack in (ours, recompute):
        conversation = Conversation(stack, "warm-up")
        for tokens in (1200, 100, 100):
            conversation.say(tokens, _ANSWER_TOKENS)
            settle(stack, "dram" if stack is ours else "recompute")


def play(link: int, ours: Stack, recompute: Stack, history: int, turns: int, new: int, repeat: int) -> list[Sample]:
    name = f"{repeat} {history}"
    mine, theirs = Conversation(ours, name), Conversation(recompute, name)
    for conversation in (mine, theirs):
        conversation.say(history - _ANSWER_TOKENS - _TEMPLATE_TOKENS, _ANSWER_TOKENS)
    found = []
    for turn in range(turns):
        replies: dict[Conversation, Reply] = {}
        # Each begins after the same pause, and is the first as often as the second: a machine that idled is slower.
        for conversation in (mine, theirs) if (turn + repeat) % 2 else (theirs, mine):
            settle(ours, "dram")
            replies[conversation] = conversation.say(new - _TEMPLATE_TOKENS, _ANSWER_TOKENS)
        parts = replies[mine].usage["cachedattention"]
        instead = parts["missed"].get("computing_was_cheaper", 0)
        found.append(Sample(link, history, turn, parts["dram"], instead, replies[mine].ttft_s, replies[theirs].ttft_s))
    return found


def summarize(samples: list[Sample]) -> list[dict[str, Any]]:
    """One row for each link and history: medians, and the median of the turns' ratios."""
    rows = []
    for link, history in dict.fromkeys((s.link_bytes_per_s, s.history) for s in samples):
        of = [s for s in samples if (s.link_bytes_per_s, s.history) == (link, history)]
        rows.append(
            {
                "link_bytes_per_s": link,
                "history": history,
                "turns": len(of),
                "loaded_share": sum(s.loaded for s in of) / max(1, sum(s.loaded + s.computed_instead for s in of)),
                "ours_s": statistics.median(s.ours_s for s in of),
                "recompute_s": statistics.median(s.recompute_s for s in of),
                "ratio": statistics.median(s.ours_s / s.recompute_s for s in of),
            }
        )
    return rows


def tabulate(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"time to first token; held to {HELD_TO} of recomputing")
    for column in ("link", "history", "loaded", "ours", "recomputing", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        link = row["link_bytes_per_s"]
        table.add_row(
            f"{link / 1e6:.0f} MB/s" if link else "no limit",
            str(row["history"]),
            f"{row['loaded_share']:.0%}",
            f"{row['ours_s'] * 1e3:.0f} ms",
            f"{row['recompute_s'] * 1e3:.0f} ms",
            f"{row['ratio']:.2f}",
        )
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The ratios over the length of the history, one line for each link. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "load_or_compute"  # equal figures, equal bytes
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for link in dict.fromkeys(row["link_bytes_per_s"] for row in rows):
        of = [row for row in rows if row["link_bytes_per_s"] == link]
        label = f"{link / 1e6:.0f} MB/s" if link else "no limit"
        axes.plot([row["history"] for row in of], [row["ratio"] for row in of], marker="o", label=label)
    axes.axhline(HELD_TO, color="grey", linestyle="--", linewidth=1)
    axes.set(xscale="log", ylim=(0, None), xlabel="tokens of history", ylabel="time to first token / recomputing")
    axes.legend(title="link", fontsize=8)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def main(
    new: Annotated[int, typer.Option(help="New tokens of each measured turn.")] = 64,
    turns: Annotated[int, typer.Option(help="Measured turns of each conversation.")] = 3,
    repeats: Annotated[int, typer.Option(help="Conversations of each link and history.")] = 2,
    link: Annotated[list[int] | None, typer.Option(help="Bytes per second, 0 for no limit; may be repeated.")] = None,
    history: Annotated[list[int] | None, typer.Option(help="Tokens of history; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios there (needs matplotlib).")] = None,
) -> None:
    """Measure where loading, computing or both win, and that nothing is slower than recomputing."""
    console = Console()
    model = bench_88m()
    samples: list[Sample] = []
    for bandwidth in link or LINKS:
        samples += measure(bandwidth, model, tuple(history or HISTORIES), turns, repeats, new)
    rows = summarize(samples)
    console.print(tabulate(rows))
    worst = max(rows, key=lambda row: float(row["ratio"]))
    console.print(f"worst: {worst['ratio']:.2f}")
    if json_file is not None:
        write_json(json_file, "benchmarks.load_or_compute", {"rows": rows, "worst": worst["ratio"]}, samples)
    if plot is not None:
        draw(rows, plot)


if __name__ == "__main__":
    typer.run(main)
