"""Calls of tools in a model's answer, found as its text arrives. Pure. inference/tools.py tells the formats.

What is no call stays text: JSON that cannot be read, or a function that the request did not declare.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"

Format = Literal["", "hermes", "llama3"]


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # JSON


Piece = str | ToolCall


class ToolCallParser:
    """Takes an answer in pieces; gives out text and whole calls, in order. White space around calls is dropped."""

    def __init__(self, chosen: Format, names: Collection[str]) -> None:
        """names: of the functions that may be called."""
        self._format = chosen
        self._names = names
        self._held = ""  # not given out yet
        self._is_after_call = False
        self._has_spoken = False

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        if self._format == "hermes":
            return self._feed_hermes()
        if self._format == "llama3" and self._may_be_call():
            return []
        return self._give(len(self._held))

    def finish(self) -> list[Piece]:
        """No more text comes. Returns what was held back."""
        if self._format == "llama3" and self._may_be_call():
            calls = _read(self._held.strip().removeprefix(_PYTHON_TAG), self._names, "parameters")
            if calls:
                return [*calls]
        return self._give(len(self._held))

    def _feed_hermes(self) -> list[Piece]:
        pieces: list[Piece] = []
        while True:
            held, opened = self._held, self._held.find(_OPEN)
            closed = held.find(_CLOSE, opened) if opened >= 0 else -1
            if closed < 0:  # white space stays with what may become a call
                safe = opened if opened >= 0 else len(held) - _overlap(held, _OPEN)
                return pieces + self._give(len(held[:safe].rstrip()))
            calls = _read(held[opened + len(_OPEN) : closed], self._names, "arguments")
            end = closed + len(_CLOSE)
            if calls:
                pieces += [*self._give(len(held[:opened].rstrip())), *calls]
                self._held = held[end:]
                self._is_after_call = True
            else:
                pieces += self._give(end)

    def _give(self, length: int) -> list[Piece]:
        text, self._held = self._held[:length], self._held[length:]
        if self._is_after_call:
            text = text.lstrip()
        self._is_after_call = self._is_after_call and not text
        self._has_spoken = self._has_spoken or bool(text)
        return [text] if text else []

    def _may_be_call(self) -> bool:
        """In Llama's format a call is all of an answer."""
        begun = self._held.lstrip()
        is_begun = begun.startswith(("{", _PYTHON_TAG)) or _PYTHON_TAG.startswith(begun)
        return is_begun and not self._has_spoken


def read_answer(text: str, chosen: Format, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """A whole answer: its text and its calls."""
    parser = ToolCallParser(chosen, names)
    pieces = [*parser.feed(text), *parser.finish()]
    said = "".join(piece for piece in pieces if isinstance(piece, str))
    return said, [piece for piece in pieces if isinstance(piece, ToolCall)]


def same_arguments(one: str, other: str) -> bool:
    """Whether two texts are equal as JSON, whatever their spacing."""
    try:
        return one == other or bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


def _read(text: str, names: Collection[str], arguments: str) -> Sequence[ToolCall]:
    """Objects of a name and arguments, with nothing but semicolons and white space between; none where one is bad."""
    calls: list[ToolCall] = []
    at, decoder = 0, json.JSONDecoder()
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n;"))
        if at == len(text):
            return calls
        try:
            found, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return ()
        if not isinstance(found, dict) or found.get("name") not in names:
            return ()
        given: Any = found.get(arguments, found.get("arguments", {}))
        if isinstance(given, str):  # some models write JSON within JSON
            calls.append(ToolCall(found["name"], given))
        else:
            calls.append(ToolCall(found["name"], json.dumps(given, ensure_ascii=False)))


def _overlap(text: str, mark: str) -> int:
    """How long an end of `text` is the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
