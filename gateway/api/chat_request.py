"""The body of POST /v1/chat/completions: checked here once, and trusted from here on.

OpenAI's clients send many fields. One that we do not know is ignored; one that asks for another answer than we
would give is refused by name, for a wrong answer is worse than none.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json

from protocol.errors import InvalidRequest
from protocol.ids import canonical_json
from protocol.messages import ChatMessage, Sampling

MAX_MESSAGES = 8192  # every message costs a digest and, at assistant messages, a key to look up
_MAX_STOPS = 4
_LARGEST_COUNT = 2**31 - 1
_ROLES = ("system", "user", "assistant", "tool")

# Fields that would change the answer and are not supported, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


def _join_parts(value: Any) -> Any:
    """A list of text parts as one string; whatever else it is, the field's own type judges."""
    if not isinstance(value, list):
        return value
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError("part", f"part {number} must be an object of type 'text'; no other is supported")
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("part", f"part {number} must have a string 'text'")
    return "".join(part["text"] for part in value)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class RequestMessage(_Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_join_parts)] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class StreamOptions(_Strict):
    include_usage: bool | None = None


class ChatRequest(_Strict):
    """The fields that we act on. None stands for absent everywhere, as in OpenAI's clients."""

    model: str
    messages: Annotated[list[RequestMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None, Field(max_length=_MAX_STOPS), BeforeValidator(_as_list)
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    return_token_ids: bool | None = None

    @property
    def streaming(self) -> bool:
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )

    def chat_messages(self) -> tuple[ChatMessage, ...]:
        return tuple(
            ChatMessage(
                role=message.role,
                content=message.content or "",
                name=message.name or "",
                tool_call_id=message.tool_call_id or "",
                tool_calls=canonical_json(message.tool_calls) if message.tool_calls else "",
            )
            for message in self.messages
        )


def parse(body: bytes) -> ChatRequest:
    """Raises InvalidRequest: what is wrong first, and its field where there is one."""
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:  # malformed, nested too deeply, half a surrogate pair
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidRequest("the body must be a JSON object")
    _refuse_unsupported(raw)
    try:
        request = ChatRequest.model_validate(raw)
    except ValidationError as error:
        raise _explain(error) from error
    _check_combinations(request)
    return request


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    for field, harmless in _UNSUPPORTED.items():
        value = raw.get(field)
        if value is not None and value not in harmless:
            raise InvalidRequest(f"'{field}' is not supported yet", param=field)


def _check_combinations(request: ChatRequest) -> None:
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise InvalidRequest("'max_tokens' and 'max_completion_tokens' disagree; give one", param="max_tokens")
    if request.stream_options is not None and not request.streaming:
        raise InvalidRequest("'stream_options' is only allowed with 'stream': true", param="stream_options")
    for index, message in enumerate(request.messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise InvalidRequest(
                f"a message of role '{message.role}' needs content", param=f"messages[{index}].content"
            )
        if message.role == "tool" and not message.tool_call_id:
            raise InvalidRequest("a tool message needs a 'tool_call_id'", param=f"messages[{index}].tool_call_id")


def _explain(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    if first["type"] == "missing":
        return InvalidRequest(f"'{param}' is required", param=param)
    if re.fullmatch(r"messages\[\d+\]\.role", param):
        return InvalidRequest(f"'{param}' must be one of {', '.join(_ROLES)}", param=param)
    if param == "n":
        return InvalidRequest("'n' must be 1; several answers at once are not supported", param=param)
    return InvalidRequest(f"'{param}': {first['msg']}", param=param)
