"""OpenAI's response object and the events of its stream, made of a turn's events or its journal entry. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from gateway.api.completion import account, account_of
from gateway.api.items import Item, Status, answer_item, answer_items, call_item, output_items, parser_of
from gateway.journal.tables import Turn as JournaledTurn
from gateway.recognize import tool_call_id
from gateway.tool_calls import Piece, ToolCall
from gateway.turn import Finished
from gateway.turn import Turn as LiveTurn
from protocol.errors import CachedAttentionError, CallerError, CapacityError
from protocol.messages import SampledLogprobs, TokenLogprob, TurnDelta, TurnUsage


class ConversationId(TypedDict):
    id: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class Response(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: ConversationId | None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[Any]
    top_logprobs: NotRequired[int | None]
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: dict[str, Any] | None
    cachedattention: ConversationRef


class ConversationRef(TypedDict):
    """The conversation that the response is in, named by the client or not."""

    conversation: str


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: bool


def response_id(turn_id: bytes) -> str:
    return f"resp_{turn_id.hex()}"


def conversation_name(conversation_id: bytes) -> str:
    return f"conv_{conversation_id.hex()}"


def of_journal(turn: JournaledTurn, model: str) -> Response:
    """Of any turn that was journaled, by whatever API it came. model: where it does not say."""
    repeated = turn.response or {}
    model = repeated.get("model", model)
    status: Any = {"pending": "in_progress", "done": "completed"}.get(turn.status, turn.status)
    if status == "completed" and turn.finish_reason == "length":
        status = "incomplete"
    usage = None
    if turn.usage:
        found = TurnUsage(**turn.usage)
        usage = usage_of(found, account(found, turn.ttft_s, turn.prefill_s))
    error: ResponseError | None = None
    if turn.status == "failed":
        error = {"code": "server_error", "message": turn.error or ""}
    return _response(
        turn.id,
        int(turn.created_at_s),
        model,
        repeated,
        turn.conversation_id,
        status,
        output=output_items(turn),
        usage=usage,
        error=error,
        completed_at=int(turn.finished_at_s) if turn.finished_at_s and status == "completed" else None,
    )


def usage_of(found: TurnUsage, account: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's usage and ours, which is completion.account's."""
    cached = found.hbm + found.dram + found.ssd
    return {
        "input_tokens": found.prompt_tokens,
        # What was computed goes to the store, too.
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": found.prompt_tokens - cached},
        "output_tokens": found.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found.prompt_tokens + found.completion_tokens,
        "cachedattention": account,
    }


def _response(
    turn_id: bytes,
    created_s: int,
    model: str,
    repeated: Mapping[str, Any],
    conversation_id: bytes,
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"],
    *,
    output: Sequence[Item] = (),
    usage: dict[str, Any] | None = None,
    error: ResponseError | None = None,
    completed_at: int | None = None,
    store: bool = True,
) -> Response:
    conversation = conversation_name(conversation_id)
    return {
        "id": response_id(turn_id),
        "object": "response",
        "created_at": created_s,
        "completed_at": completed_at,
        "status": status,
        "background": False,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": repeated.get("instructions"),
        "max_output_tokens": repeated.get("max_output_tokens"),
        "metadata": repeated.get("metadata") or {},
        "model": model,
        "output": list(output),
        "parallel_tool_calls": repeated.get("parallel_tool_calls", True),
        "previous_response_id": repeated.get("previous_response_id"),
        "conversation": {"id": conversation} if repeated.get("conversation") else None,
        "store": store,
        "temperature": repeated.get("temperature", 1.0),
        "text": repeated.get("text") or {"format": {"type": "text"}},
        "tool_choice": repeated.get("tool_choice") or "auto",
        "tools": repeated.get("tools") or [],
        "top_logprobs": repeated.get("top_logprobs"),
        "top_p": repeated.get("top_p", 1.0),
        "truncation": repeated.get("truncation", "auto"),
        "usage": usage,
        "cachedattention": {"conversation": conversation},
    }


