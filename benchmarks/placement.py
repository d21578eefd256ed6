"""Placement policies beside one another, other systems' replacement and the optimum, on recorded traces.

    python -m benchmarks.placement [--data DIR] [--only peers,seeds,paper,tiers,bounds] [--json FILE] [--plots DIR]

Prints the tables of docs/results/placement.md. Nothing in it depends on the machine, except how long it takes.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.simulator.names import Format, PolicyName
from benchmarks.simulator.replay import Machine
from benchmarks.simulator.simulation import Simulation, as_json
from benchmarks.simulator.traces import Request, Trace, load, repeat
from kvdaemon.placement.anticipating import Anticipating

FILES: dict[Format, str] = {
    "agentic": "traces/agentic_claude_code.jsonl.gz",
    "mooncake": "traces/mooncake_conversation.jsonl.gz",
    "text": "text/wildchat.jsonl.gz",
}
SIZES: dict[Format, tuple[int, ...]] = {
    "agentic": (1_000_000, 2_000_000, 5_000_000),
    "mooncake": (1_000_000, 3_000_000, 10_000_000),
}
RIVALS: tuple[PolicyName, ...] = ("plain-lru", "tail-lru", "arc", "s3-fifo")
INFINITE = float("inf")
AT_ONCE = Machine(16, INFINITE, INFINITE, INFINITE, INFINITE)  # hits then change nothing in the order of turns
AGENTIC_RATE = 0.01

# The paper's (section 4.1, 4.3.3), LLaMA-13B: 0.78 MiB per token, 128 GB of DRAM, 2, 5 and 10 TB of SSD, 24 turns at
# once, 9,000 conversations at 1 per second. Its disk's rates are not stated: 5 GB/s either way. It serves 1.8 turns/s.
PAPER_MACHINE = Machine(24, 8_000.0, 25.0, 6_100.0, 6_100.0)
PAPER_DRAM = 156_000
PAPER_SSD = (2_440_000, 6_100_000, 12_200_000)
PAPER_SESSIONS = 9_000
PAPER_RATE = 1.0
PAPER_WARM_UP, PAPER_COUNT = 8_000, 24_000  # while the queue is deep: before the last conversations end

Told = Literal["", "tables", "ends", "gaps"]


@dataclass(frozen=True)
class Cell:
    """One replay, and where it belongs. told: what the policy is told that no online policy can know."""

    section: str
    format: Format
    policy: PolicyName
    dram_tokens: int
    ssd_tokens: int = 0
    rate: float = AGENTIC_RATE
    seed: int = 1
    sessions: int | None = None
    machine: Machine = AT_ONCE
    warm_up: int = 0
    count: int | None = None
    told: Told = ""


def peers() -> Iterable[Cell]:
    """Each trace at three sizes of one tier: all policies of one tier."""
    for format, sizes in SIZES.items():
        for size in sizes:
            for policy in (*RIVALS, "lru", "anticipating", "belady"):
                yield Cell("peers", format, policy, size)


def seeds() -> Iterable[Cell]:
    """The agentic trace with other arrivals."""
    for rate, seed in ((AGENTIC_RATE, 2), (AGENTIC_RATE * 3, 3)):
        for size in SIZES["agentic"]:
            for policy in (*RIVALS, "anticipating", "belady"):
                yield Cell("seeds", "agentic", policy, size, rate=rate, seed=seed)


def paper() -> Iterable[Cell]:
    """The paper's setting."""
    for ssd in PAPER_SSD:
        for policy in ("fifo", "lru", "scheduler-aware", "anticipating", "belady"):
            yield Cell(
                *("paper", "text", policy, PAPER_DRAM, ssd, PAPER_RATE, 1, PAPER_SESSIONS),
                *(PAPER_MACHINE, PAPER_WARM_UP, PAPER_COUNT),
            )


def tiers() -> Iterable[Cell]:
    """Two tiers without a deep queue, where what is on SSD is mostly late. The machine is the command's default."""
    for policy in ("lru", "scheduler-aware", "anticipating"):
        yield Cell("tiers", "agentic", policy, 2_000_000, 20_000_000, machine=Machine())


def bounds() -> Iterable[Cell]:
    """What more knowledge would give."""
    for format, size in (("agentic", 2_000_000), ("mooncake", 3_000_000)):
        for told in ("", "tables", "ends", "gaps"):
            if format == "agentic" or told in ("", "tables"):
                yield Cell("bounds", cast(Format, format), "anticipating", size, told=told)


