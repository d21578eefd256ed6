"""Conversations to play: a few of the project's own, and real ones where the data directory is there."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_OWN = Path(__file__).parent / "data" / "conversations.jsonl"
REAL_TEXT = Path(__file__).parents[3] / "shared" / "data" / "text"
NO_DATA = f"the recorded conversations are not here ({REAL_TEXT.name} directory beside the project)"


@dataclass(frozen=True)
class Script:
    """What a conversation's user (and system and tools) say, turn by turn; the answers are the model's own."""

    name: str
    turns: tuple[tuple[dict[str, Any], ...], ...]  # the messages before each answer


def _script(name: str, messages: list[dict[str, Any]]) -> Script:
    turns: list[tuple[dict[str, Any], ...]] = []
    pending: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant":
            continue
        pending.append({"role": message["role"], "content": message.get("content") or ""})
        if message["role"] != "system":
            turns.append(tuple(pending))
            pending = []
    return Script(name, tuple(turns))


@cache
def own_scripts() -> tuple[Script, ...]:
    rows = [json.loads(line) for line in _OWN.read_text(encoding="utf-8").splitlines()]
    return tuple(_script(row["id"], row["messages"]) for row in rows)


@cache
def real_scripts(count: int, max_first_chars: int) -> tuple[Script, ...]:
    """`count` multi-turn conversations, a fair share of each file, whose first prompt is not over the limit."""
    files = sorted(REAL_TEXT.glob("*.jsonl.gz"))
    found: list[Script] = []
    per_file = -(-count // len(files))
    for path in files:
        taken = 0
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                script = _script(row["id"], row["messages"])
                if len(script.turns) < 2 or _chars(script.turns[0]) > max_first_chars:
                    continue
                found.append(script)
                taken += 1
                if taken == per_file:
                    break
    return tuple(found[:count])


def _chars(messages: tuple[dict[str, Any], ...]) -> int:
    return sum(len(message["content"].encode()) for message in messages)
