"""Time to first token of a turn with its history in working KV, in DRAM, on SSD, and recomputed.

    python -m benchmarks.turns [--model DIR] [--dtype bfloat16] [--json FILE]

Plays the same conversations through the whole system over HTTP, four times: with the history retained in working KV
(so that only the new tokens are computed), with it in DRAM, with cold DRAM (history on SSD only, page cache dropped),
and with --no-reuse (the same engine, recomputing). A turn's history is grown to `--history` tokens first; the measured
turns add `--new` tokens each. Ratios are of medians within one run; stacks run one after another on the same machine.

A fifth stack loads without computing meanwhile (--no-preload): what loading takes alone. With history in DRAM a turn is
held to 1.10 times the longer of the two, loading alone and computing alone.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.models import bench_88m
from benchmarks.stack import Stack, running_stack

Mode = Literal["hbm", "dram", "ssd", "recompute"]  # where a turn's history comes from
MODES: tuple[Mode, ...] = ("hbm", "dram", "ssd", "recompute")
HELD_TO = 1.10  # of the longer one of loading alone and computing alone
_TEMPLATE_TOKENS = 4  # of one more user message in the benchmark's chat template


@dataclass(frozen=True)
class Reply:
    """What came back over HTTP."""

    ttft_s: float  # request sent to first token received
    text: str
    usage: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One measured turn."""

    mode: Mode
    repeat: int
    turn: int
    prompt_tokens: int
    hbm: int
    dram: int
    ssd: int
    computed: int
    missed: int
    ttft_s: float  # request sent to first token received, over HTTP
    prefill_s: float  # admission to first token in the inference process (the paper's TTFT)


class Conversation:
    """A conversation over HTTP whose user messages have a chosen number of tokens.

    The byte tokenizer of the made models gives one token per ASCII character.
    """

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self._name = name
        self.messages: list[dict[str, Any]] = []

    def say(self, tokens: int, answer_tokens: int) -> Reply:
        """One turn with a user message of about `tokens` tokens."""
        seed = f"{self._name} {len(self.messages)} "
        text = (seed + "the quick brown fox jumps over the lazy dog " * (tokens // 40 + 1))[:tokens]
        self.messages.append({"role": "user", "content": text})
        reply = ask(self._stack, self.messages, answer_tokens)
        self.messages.append({"role": "assistant", "content": reply.text})
        return reply


def ask(stack: Stack, messages: list[dict[str, Any]], answer_tokens: int) -> Reply:
    """One turn, streamed and greedy. Raises RuntimeError: the server refused, or broke off."""
    body = {
        "model": "default",
        "messages": messages,
        "temperature": 0,
        "max_tokens": answer_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    ttft_s, answer = 0.0, ""
    usage: dict[str, Any] = {}
    started = time.perf_counter()
    with stack.http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event))
            for choice in event["choices"]:
                answer += choice["delta"].get("content") or ""
                if choice.get("token_ids") and not ttft_s:
                    ttft_s = time.perf_counter() - started
            usage = event.get("usage") or usage
    if not usage:
        raise RuntimeError("the answer broke off")
    return Reply(ttft_s, answer, usage)


def measure(
    mode: Mode,
    model: Path | str,
    repeats: int,
    turns: int,
    history: int,
    new: int,
    step: Any,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Turn], float]:
    """Play the conversations in one mode. Returns the turns, and seconds of loading per turn.

    Raises RuntimeError: a turn did not get its history from where it should.
    """
    answer_tokens = 8
    found: list[Turn] = []
    loaded_s = 0.0
    with running_stack(model, log_level="warning", **settings_of(mode), **settings) as stack:
        warm = Conversation(stack, "warm-up")
        for _ in range(2):
            warm.say(300, answer_tokens)
        for repeat in range(repeats):
            conversation = Conversation(stack, f"conversation {repeat}")
            conversation.say(history - answer_tokens - _TEMPLATE_TOKENS, answer_tokens)
            for turn in range(turns):
                settle(stack, mode)
                before_s = _loading_s(stack)
                reply = conversation.say(new - _TEMPLATE_TOKENS, answer_tokens)
                found.append(measured(mode, repeat, turn, reply))
                loaded_s += _loading_s(stack) - before_s
                step()
    return found, loaded_s / len(found)


def _loading_s(stack: Stack) -> float:
    metrics = stack.metrics("inference")
    return sum(value for name, value in metrics.items() if name.startswith("cachedattention_load_seconds_sum"))


def settings_of(mode: Mode) -> dict[str, str]:
    """How the services run. Working KV is not retained unless it is what is measured; what is saved is loaded."""
    reuse = {"no_reuse": "true"} if mode == "recompute" else {"load_or_compute": "load"}
    settings = {"dram": "1GiB", "ssd": "8GiB", **reuse}
    return settings if mode == "hbm" else {**settings, "retain": "0"}


def settle(stack: Stack, mode: Mode) -> None:
    """Wait until the last turn is saved; for the SSD mode, until it is nowhere else."""
    if mode == "recompute":
        time.sleep(0.2)
        return
    stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)
    time.sleep(0.2)
    if mode == "ssd":
        stack.drop_dram()


