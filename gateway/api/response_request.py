"""The body of POST /v1/responses: checked here once, and trusted from here on."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from gateway.api.chat_request import MAX_TOOLS, Function, FunctionName, check_tool_choice, make_tools
from gateway.api.items import MAX_ITEMS, InputItem, InputMessage, to_messages
from gateway.api.parsing import Metadata, Strict, check_supported, read_json, validate
from protocol.errors import InvalidRequest
from protocol.messages import ChatMessage, Sampling, Tools

_LARGEST_COUNT = 2**31 - 1
_MAX_SCHEMA_BYTES = 64 * 1024
_ANY_OBJECT = '{"type":"object"}'
_LOGPROBS = "message.output_text.logprobs"
_ID = 64

# Fields that would change the answer and are not supported, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "prompt": (),
    "context_management": ([],),
}


class ConversationRef(Strict):
    id: Annotated[str, Field(max_length=_ID)]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(Strict):
    format: TextFormat | None = None


class FunctionTool(Function):
    """A function as this API has it, flat. Tools of other types are OpenAI's own."""

    type: Literal["function"]


class NamedTool(Strict):
    type: Literal["function"]
    name: FunctionName


class ResponseRequest(Strict):
    """The fields that we act on. None stands for absent everywhere, as in OpenAI's clients."""

    model: str
    input: str | Annotated[list[InputItem], Field(max_length=MAX_ITEMS)] | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=_ID)] | None = None
    conversation: Annotated[str, Field(max_length=_ID)] | ConversationRef | None = None
    store: bool | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    metadata: Metadata | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    # Not OpenAI's:
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationRef) else self.conversation

    @property
    def stored(self) -> bool:
        return self.store is not False

    def new_messages(self) -> tuple[ChatMessage, ...]:
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input or []
        return to_messages(items)

    def preamble(self) -> tuple[ChatMessage, ...]:
        """The instructions, which are this response's alone: the next one brings its own."""
        return (ChatMessage("system", self.instructions),) if self.instructions else ()

    def tool_names(self) -> frozenset[str]:
        """What an answer may call."""
        return frozenset() if self.tool_choice == "none" else frozenset(tool.name for tool in self.tools or ())

    def chat_tools(self) -> Tools | None:
        """None: there are none. Raises InvalidRequest: they are too long."""
        if not self.tools:
            return None
        functions = [Function(**tool.model_dump(exclude={"type"})) for tool in self.tools]
        return make_tools(functions, self._choice, self._named, self.parallel_tool_calls)

    @property
    def _choice(self) -> Literal["none", "auto", "required"] | None:
        return self.tool_choice if isinstance(self.tool_choice, str) else None

    @property
    def _named(self) -> str:
        return self.tool_choice.name if isinstance(self.tool_choice, NamedTool) else ""

    def check_tools(self) -> None:
        """Raises InvalidRequest."""
        check_tool_choice([tool.name for tool in self.tools or ()], self._choice, self._named)
        if self.tool_names() and self.text and self.text.format and self.text.format.type != "text":
            raise InvalidRequest(
                "'text.format' with 'tools' is only supported with 'tool_choice': 'none'", param="text.format"
            )

    def sampling(self) -> Sampling:
        wants_logprobs = self.top_logprobs is not None or _LOGPROBS in (self.include or ())
        return Sampling(
            max_tokens=self.max_output_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            logprobs=(self.top_logprobs or 0) if wants_logprobs else None,
            json_schema=self._json_schema(),
        )

    def _json_schema(self) -> str:
        """The schema as JSON in the client's own order, which is the order of the answer's properties."""
        asked = self.text.format if self.text else None
        if asked is None or asked.type == "text":
            return ""
        if asked.type == "json_object":
            return _ANY_OBJECT
        text = json.dumps(asked.schema_, separators=(",", ":"))
        if len(text) > _MAX_SCHEMA_BYTES:
            raise InvalidRequest(f"the schema is over the limit of {_MAX_SCHEMA_BYTES} bytes", param="text.format")
        return text

    def repeated(self) -> dict[str, Any]:
        """What a response's object repeats of its request."""
        format_ = self.text.format if self.text and self.text.format else TextFormat(type="text")
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "previous_response_id": self.previous_response_id,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": format_.model_dump(by_alias=True, exclude_none=True)},
            "top_logprobs": self.top_logprobs,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": self.truncation or "auto",
            "conversation": self.conversation is not None,
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "tool_choice": self.tool_choice.model_dump() if isinstance(self.tool_choice, NamedTool) else self._choice,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
        }


def parse(body: bytes) -> ResponseRequest:
    """Raises InvalidRequest: what is wrong first, and its field where there is one."""
    raw = read_json(body)
    check_supported(raw, _UNSUPPORTED)
    request = validate(raw, ResponseRequest)
    if request.conversation is not None:
        if request.previous_response_id is not None:
            raise InvalidRequest(
                "'conversation' and 'previous_response_id' exclude each other", param="previous_response_id"
            )
        if not request.stored:
            raise InvalidRequest("what is said in a conversation is stored; leave 'store' out", param="store")
    asked = request.text.format if request.text else None
    if asked is not None and (asked.type == "json_schema") != (asked.schema_ is not None):
        raise InvalidRequest("'text.format.schema' goes with type 'json_schema' and no other", param="text.format")
    request.check_tools()
    return request
