"""`cachedattention simulate`: what a placement policy makes of a recorded trace."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.simulator.names import Format, PolicyName
from benchmarks.simulator.replay import Machine
from benchmarks.simulator.simulation import BELADY, Simulation, as_json
from benchmarks.simulator.traces import Trace, load, repeat
from cli.sizes import format_size
from protocol.errors import ConfigError

_ARRIVAL_RATES: dict[Format, float] = {"agentic": 0.01, "text": 1.0, "mooncake": 1.0}
_SHOW_EVERY = 64  # requests


@dataclass(frozen=True)
class Options:
    """What to replay. arrival_rate, sessions: None where the trace decides."""

    trace: Path
    format: Format
    policy: PolicyName
    dram_tokens: int
    ssd_tokens: int
    arrival_rate: float | None
    sessions: int | None
    seed: int
    chunk_tokens: int
    bytes_per_token: int
    machine: Machine
    warm_up: int
    count: int | None
    with_belady: bool


def run_simulate(options: Options, json_file: Path | None) -> int:
    """Replay, print a table, and write the figures to `json_file`. Raises ConfigError: a bad option or file."""
    for name in ("prefill_rate", "decode_rate", "ssd_read_rate", "ssd_write_rate"):
        if not getattr(options.machine, name) > 0:  # nor NaN
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0", param=name)
    console = Console(highlight=False)
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json: there is no directory {json_file.parent}", param="json")
    with console.status(f"reading {options.trace}"):
        trace = _trace(options)
    try:
        simulation = Simulation(
            trace,
            options.policy,
            options.dram_tokens,
            options.ssd_tokens,
            options.machine,
            options.warm_up,
            options.count,
        )
    except ValueError as error:
        raise ConfigError(str(error), param="policy") from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = trace.requests if options.count is None else min(trace.requests, options.warm_up + options.count)
        task = progress.add_task(options.policy, total=total)

        def show(done: int) -> None:
            if done % _SHOW_EVERY == 0 or done == total:
                progress.update(task, completed=done)

        tally, best = simulation.run(show, limit=options.with_belady)
    figures = as_json(tally, options.bytes_per_token)
    limit = as_json(best, options.bytes_per_token) if options.with_belady else None
    console.print(_table(options.policy, figures, limit))
    if json_file is not None:
        record = {**_settings(options, trace), **figures, BELADY: _limit(limit)}
        json_file.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _trace(options: Options) -> Trace:
    rate = options.arrival_rate
    if options.format == "mooncake" and (rate is not None or options.sessions is not None):
        raise ConfigError("a mooncake trace has arrivals of its own: no --arrival-rate, no --sessions", param="format")
    rate = _ARRIVAL_RATES[options.format] if rate is None else rate
    if not (rate > 0 and math.isfinite(rate)):
        raise ConfigError("--arrival-rate must be a number of conversations per second, above 0", param="arrival_rate")
    try:
        trace = load(options.trace, options.format, rate=rate, seed=options.seed, chunk_tokens=options.chunk_tokens)
    except OSError as error:
        raise ConfigError(f"--trace: cannot read {options.trace}: {error}", param="trace") from error
    except ValueError as error:
        raise ConfigError(f"--trace: {error}", param="trace") from error
    return trace if options.sessions is None else repeat(trace, options.sessions, rate, options.seed)


def _settings(options: Options, trace: Trace) -> dict[str, Any]:
    return {
        "trace": options.trace.name,
        "format": options.format,
        "policy": options.policy,
        "dram_tokens": options.dram_tokens,
        "ssd_tokens": options.ssd_tokens,
        "chunk_tokens": trace.chunk_tokens,
        "conversations": len(trace.conversations),
        "seed": options.seed,
    }


def _limit(figures: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of the limit, what is known of it: what hits."""
    names = ("requests", "hit_requests", "prompt_tokens", "hit_tokens", "hit_rate", "hit_rate_by_turn")
    return None if figures is None else {name: figures[name] for name in names}


def _table(policy: str, figures: dict[str, Any], limit: dict[str, Any] | None) -> Table:
    prompt = max(1, figures["prompt_tokens"])
    table = Table(title=f"{figures['requests']:,} requests, {figures['prompt_tokens']:,} prompt tokens")
    table.add_column("")
    table.add_column(policy, justify="right")
    if limit is not None:
        table.add_column("belady", justify="right")

    def row(name: str, value: str, of_limit: str = "") -> None:
        table.add_row(name, value, of_limit) if limit is not None else table.add_row(name, value)

    def tokens(key: str) -> str:
        return f"{figures[key]:,} ({figures[key] / prompt:.2%})"

    row(
        "hit tokens",
        tokens("hit_tokens"),
        "" if limit is None else f"{limit['hit_tokens']:,} ({limit['hit_rate']:.2%})",
    )
    row("  in DRAM in time", tokens("hit_tokens_dram"))
    row("  on SSD, late", tokens("hit_tokens_ssd"))
    by_turn = {} if limit is None else {of["turn"]: of["hit_rate"] for of in limit["hit_rate_by_turn"]}
    last = figures["hit_rate_by_turn"][-1]["turn"] if figures["hit_rate_by_turn"] else 0
    for of in figures["hit_rate_by_turn"]:
        turn = of["turn"]
        if turn <= 5 or turn == last:
            row(f"  turn {turn}", f"{of['hit_rate']:.2%}", f"{by_turn.get(turn, 0.0):.2%}")
    row("prefetched: ready in time", f"{figures['ready_tokens']:,}")
    row("prefetched: useless", f"{figures['useless_tokens']:,}")
    row("read from SSD", format_size(figures["bytes_read"]))
    row("written to SSD", format_size(figures["bytes_written"]))
    row("waiting turns, at most", f"{figures['most_waiting']:,}")
    row("wait for a place, mean", f"{figures['queue_wait_s']:.3g} s")
    row("prefill, mean", f"{figures['prefill_s']:.3g} s")
    row("simulated", f"{figures['simulated_s']:,.0f} s in {figures['wall_s']:.1f} s")
    return table