SECTIONS: dict[str, Callable[[], Iterable[Cell]]] = {
    each.__name__: each for each in (peers, seeds, paper, tiers, bounds)
}


@functools.lru_cache(maxsize=1)
def _trace(data: Path, format: Format, rate: float, seed: int, sessions: int | None) -> Trace:
    trace = load(data / FILES[format], format, rate=rate, seed=seed)
    return trace if sessions is None else repeat(trace, sessions, rate, seed)


def run(data: Path, cell: Cell) -> dict[str, Any]:
    """The figures of one cell."""
    trace = _trace(data, cell.format, cell.rate, cell.seed, cell.sessions)
    if cell.told in ("ends", "gaps"):
        trace = _telling(trace, with_gaps=cell.told == "gaps")
    simulation = Simulation(
        trace, cell.policy, cell.dram_tokens, cell.ssd_tokens, cell.machine, cell.warm_up, cell.count
    )
    if cell.told == "tables":
        learned = Anticipating()
        replace(simulation, make_policy=lambda: learned).run(limit=False)
        simulation = replace(simulation, make_policy=learned.heir)
    tally, _ = simulation.run(limit=False)
    settings = {name: value for name, value in asdict(cell).items() if name != "machine"}
    return {**settings, **as_json(tally)}


def _telling(trace: Trace, *, with_gaps: bool) -> Trace:
    """Whoever speaks next is known to be nobody where a conversation is over; with_gaps: and else, in which octave
    of seconds."""

    def tell(requests: Sequence[Request]) -> list[Request]:
        told = []
        for before, after in zip(requests, [*requests[1:], None], strict=True):
            speaker = "nobody" if after is None else before.next_speaker
            if after is not None and with_gaps:
                speaker = f"octave {int(after.after_s).bit_length()}"
            told.append(replace(before, next_speaker=speaker))
        return told

    return Trace(trace.chunk_tokens, [tell(requests) for requests in trace.conversations])


# -- what it says -------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, a table per section."""
    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        of = [row for row in rows if row["section"] == section]
        make = {"peers": _against_rivals, "seeds": _against_rivals, "paper": _paper, "tiers": _tiers, "bounds": _bounds}
        parts.append(f"### {section}\n\n{make[section](of)}")
    return "\n\n".join(parts)


def _against_rivals(rows: list[dict[str, Any]]) -> str:
    names = [name for name in (*RIVALS, "lru", "anticipating", "belady") if any(r["policy"] == name for r in rows)]
    lines = [["trace", "conversations/s, seed", "tokens", *names, "best of the others", "share of the gap closed"]]
    for row in rows:
        if row["policy"] != "anticipating":
            continue
        rate = {r["policy"]: r["hit_rate"] for r in rows if _place(r) == _place(row)}
        best = max(names[:-2], key=lambda name: rate[name])
        gap = rate["belady"] - rate["plain-lru"]
        closed = f"{(rate['anticipating'] - rate['plain-lru']) / gap:.0%} of {100 * gap:.1f} points" if gap else "-"
        arrivals = "as recorded" if row["format"] == "mooncake" else f"{row['rate']:.3g}, {row['seed']}"
        lines.append(
            [
                *(row["format"], arrivals, f"{row['dram_tokens'] / 1e6:g} M"),
                *(f"{rate[name]:.2%}" for name in names),
                f"{best} ({100 * (rate['anticipating'] - rate[best]):+.2f} points)",
                closed,
            ]
        )
    return _markdown(lines)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["format"], row["rate"], row["seed"], row["dram_tokens"], row["ssd_tokens"]


def _paper(rows: list[dict[str, Any]]) -> str:
    head = ["conversations/s", "SSD tokens", "policy", "hit tokens", "turns that hit"]
    lines = [[*head, "of the hits in DRAM in time", "tokens fetched in vain", "most waiting"]]
    for row in rows:
        in_dram = f"{row['hit_tokens_dram'] / row['hit_tokens']:.2%}" if row["hit_tokens"] else "-"
        is_limit = row["policy"] == "belady"
        lines.append(
            [
                *(f"{row['rate']:g}", f"{row['ssd_tokens'] / 1e6:.2f} M", row["policy"], f"{row['hit_rate']:.2%}"),
                f"{row['hit_requests'] / row['requests']:.2%}",
                *(["", "", ""] if is_limit else [in_dram, f"{row['useless_tokens']:,}", f"{row['most_waiting']:,}"]),
            ]
        )
    return _markdown(lines)


