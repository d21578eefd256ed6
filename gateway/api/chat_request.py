"""The body of POST /v1/chat/completions: checked here once, and trusted from here on.

OpenAI's clients send many fields. One that we do not know is ignored; one that asks for another answer than we
would give is refused by name, for a wrong answer is worse than none.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json

from protocol.errors import InvalidRequest
from protocol.ids import canonical_json
from protocol.messages import ChatMessage, Sampling

MAX_MESSAGES = 8192  # every message costs a digest and, at assistant messages, a key to look up
_MAX_STOPS = 4
_MAX_TOP_LOGPROBS = 20
_MAX_BIASES = 1024
_MAX_SCHEMA_BYTES = 64 * 1024
_ANY_OBJECT = '{"type":"object"}'  # the schema of {"type": "json_object"}
_LARGEST_COUNT = 2**31 - 1
_ROLES = ("system", "user", "assistant", "tool")

# Fields that would change the answer and are not supported, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
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


# A JSON object's keys are strings. Ten digits are more than any vocabulary needs, and than a message takes.
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


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


class JsonSchema(_Strict):
    """OpenAI's. Every schema is followed strictly, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


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
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=_MAX_BIASES)] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    # Not OpenAI's, but vLLM's:
    top_k: Annotated[int, Field(ge=-1, le=_LARGEST_COUNT)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
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
            top_k=max(0, self.top_k or 0),  # -1 is vLLM's "all", 0 ours and transformers'
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self._json_schema(),
        )

    def _json_schema(self) -> str:
        """The schema as JSON in the client's own order, which is the order of the answer's properties."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return ""
        if asked.json_schema is None:
            return _ANY_OBJECT
        text = json.dumps(asked.json_schema.schema_, separators=(",", ":"))
        if len(text) > _MAX_SCHEMA_BYTES:
            raise InvalidRequest(f"the schema is over the limit of {_MAX_SCHEMA_BYTES} bytes", param="response_format")
        return text

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
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("'top_logprobs' is only allowed with 'logprobs': true", param="top_logprobs")
    asked = request.response_format
    if asked is not None and (asked.type == "json_schema") != (asked.json_schema is not None):
        raise InvalidRequest(
            "'response_format.json_schema' goes with type 'json_schema' and no other", param="response_format"
        )
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
    if param.startswith("logit_bias"):
        return InvalidRequest(
            f"'logit_bias' must be an object of at most {_MAX_BIASES} token ids, each with a number from -100 to 100",
            param="logit_bias",
        )
    if param == "n":
        return InvalidRequest("'n' must be 1; several answers at once are not supported", param=param)
    return InvalidRequest(f"'{param}': {first['msg']}", param=param)