class ResponseShape:
    """The objects of one answer that is being made. Events are numbered from 0, in the order they are asked for."""

    def __init__(self, turn: LiveTurn, repeated: Mapping[str, Any], stored: bool, logprobs: bool) -> None:
        self._turn = turn
        self._repeated = repeated
        self._stored = stored
        self._logprobs = logprobs
        self._parser = parser_of(repeated)
        # Of the stream: items that are told whole, the one that is being told, and log probabilities without text.
        self._items: list[Item] = []
        self._text: str | None = None
        self._shown: list[Any] = []
        self._held: list[Any] = []
        self._calls = 0
        self._next = 0

    # -- objects ----------------------------------------------------------------------------------------------

    def whole(self, finished: Sequence[Finished]) -> dict[str, Any]:
        (answer,) = finished
        pieces = [*self._parser.feed(answer.done.text), *self._parser.finish()]
        turn, found = self._turn, self._tokens(answer.logprobs)
        output = answer_items(turn.id, turn.new_messages, pieces, _status(answer), found)
        return dict(self._whole(answer, output))

    def _whole(self, finished: Finished, output: Sequence[Item]) -> Response:
        done, status = finished.done, _status(finished)
        return self._object(
            status,
            output=output,
            usage=usage_of(done.usage, account_of(finished)),
            completed_at=finished.ended_s if status == "completed" else None,
        )

    def _object(self, status: Any, **fields: Any) -> Response:
        turn = self._turn
        return _response(
            turn.id,
            turn.created_s,
            turn.model.model,
            self._repeated,
            turn.conversation_id,
            status,
            store=self._stored,
            **fields,
        )

    # -- events -----------------------------------------------------------------------------------------------

    def first_chunks(self) -> list[dict[str, Any]]:
        started = self._object("in_progress")
        return [
            self._event("response.created", response=started),
            self._event("response.in_progress", response=started),
        ]

    def delta_chunks(self, index: int, delta: TurnDelta) -> list[dict[str, Any]]:
        """What this client sees of the delta: mostly one event, or none."""
        self._held += self._tokens(delta.logprobs)
        return self._pieces(self._parser.feed(delta.text))

    def last_chunks(self, index: int, finished: Finished) -> list[dict[str, Any]]:
        self._held += self._tokens(finished.tail.logprobs)
        events = self._pieces([*self._parser.feed(finished.tail.text), *self._parser.finish()])
        if not self._items or (self._text is not None and self._held):
            events += self._speak("")
        events += self._end_text(_status(finished))
        whole = self._whole(finished, self._items)
        return [*events, self._event(f"response.{whole['status']}", response=whole)]

    def _pieces(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for piece in pieces:
            events += self._speak(piece) if isinstance(piece, str) else [*self._end_text(), *self._call(piece)]
        return events

    def _speak(self, text: str) -> list[dict[str, Any]]:
        events = []
        if self._text is None:
            self._text = ""
            events = [
                self._item_event("response.output_item.added", item=self._answer(None, "in_progress")),
                self._event("response.content_part.added", **self._where(), part=_part("")),
            ]
        logprobs, self._held = self._held, []
        self._text += text
        self._shown += logprobs
        if text or logprobs:
            events.append(self._event("response.output_text.delta", **self._where(), delta=text, logprobs=logprobs))
        return events

    def _end_text(self, status: Status = "completed") -> list[dict[str, Any]]:
        """Nothing where no text is being told."""
        if self._text is None:
            return []
        text, logprobs, item = self._text, self._shown, self._answer(self._text, status, self._shown)
        events = [
            self._event("response.output_text.done", **self._where(), text=text, logprobs=logprobs),
            self._event("response.content_part.done", **self._where(), part=_part(text, logprobs)),
            self._item_event("response.output_item.done", item=item),
        ]
        self._items.append(item)
        self._text, self._shown = None, []
        return events

    def _call(self, call: ToolCall) -> list[dict[str, Any]]:
        """A call is known when it is whole."""
        turn, number = self._turn, self._calls
        self._calls += 1
        self._held = []  # no text goes with them
        named = (turn.id, turn.new_messages, number, tool_call_id(turn.id, number), call.name)
        item = call_item(*named, call.arguments)
        about = {"item_id": item["id"]}
        kind = "response.function_call_arguments"
        events = [
            self._item_event("response.output_item.added", item=call_item(*named, "", "in_progress")),
            self._item_event(f"{kind}.delta", **about, delta=call.arguments),
            self._item_event(f"{kind}.done", **about, name=call.name, arguments=call.arguments),
            self._item_event("response.output_item.done", item=item),
        ]
        self._items.append(item)
        return events

    def _answer(self, text: str | None, status: Status, logprobs: Sequence[Any] = ()) -> Item:
        return answer_item(self._turn.id, self._turn.new_messages, text, status, logprobs, self._calls)

    def usage_chunks(self, finished: Sequence[Finished]) -> list[dict[str, Any]]:
        return []  # it is in the last event

    def failed_chunks(self, error: CachedAttentionError) -> list[dict[str, Any]]:
        told = [] if self._text is None else [self._answer(self._text, "incomplete", self._shown)]
        failed = self._object("failed", output=[*self._items, *told], error=_error(error))
        return [self._event("response.failed", response=failed)]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._next = self._next, self._next + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _item_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Of the item that comes after those that are told."""
        return self._event(kind, output_index=len(self._items), **fields)

    def _where(self) -> dict[str, Any]:
        return {
            "item_id": self._answer(None, "in_progress")["id"],
            "output_index": len(self._items),
            "content_index": 0,
        }

    def _tokens(self, entries: Sequence[SampledLogprobs]) -> list[dict[str, Any]]:
        if not self._logprobs:
            return []
        return [_token(entry.sampled) | {"top_logprobs": [_token(other) for other in entry.top]} for entry in entries]


def _status(finished: Finished) -> Literal["completed", "incomplete"]:
    return "incomplete" if finished.done.finish_reason == "length" else "completed"


def _part(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _token(entry: TokenLogprob) -> dict[str, Any]:
    return {
        "token": entry.bytes.decode("utf-8", "replace") or entry.name,
        "logprob": entry.logprob,
        "bytes": list(entry.bytes),
    }


def _error(error: CachedAttentionError) -> ResponseError:
    """OpenAI's codes tell less than ours, which go before the message."""
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"] = "server_error"
    if isinstance(error, CallerError):
        code = "invalid_prompt"
    elif isinstance(error, CapacityError):
        code = "rate_limit_exceeded"
    return {"code": code, "message": f"{error.code}: {error.message}"}