def _tiers(rows: list[dict[str, Any]]) -> str:
    lines = [["DRAM tokens", "SSD tokens", "policy", "hit tokens", "in DRAM in time", "late", "ready", "in vain"]]
    for row in rows:
        prompt = row["prompt_tokens"]
        lines.append(
            [
                *(f"{row['dram_tokens'] / 1e6:g} M", f"{row['ssd_tokens'] / 1e6:g} M", row["policy"]),
                *(f"{row[key] / prompt:.2%}" for key in ("hit_tokens", "hit_tokens_dram", "late_tokens")),
                *(f"{row[key]:,}" for key in ("ready_tokens", "useless_tokens")),
            ]
        )
    return _markdown(lines)


def _bounds(rows: list[dict[str, Any]]) -> str:
    known = {
        "": "nothing (as it is)",
        "tables": "the life tables and factors of the whole trace, from the start",
        "ends": "which turn is a conversation's last",
        "gaps": "the same, and the octave of every gap",
    }
    lines = [["trace", "tokens", "known beforehand", "hit tokens"]]
    for row in rows:
        size = f"{row['dram_tokens'] / 1e6:g} M"
        lines.append([row["format"], size, known[row["told"]], f"{row['hit_rate']:.2%}"])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def plot(rows: list[dict[str, Any]], directory: Path) -> list[Path]:
    """Pictures of the sections `peers` and `paper`. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "placement"  # equal figures, equal bytes
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    if of := [row for row in rows if row["section"] == "peers"]:
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2))
        for panel, format in zip(panels, SIZES, strict=True):
            for policy in (*RIVALS, "anticipating", "belady"):
                points = [
                    (r["dram_tokens"] / 1e6, 100 * r["hit_rate"])
                    for r in of
                    if (r["format"], r["policy"]) == (format, policy)
                ]
                style: dict[str, Any] = {"linewidth": 2.5} if policy == "anticipating" else {"linewidth": 1}
                if policy == "belady":
                    style["linestyle"] = "--"
                panel.plot(*zip(*points, strict=True), marker="o", label=policy, **style)
            panel.set(title=format, xlabel="cache, million tokens", ylabel="hit tokens, %", xscale="log")
            panel.grid(alpha=0.3)
        panels[0].legend()
        drawn.append(_save(figure, directory / "placement-peers.svg"))
    if of := [row for row in rows if row["section"] == "paper"]:
        figure, panel = pyplot.subplots(figsize=(7, 4.2))
        policies = list(dict.fromkeys(row["policy"] for row in of))
        for place, policy in enumerate(policies):
            heights = [100 * row["hit_rate"] for row in of if row["policy"] == policy]
            panel.bar([x + place * 0.16 for x in range(len(heights))], heights, 0.15, label=policy)
        panel.set_xticks([x + 0.32 for x in range(len(PAPER_SSD))], [f"{ssd / 1e6:.2f} M" for ssd in PAPER_SSD])
        panel.set(title="the paper's setting: DRAM 0.156 M tokens", xlabel="SSD, tokens", ylabel="hit tokens, %")
        panel.grid(alpha=0.3, axis="y")
        panel.legend()
        drawn.append(_save(figure, directory / "placement-paper.svg"))
    return drawn


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    return path


def main(
    data: Annotated[Path, typer.Option(help="Directory with traces/ and text/.", exists=True)] = Path("../shared/data"),
    only: Annotated[str, typer.Option(help="Sections to run, by comma.", metavar="LIST")] = ",".join(SECTIONS),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw pictures into this directory (needs matplotlib).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Replays at once, a process each.")] = 2,
) -> None:
    """Replay the traces under every policy."""
    chosen = only.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise typer.BadParameter(f"{', '.join(unknown)}; choose from {', '.join(SECTIONS)}", param_hint="--only")
    cells = [cell for name in chosen for cell in SECTIONS[name]()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[dict[str, Any]] = []
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ProcessPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task("replays", total=len(cells))
        for row in pool.map(functools.partial(run, data), cells):
            rows.append(row)
            progress.advance(task)
            if json_file is not None:  # as far as it got
                _write(json_file, rows)
    print(tables(rows))
    if plots is not None:
        for path in plot(rows, plots):
            print(f"drawn: {path}", file=sys.stderr)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"command": "python -m benchmarks.placement", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    typer.run(main)
