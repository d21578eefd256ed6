"""The paper's ablations of layer-wise pre-loading and asynchronous saving (section 4.3, figures 19 and 20).

    python -m benchmarks.preload [--json FILE]

Pre-loading: a turn with `--history` tokens of history and `--new` new ones waits behind the prefill of another one.
Its prefill time runs from that turn's first token to its own. The link is slowed down until loading and computing
relate as in the paper, 0.615 to 0.385, for which its formula says how much must be loaded ahead. Four ways: nothing is
computed before all of the history is loaded, and nothing loaded before it is the turn's turn (no pre-loading); layer by
layer from then on (a buffer of 0 layers); loaded ahead as far as the formula's buffer reaches, and a layer more because
whole layers are computed; and as the engine does by itself, which goes on loading as long as the turn waits.

Saving: new conversations with prompts of 1,024 to 1,600 tokens and 20 decode steps, their KV saved under the
computation, or after it and before the turn is done. The link is as slow as makes saving take 15 % of a turn that hides
nothing of it.

All ways run beside each other, each in processes of its own, and take turns, so that what else the machine does
meets all of them.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.models import bench_88m
from benchmarks.stack import Stack, running_stack
from benchmarks.turns import Conversation, settle, write_json
from inference.read_buffer import read_buffer_bytes

# Of loading and computing together, where the formula asks for 15 of 40 layers, the paper's buffer: 1 / (2 - 15 / 40).
LOAD_SHARE = 0.615
SAVE_SHARE = 0.15  # of a turn that saves when it has computed: what the paper hides at best
HELD_TO = {"buffer of 0 layers": -0.35, "formula's buffer": -0.61, "asynchronous": -0.13}
SAVING: dict[str, dict[str, Any]] = {"synchronous": {"save": "sync"}, "asynchronous": {}}
_LAYERS = 12  # of bench-88m
_TOKEN_BYTES = _LAYERS * 2 * 4 * 64 * 4  # of its KV in float32
_DECODE_STEPS = 20
_PROMPTS = (1024, 1216, 1408, 1600)
_BEFORE_TOKENS = 2000  # of the turn that is computed while the measured one waits
_CALIBRATING = 4  # turns of each prompt: were the machine slower then than later, saving would take a larger share
_WARM = 2  # turns of each way that are not counted: the rates are measured in them


@dataclass(frozen=True)
class Sample:
    """One measured turn."""

    mode: str
    repeat: int
    tokens: int  # new ones
    seconds: float  # prefill time behind another turn; for saving, request to done


def settings(link_bandwidth: int, **others: Any) -> dict[str, Any]:
    """Histories come from DRAM, and are always loaded."""
    return {
        "log_level": "warning",
        "dram": "2GiB",
        "ssd": 0,
        "retain": 0,
        "load_or_compute": "load",
        "link_bandwidth": link_bandwidth,
        **others,
    }


def preloading(history: int, load_s: float, compute_s: float) -> dict[str, dict[str, Any]]:
    """What the ways differ in."""
    layer_bytes = history * _TOKEN_BYTES // _LAYERS
    layers = -(-read_buffer_bytes(history * _TOKEN_BYTES, load_s, compute_s) // layer_bytes) + 1
    return {
        "no pre-loading": {"no_preload": "true"},
        "buffer of 0 layers": {"read_buffer": 0},
        "formula's buffer": {"read_buffer": layers * layer_bytes},
        "engine's own": {},
    }


@contextlib.contextmanager
def running(ways: Mapping[str, Mapping[str, Any]], link_bandwidth: int) -> Iterator[dict[str, Stack]]:
    """A stack for each way."""
    model = bench_88m()
    with contextlib.ExitStack() as stacks:
        yield {
            mode: stacks.enter_context(running_stack(model, **settings(link_bandwidth, **values)))
            for mode, values in ways.items()
        }


def behind_another(
    ways: Mapping[str, Mapping[str, Any]], link_bandwidth: int, history: int, new: int, repeats: int
) -> list[Sample]:
    """Turns with history that wait behind a turn without one, which computes for longer than they could load."""
    found = []
    with running(ways, link_bandwidth) as stacks:
        begun = {mode: Conversation(stack, "measured") for mode, stack in stacks.items()}
        for conversation in begun.values():
            conversation.say(history, 1)
        for repeat in range(repeats + _WARM):
            for mode, stack in stacks.items():
                settle(stack, "dram")
                found.append(Sample(mode, repeat, new, one_behind_another(stack, begun[mode], new, repeat)))
    return [sample for sample in found if sample.repeat >= _WARM]


def one_behind_another(stack: Stack, begun: Conversation, new: int, repeat: int) -> float:
    """Seconds between the two turns' first tokens. Raises RuntimeError: the history was not loaded."""
    before = Conversation(stack, f"another {repeat}")
    before_s = 0.0

    def compute() -> None:
        nonlocal before_s
        started = time.perf_counter()
        before_s = started + before.say(_BEFORE_TOKENS, 1).ttft_s

    thread = threading.Thread(target=compute)
    thread.start()
    time.sleep(0.1)  # it computes by now, for a second and more
    measured = Conversation(stack, f"measured {repeat}")  # the same history, another message
    measured.messages = list(begun.messages)
    started = time.perf_counter()
    reply = measured.say(new, 1)
    thread.join()
    account = reply.usage["cachedattention"]
    if account["missed"] or account["computed"] < new:
        raise RuntimeError(f"the history was not loaded, or more than that: {reply.usage}")
    return started + reply.ttft_s - before_s


