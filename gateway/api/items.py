"""Items of /v1/responses and /v1/conversations: what was said, as OpenAI's objects, and back.

An item's id is `msg_`, `fc_` or `fco_`, the id of its turn, and its place there; so nobody has to keep ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic's, before Python 3.12
)

from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from gateway.api.lists import Listed, listed
from gateway.api.parsing import Strict
from gateway.journal.tables import Turn
from gateway.recognize import tool_call_id
from gateway.tool_calls import Piece, ToolCall, ToolCallParser
from protocol.errors import InvalidRequest
from protocol.ids import ID_BYTES, canonical_json
from protocol.messages import ChatMessage

MAX_ITEMS = 8192

# -- in ----------------------------------------------------------------------------------------------------------


class TextPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart]


class FunctionCall(Strict):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class FunctionCallOutput(Strict):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: str | list[TextPart]


class Reasoning(Strict):
    """What a model thought to itself. It is left out, as chat templates do with earlier turns."""

    type: Literal["reasoning"]


def _kind(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="must be a message, function_call, function_call_output or reasoning item",
    ),
]


def to_messages(items: Sequence[InputItem]) -> tuple[ChatMessage, ...]:
    """What the chat template sees: calls of functions belong to the assistant's message before them."""
    said: list[ChatMessage] = []
    calls: list[dict[str, Any]] = []

    def call(item: FunctionCall) -> None:
        text = ""
        if said and said[-1].role == "assistant":
            text = said.pop().content
        calls.append(
            {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments},
            }
        )
        said.append(ChatMessage("assistant", text, tool_calls=canonical_json(calls)))

    for item in items:
        if isinstance(item, FunctionCall):
            call(item)
            continue
        calls = []
        if isinstance(item, InputMessage):
            said.append(ChatMessage("system" if item.role == "developer" else item.role, _text(item.content)))
        elif isinstance(item, FunctionCallOutput):
            said.append(ChatMessage("tool", _text(item.output), tool_call_id=item.call_id))
    return tuple(said)


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# -- out ---------------------------------------------------------------------------------------------------------

Status = Literal["in_progress", "completed", "incomplete"]


class ContentPart(TypedDict):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: NotRequired[list[Any]]  # of output_text, as what follows
    logprobs: NotRequired[list[Any]]


class Item(TypedDict):
    """One of several kinds, by `type`: which fields are there depends on it."""

    id: str
    type: Literal["message", "function_call", "function_call_output"]
    status: Status
    role: NotRequired[Literal["user", "assistant", "system"]]
    content: NotRequired[list[ContentPart]]
    call_id: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]
    output: NotRequired[str]


def item_id(prefix: str, turn_id: bytes, index: int, call: int | None = None) -> str:
    return f"{prefix}_{turn_id.hex()}_{index:04x}" + ("" if call is None else f"_{call:02x}")


def parse_item_id(text: str) -> tuple[bytes, int]:
    """The turn and the message of it. Raises InvalidRequest."""
    match = re.fullmatch(rf"(?:msg|fc|fco)_([0-9a-f]{{{2 * ID_BYTES}}})_([0-9a-f]{{4,8}})(?:_[0-9a-f]{{2,4}})?", text)
    if match is None:
        raise InvalidRequest(f"{text[:100]!r} is no item's id", param="item_id")
    return bytes.fromhex(match[1]), int(match[2], 16)


def message_items(turn_id: bytes, index: int, message: ChatMessage) -> list[Item]:
    """A message as items: one for its text, and one for each function that it calls."""
    if message.role == "tool":
        return [
            {
                "id": item_id("fco", turn_id, index),
                "type": "function_call_output",
                "status": "completed",
                "call_id": message.tool_call_id,
                "output": message.content,
            }
        ]
    items: list[Item] = []
    calls = json.loads(message.tool_calls) if message.tool_calls else []
    if message.role == "assistant":
        if message.content or not calls:
            items.append(answer_item(turn_id, index, message.content))
    else:
        items.append(
            {
                "id": item_id("msg", turn_id, index),
                "type": "message",
                "status": "completed",
                "role": message.role,
                "content": [{"type": "input_text", "text": message.content}],
            }
        )
    for number, call in enumerate(calls):
        function = call.get("function") or {}
        name, arguments = str(function.get("name", "")), str(function.get("arguments", ""))
        items.append(call_item(turn_id, index, number, str(call.get("id", "")), name, arguments))
    return items


def call_item(
    turn_id: bytes, index: int, number: int, call_id: str, name: str, arguments: str, status: Status = "completed"
) -> Item:
    return {
        "id": item_id("fc", turn_id, index, number),
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def answer_items(
    turn_id: bytes, index: int, pieces: Sequence[Piece], status: Status = "completed", logprobs: Sequence[Any] = ()
) -> list[Item]:
    """What the model said: its text, and each call of a function, in their order."""
    items: list[Item] = []
    number = 0
    for is_text, some in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_text:
            items.append(answer_item(turn_id, index, "".join(map(str, some)), status, logprobs, number))
            logprobs = ()
            continue
        for call in some:
            assert isinstance(call, ToolCall)
            items.append(call_item(turn_id, index, number, tool_call_id(turn_id, number), call.name, call.arguments))
            number += 1
    return items or [answer_item(turn_id, index, "", status, logprobs)]


def answer_item(
    turn_id: bytes,
    index: int,
    text: str | None,
    status: Status = "completed",
    logprobs: Sequence[Any] = (),
    calls: int = 0,
) -> Item:
    """text None: nothing of it is there yet. calls: so many go before it."""
    content: list[ContentPart] = []
    if text is not None:
        content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}]
    return {
        "id": item_id("msg", turn_id, index, calls or None),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def input_items(turn: Turn) -> list[Item]:
    """What a turn's client said."""
    return [
        item
        for index, message in enumerate(turn.messages)
        if message is not None
        for item in message_items(turn.id, index, ChatMessage(**message))
    ]


def output_items(turn: Turn) -> list[Item]:
    """What the model said; nothing where it was not asked, or where that was deleted."""
    if turn.answer is None or (turn.status != "done" and not turn.answer):
        return []
    is_whole = turn.status == "done" and turn.finish_reason != "length"
    parser = parser_of(turn.response or {})
    pieces = [*parser.feed(turn.answer), *parser.finish()]
    return answer_items(turn.id, len(turn.messages), pieces, "completed" if is_whole else "incomplete")


def parser_of(repeated: Mapping[str, Any]) -> ToolCallParser:
    """What finds the calls in the answer to a request of which a response repeats this."""
    callable_ = [] if repeated.get("tool_choice") == "none" else repeated.get("tools") or []
    names = {tool["name"] for tool in callable_}
    return ToolCallParser(repeated.get("tool_format", "") if names else "", names)


def page(items: Sequence[Item], limit: int, after: str | None, order: Literal["asc", "desc"]) -> Listed[Item]:
    """items: oldest first. Raises InvalidRequest: `after` is none of them."""
    rest = list(items if order == "asc" else reversed(items))
    if after is not None:
        ids = [item["id"] for item in rest]
        if after not in ids:
            raise InvalidRequest(f"there is no item {after[:100]!r} here", param="after")
        rest = rest[ids.index(after) + 1 :]
    return listed(rest[:limit], has_more=len(rest) > limit)
