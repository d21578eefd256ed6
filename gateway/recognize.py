"""Calls of tools that come back: recognized as what the model wrote, so that all of its KV is reused.

A client is told of calls as OpenAI has them, and sends them back so. Rendered by the template they may differ from what
the model wrote by a space; but a call's id names the turn that made it, and the journal has that turn's own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gateway.tool_calls import Format, read_answer, same_arguments
from protocol.messages import ChatMessage

_ID = re.compile(r"call_([0-9a-f]{32})_[0-9]{1,4}")


def tool_call_id(turn_id: bytes, number: int) -> str:
    return f"call_{turn_id.hex()}_{number}"


def calling_turns(messages: Sequence[ChatMessage]) -> list[bytes]:
    """The turns that made the calls in these messages, as far as their ids tell."""
    found = [_calling_turn(message) for message in messages]
    return [turn_id for turn_id in found if turn_id is not None]


def as_written(
    messages: Sequence[ChatMessage], answers: Mapping[bytes, str], chosen: Format
) -> tuple[ChatMessage, ...]:
    """The messages, with calls that are just as one of `answers` (by turn id) made them replaced by its text."""
    return tuple(_as_written(message, answers, chosen) for message in messages)


def _as_written(message: ChatMessage, answers: Mapping[bytes, str], chosen: Format) -> ChatMessage:
    turn_id = _calling_turn(message)
    written = answers.get(turn_id) if turn_id is not None else None
    if written is None:
        return message
    given = [call["function"] for call in json.loads(message.tool_calls)]
    text, calls = read_answer(written, chosen, {function["name"] for function in given})
    is_same = text == message.content and len(calls) == len(given)
    for call, function in zip(calls, given, strict=False):
        is_same = is_same and call.name == function["name"] and same_arguments(call.arguments, function["arguments"])
    return replace(message, content=written, tool_calls="") if is_same else message


def _calling_turn(message: ChatMessage) -> bytes | None:
    if message.role != "assistant" or not message.tool_calls:
        return None
    match = _ID.fullmatch(json.loads(message.tool_calls)[0].get("id", ""))
    return bytes.fromhex(match[1]) if match else None