def saving(ways: Mapping[str, Mapping[str, Any]], link_bandwidth: int, repeats: int) -> list[Sample]:
    """Request to done, of each prompt."""
    found = []
    with running(ways, link_bandwidth) as stacks:
        for stack in stacks.values():
            for number in range(_WARM):
                Conversation(stack, f"warm-up {number}").say(_PROMPTS[0], _DECODE_STEPS)
        for repeat in range(repeats):
            for tokens in _PROMPTS:
                # Neither is always the one that comes first.
                for mode, stack in sorted(stacks.items(), reverse=bool(repeat % 2)):
                    conversation = Conversation(stack, f"{repeat} {tokens}")
                    started = time.perf_counter()
                    conversation.say(tokens, _DECODE_STEPS)
                    found.append(Sample(mode, repeat, tokens, time.perf_counter() - started))
                    settle(stack, "dram")
    return found


def median_s(samples: list[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


def summarize(samples: list[Sample], ideal_s: Mapping[str, float]) -> dict[str, Any]:
    """Medians, and what turns take against the same turn of the first way, one by one: neither how their lengths differ
    nor what changes from minute to minute shows in it. ideal_s: if all overlaps that can, and nothing else costs.
    """
    summary: dict[str, Any] = {}
    base: dict[tuple[int, int], float] = {}
    for mode, ideal in ideal_s.items():
        of = {(sample.repeat, sample.tokens): sample.seconds for sample in samples if sample.mode == mode}
        base = base or of
        row = {"median_s": statistics.median(of.values()), "min_s": min(of.values()), "max_s": max(of.values())}
        row |= {"ideal_s": ideal, "change": statistics.median(of[turn] / base[turn] for turn in of) - 1}
        if mode in HELD_TO:
            row["held_to"] = HELD_TO[mode]
        summary[mode] = row
    return summary


def tabulate(title: str, summary: dict[str, Any]) -> Table:
    table = Table(title=title)
    for column in ("", "median", "min", "max", "ideal", "change", "held to"):
        table.add_column(column, justify="right")
    for mode, row in summary.items():
        table.add_row(
            mode,
            *(f"{row[key] * 1e3:.0f} ms" for key in ("median_s", "min_s", "max_s", "ideal_s")),
            *(f"{row[key]:+.0%}" if row.get(key) else "" for key in ("change", "held_to")),
        )
    return table


def measure_preloading(history: int, new: int, repeats: int) -> tuple[dict[str, Any], list[Sample]]:
    compute_s = median_s(behind_another({"": {}}, 0, history, new, repeats))  # without a limit of the link
    load_s = compute_s * LOAD_SHARE / (1 - LOAD_SHARE)
    bandwidth = int(history * _TOKEN_BYTES / load_s)
    ways = preloading(history, load_s, compute_s)
    samples = behind_another(ways, bandwidth, history, new, repeats)
    ideal_s = {
        "no pre-loading": load_s + compute_s,
        "buffer of 0 layers": load_s + compute_s / _LAYERS,
        "formula's buffer": compute_s,
        "engine's own": compute_s,
    }
    summary = {"link_bytes_per_s": bandwidth, "compute_s": compute_s, "load_s": load_s, "settings": ways}
    return summary | {"ways": summarize(samples, ideal_s)}, samples


def measure_saving(repeats: int) -> tuple[dict[str, Any], list[Sample]]:
    compute_s = median_s(saving({"": {"no_reuse": "true"}}, 0, _CALIBRATING))
    save_s = compute_s * SAVE_SHARE / (1 - SAVE_SHARE)
    bandwidth = int(statistics.median(_PROMPTS) * _TOKEN_BYTES / save_s)
    samples = saving(SAVING, bandwidth, repeats)
    ways = summarize(samples, {"synchronous": compute_s + save_s, "asynchronous": compute_s})
    share = save_s / ways["synchronous"]["median_s"]  # as it came out
    summary = {"link_bytes_per_s": bandwidth, "compute_s": compute_s, "save_s": save_s, "save_share": share}
    return summary | {"settings": SAVING, "ways": ways}, samples


def main(
    history: Annotated[int, typer.Option(help="Tokens of history of the measured turn.")] = 3000,
    new: Annotated[int, typer.Option(help="Its new tokens.")] = 480,
    repeats: Annotated[int, typer.Option(help="Measured turns of each way.")] = 6,
    part: Annotated[Literal["all", "preloading", "saving"], typer.Option(help="What to measure.")] = "all",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Measure what pre-loading and asynchronous saving save, as the paper does."""
    console = Console()
    summary: dict[str, Any] = {}
    samples: list[Sample] = []
    if part != "saving":
        summary["preloading"], found = measure_preloading(history, new, repeats)
        samples += found
        link = summary["preloading"]["link_bytes_per_s"]
        title = f"{history} tokens of history, {new} new, {link / 1e6:.0f} MB/s"
        console.print(tabulate(title, summary["preloading"]["ways"]))
    if part != "preloading":
        summary["saving"], found = measure_saving(repeats)
        samples += found
        link = summary["saving"]["link_bytes_per_s"]
        title = f"prompts of 1,024 to 1,600 tokens, {_DECODE_STEPS} decode steps, {link / 1e6:.0f} MB/s, "
        title += f"saving takes {summary['saving']['save_share']:.1%} of a synchronous turn"
        console.print(tabulate(title, summary["saving"]["ways"]))
    if json_file is not None:
        write_json(json_file, "benchmarks.preload", summary, samples)


if __name__ == "__main__":
    typer.run(main)