def measured(mode: Mode, repeat: int, turn: int, reply: Reply) -> Turn:
    """The figures of one turn. Raises RuntimeError: its history did not come from where it should."""
    parts = reply.usage["cachedattention"]
    missed = sum(parts["missed"].values())
    found = Turn(
        mode,
        repeat,
        turn,
        reply.usage["prompt_tokens"],
        parts["hbm"],
        parts["dram"],
        parts["ssd"],
        parts["computed"],
        missed,
        reply.ttft_s,
        parts["prefill_s"],
    )
    history = missed if mode == "recompute" else parts[mode]
    if found.computed + history != found.prompt_tokens:
        raise RuntimeError(f"the turn's history came from elsewhere: {found}")
    return found


def summarize(turns: list[Turn]) -> dict[str, Any]:
    """Medians, extremes and ratios to recomputing, over the measured turns."""
    summary: dict[str, Any] = {}
    for mode in dict.fromkeys(t.mode for t in turns):
        of_mode = [t for t in turns if t.mode == mode]
        ttft = [t.ttft_s for t in of_mode]
        summary[mode] = {
            "turns": len(of_mode),
            "prompt_tokens_median": statistics.median(t.prompt_tokens for t in of_mode),
            "computed_tokens_median": statistics.median(t.computed for t in of_mode),
            "ttft_s": {"median": statistics.median(ttft), "min": min(ttft), "max": max(ttft)},
            "prefill_s_median": statistics.median(t.prefill_s for t in of_mode),
        }
    if base := summary.get("recompute"):
        for row in (row for row in summary.values() if row is not base):
            row["ttft_speedup"] = base["ttft_s"]["median"] / row["ttft_s"]["median"]
            row["prefill_speedup"] = base["prefill_s_median"] / row["prefill_s_median"]
    return summary


def overlap(summary: dict[str, Any], load_alone_s: float) -> dict[str, float]:
    """How well loading and computing overlap with history in DRAM, by the time from admission to first token."""
    compute_s, both_s = summary["hbm"]["prefill_s_median"], summary["dram"]["prefill_s_median"]
    longer_s = max(load_alone_s, compute_s)
    return {"load_alone_s": load_alone_s, "compute_alone_s": compute_s, "both_s": both_s, "ratio": both_s / longer_s}


def tabulate(title: str, summary: dict[str, Any]) -> Table:
    """The summary to look at."""
    table = Table(title=title)
    for column in ("history from", "TTFT median", "min", "max", "prefill median", "TTFT speed-up", "prefill speed-up"):
        table.add_column(column, justify="right")
    for name, row in summary.items():
        ttft = row["ttft_s"]
        table.add_row(
            name,
            *(f"{ttft[k] * 1e3:.0f} ms" for k in ("median", "min", "max")),
            f"{row['prefill_s_median'] * 1e3:.0f} ms",
            *(f"{row[k]:.1f}x" if k in row else "" for k in ("ttft_speedup", "prefill_speedup")),
        )
    return table


def write_json(path: Path, module: str, summary: dict[str, Any], turns: Sequence[Any]) -> None:
    """Every figure, with the command and the machine that made it. turns: dataclasses, one for each measurement."""
    record = {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "machine": {"cpu": _cpu(), "python": platform.python_version()},
        "summary": summary,
        "turns": [asdict(t) for t in turns],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(
    model: Annotated[str | None, typer.Option(help="A model directory; default: bench-88m, made on the spot.")] = None,
    history: Annotated[int, typer.Option(help="Tokens of history before the first measured turn.")] = 1650,
    new: Annotated[int, typer.Option(help="New tokens of each measured turn.")] = 64,
    turns: Annotated[int, typer.Option(help="Measured turns per conversation.")] = 3,
    repeats: Annotated[int, typer.Option(help="Conversations per mode.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of weights and KV: float32 or bfloat16.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Measure the time to first token with history from working KV, from DRAM, from SSD and recomputed."""
    console = Console()
    directory = Path(model) if model else bench_88m()
    found: list[Turn] = []
    with Progress(console=console) as progress:
        task = progress.add_task("turns", total=(len(MODES) + 1) * repeats * turns)
        size, step = (repeats, turns, history, new), lambda: progress.advance(task)
        for mode in MODES:
            progress.update(task, description=f"turns, {mode}")
            found += measure(mode, directory, *size, step, {"dtype": dtype})[0]
        progress.update(task, description="loading alone")
        _, load_alone_s = measure("dram", directory, *size, step, {"dtype": dtype, "no_preload": "true"})
    summary = summarize(found)
    console.print(tabulate(f"{directory.name}, {dtype}: {history} tokens of history, {new} new", summary))
    found_overlap = overlap(summary, load_alone_s)
    told = {name: f"{value * 1e3:.1f} ms" for name, value in found_overlap.items() if name.endswith("_s")}
    console.print(f"{told}: {found_overlap['ratio']:.2f} of the longer, held to {HELD_TO}")
    if json_file is not None:
        write_json(json_file, "benchmarks.turns", {**summary, "overlap": found_overlap}, found)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    typer.run(main)
