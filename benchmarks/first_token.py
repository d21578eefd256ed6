"""Time to first token of a short new turn in a long conversation with the embedded model.

    python -m benchmarks.first_token [--json FILE]

Conversations of the embedded model's world, none of which it was trained on, are grown to `--history` tokens; then
their next short turns are measured through the whole system over HTTP: with the history in working KV, in DRAM, on
SSD with nothing in memory (daemon restarted, page cache dropped), and recomputed by the same engine (--no-reuse).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.stack import Stack, running_stack
from benchmarks.turns import Mode, Reply, Turn, ask, measured, settings_of, settle, summarize, tabulate, write_json
from inference.embedded import MODEL
from inference.embedded.recipe import CONTEXT
from inference.embedded.template import MESSAGE_TOKENS
from inference.embedded.tokenizer import load_tokenizer
from inference.embedded.windows import Encoder, fresh_conversation

MODES: tuple[Mode, ...] = ("hbm", "dram", "ssd", "recompute")
HELD_TO_S = 0.1  # with cached history, on 2 cores
_SHORT_TOKENS = 32  # a user message of at most so many is a short turn
_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Script:
    """How a conversation begins, up to a message that waits for its answer, and what is said next."""

    beginning: list[dict[str, Any]]
    questions: list[str]


def write_script(encoder: Encoder, number: int, history: int, turns: int) -> Script:
    """A conversation of `history` tokens and `turns` short turns after it. Raises ValueError: none fits the context."""
    for attempt in range(100):
        seed = f"evaluation/first token/{number}/{attempt}"
        conversation = fresh_conversation(seed, CONTEXT, encoder.count, "training")
        messages: list[dict[str, Any]] = [{"role": "system", "content": conversation.system}]
        tokens = MESSAGE_TOKENS + encoder.count(conversation.system)
        said = iter(conversation.turns)
        for turn in said:
            messages.append({"role": "user", "content": turn.user})
            tokens += 2 * MESSAGE_TOKENS + encoder.count(turn.user) + encoder.count(turn.answer)
            if tokens >= history:
                break
            messages.append({"role": "assistant", "content": turn.answer})
        questions = [turn.user for turn in said if encoder.count(turn.user) <= _SHORT_TOKENS][:turns]
        if len(questions) == turns and tokens < history + 100:  # no long document at the end
            return Script(messages, questions)
    raise ValueError(f"no conversation has {turns} short turns after {history} tokens within {CONTEXT}")


def measure(mode: Mode, scripts: list[Script], step: Any) -> list[Turn]:
    """Play the scripts in one mode. Raises RuntimeError: a turn did not get its history from where it should."""
    found: list[Turn] = []
    with running_stack("embedded", log_level="warning", **settings_of(mode)) as stack:
        for _ in range(2):
            ask(stack, [{"role": "user", "content": "Hello!"}], _ANSWER_TOKENS)
        for repeat, script in enumerate(scripts):
            messages = list(script.beginning)
            _answer(stack, messages)
            for turn, question in enumerate(script.questions):
                settle(stack, mode)
                messages.append({"role": "user", "content": question})
                found.append(measured(mode, repeat, turn, _answer(stack, messages)))
                step()
    return found


def _answer(stack: Stack, messages: list[dict[str, Any]]) -> Reply:
    reply = ask(stack, messages, _ANSWER_TOKENS)
    messages.append({"role": "assistant", "content": reply.text})
    return reply


def main(
    history: Annotated[int, typer.Option(help="Tokens of history before the first measured turn.")] = 1500,
    turns: Annotated[int, typer.Option(help="Measured turns per conversation.")] = 5,
    repeats: Annotated[int, typer.Option(help="Conversations per mode.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Measure the embedded model's time to first token, by where the history comes from."""
    console = Console()
    encoder = Encoder(load_tokenizer(MODEL / "tokenizer.json"))
    scripts = [write_script(encoder, number, history, turns) for number in range(repeats)]
    found: list[Turn] = []
    with Progress(console=console) as progress:
        task = progress.add_task("turns", total=len(MODES) * repeats * turns)
        for mode in MODES:
            progress.update(task, description=f"turns, {mode}")
            found += measure(mode, scripts, lambda: progress.advance(task))
    summary = summarize(found)
    console.print(tabulate(f"embedded: {history} tokens of history, one short message new", summary))
    console.print(f"held to: {HELD_TO_S * 1e3:.0f} ms with cached history, on 2 cores")
    if json_file is not None:
        write_json(json_file, "benchmarks.first_token", summary, found)


if __name__ == "__main__":
    typer.run(main)
