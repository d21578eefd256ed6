"""What was found, as tables of medians and as figures beside what they are held to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rich.table import Table

from benchmarks.engine.scenarios import Played
from benchmarks.store.figures import Figure

_MIB = 2**20
_OURS = "ours"
_DRAM = "ours, dram"
_COLUMNS = {
    "start": ("start_s", 1.0, "s"),
    "memory": ("memory_bytes", 1 / _MIB, "MiB"),
    "TTFT, history cached": ("cached_ttft_s", 1e3, "ms"),
    "TTFT, all new": ("cold_ttft_s", 1e3, "ms"),
    "per token": ("tpot_s", 1e3, "ms"),
    "throughput": ("tokens_per_s", 1.0, "tokens/s"),
    "gap median": ("gaps_s", 1e3, "ms"),
}


def results(title: str, played: Mapping[str, Played], failed: Mapping[str, str]) -> Table:
    """Medians by engine; columns that the scenario does not fill are left out. failed: why others have none."""
    columns = {name: of for name, of in _COLUMNS.items() if any(getattr(p, of[0]) for p in played.values())}
    found = Table(title=title, title_justify="left")
    for column in ("", *columns, "gap p99", "prompt cached"):
        found.add_column(column, justify="left" if not column else "right")
    for engine, p in played.items():
        medians = {name: p.median(of[0]) for name, of in columns.items()}
        found.add_row(
            engine,
            *(
                "" if value is None else f"{value * columns[name][1]:.4g} {columns[name][2]}"
                for name, value in medians.items()
            ),
            "" if p.gap_p99_s is None else f"{p.gap_p99_s * 1e3:.4g} ms",
            "" if p.hit_rate is None else f"{p.hit_rate:.1%}",
        )
    for engine, reason in failed.items():
        found.add_row(engine, f"failed: {reason.strip().splitlines()[-1]}")
    return found


def agreement(played: Mapping[str, Played]) -> str:
    """How many answers of each engine are ours, word for word: all of them in float32; in bfloat16 roundings differ."""
    ours = played[_OURS].answers
    equal = {name: sum(map(str.__eq__, p.answers, ours)) for name, p in played.items() if name != _OURS}
    return ", ".join(f"{name} {count} of {len(ours)} equal" for name, count in equal.items() if ours)


def figures(found: Mapping[str, Mapping[str, Played]]) -> list[Figure]:
    """Ours against the best of the peers that ran. found: scenario -> engine -> what it did."""
    made: list[Figure] = []
    if turns := found.get("turns"):
        made += filter(
            None,
            (
                _beside("turn with cached history, TTFT", turns, "cached_ttft_s", at_most=1.0),
                _beside("turn that is all new, TTFT", turns, "cold_ttft_s", at_most=1.2),
                _beside("each further token", turns, "tpot_s", at_most=1.3),
                _beside("memory", turns, "memory_bytes", at_most=1.0, peers=("vllm",)),
            ),
        )
        start = turns[_OURS].start_s
        made.append(Figure("start", statistics.median(start), "s", at_most=15.0, samples=tuple(start)))
    if (scarce := found.get("scarce")) and turns:
        little, all_in_dram = scarce[_OURS].cached_ttft_s, turns[_DRAM].cached_ttft_s
        against = _scaled(statistics.median(all_in_dram), "cached_ttft_s")
        value = _scaled(statistics.median(little), "cached_ttft_s")
        made.append(Figure("cached TTFT, DRAM too small", value, "ms", against, "ours, all in DRAM", at_most=1.5))
    for title, crowd in found.items():
        if not title.startswith("crowd"):
            continue
        peers = ("llama", "transformers")
        made += filter(None, [_beside(f"{title}, throughput", crowd, "tokens_per_s", at_least=1.0, peers=peers)])
        gaps, p99 = crowd[_OURS].gaps_s, crowd[_OURS].gap_p99_s
        if p99 is not None:
            name = f"{title}, p99 of a token while long prompts arrive"
            made.append(Figure(name, p99 * 1e3, "ms", statistics.median(gaps) * 1e3, "its median", at_most=3.0))
    return made


def _scaled(value: float, samples: str) -> float:
    return value * next(scale for name, scale, _ in _COLUMNS.values() if name == samples)


def _beside(
    name: str,
    played: Mapping[str, Played],
    samples: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    peers: tuple[str, ...] = ("llama", "vllm", "transformers"),
) -> Figure | None:
    """Ours against the best of some peers; None: none of them ran."""
    theirs = {peer: statistics.median(getattr(played[peer], samples)) for peer in peers if peer in played}
    if not theirs:
        return None
    best = (min if at_least is None else max)(theirs, key=theirs.__getitem__)
    ours = getattr(played[_OURS], samples)
    return Figure(
        name,
        _scaled(statistics.median(ours), samples),
        next(unit for of, _, unit in _COLUMNS.values() if of == samples),
        _scaled(theirs[best], samples),
        best,
        at_least,
        at_most,
        samples=tuple(_scaled(value, samples) for value in ours),
    )
