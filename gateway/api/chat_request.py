"""The body of POST /v1/chat/completions: checked here once, and trusted from here on.

OpenAI's clients send many fields. One that we do not know is ignored; one that asks for another answer than we
would give is refused by name, for a wrong answer is worse than none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import ErrorDetails, PydanticCustomError

from gateway.api import parsing
from gateway.api.parsing import Strict, check_supported, explain, read_json
from gateway.limits import FIRST_PRIORITY, LAST_PRIORITY, Limits
from gateway.tenants import Tenant
from protocol.errors import InvalidRequest
from protocol.ids import canonical_json, digest
from protocol.messages import ChatMessage, Sampling, Tools

R = TypeVar("R", bound=BaseModel)

MAX_MESSAGES = 8192  # every message costs a digest and, at assistant messages, a key to look up
_MAX_STOPS = 4
_MAX_TOP_LOGPROBS = 20
_MAX_BIASES = 1024
_MAX_SCHEMA_BYTES = 64 * 1024
_ANY_OBJECT = '{"type":"object"}'  # the schema of {"type": "json_object"}
_LARGEST_COUNT = 2**31 - 1
MAX_CHOICES = 16
MAX_TOOLS = 128
_LONGEST_NAME = 512
_TIERS = {"priority": -50, "flex": 50}  # service tiers as priorities; lower is earlier
_ROLES = ("system", "user", "assistant", "tool")

# Fields that would change the answer and are not supported, with the values that ask for nothing.
# vLLM's, of chat and of plain completions:
UNSUPPORTED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (0,),
    "truncate_prompt_tokens": (),
}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "functions": ([],),  # what `tools` were before
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    # vLLM's
    **UNSUPPORTED_EVERYWHERE,
    "length_penalty": (1.0,),
    "spaces_between_special_tokens": (True,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
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


def _role(value: Any) -> Any:
    return "system" if value == "developer" else value  # OpenAI's newer name


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# A JSON object's keys are strings. Ten digits are more than any vocabulary needs, and than a message takes.
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


# OpenAI's limits.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class CalledFunction(Strict):
    name: str
    arguments: str


class RequestToolCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class RequestMessage(Strict):
    role: Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(_role)]
    content: Annotated[str | None, BeforeValidator(_join_parts)] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[RequestToolCall] | None = None

    def as_counted(self) -> str:
        """The calls as they count for a turn key, whatever else a client sends with them; empty: there are none."""
        return canonical_json([call.model_dump() for call in self.tool_calls]) if self.tool_calls else ""


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # calls follow the parameters' schema


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Strict):
    include_usage: bool | None = None


class JsonSchema(Strict):
    """OpenAI's. Every schema is followed strictly, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationRequest(Strict):
    """What chats and completions have in common. None stands for absent everywhere, as in OpenAI's clients."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None, Field(max_length=_MAX_STOPS), BeforeValidator(_as_list)
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=_MAX_BIASES)] | None
    ) = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=_LONGEST_NAME)] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    user: str | None = None  # changes no answer; of a good form all the same
    # Not OpenAI's, but vLLM's:
    top_k: Annotated[int, Field(ge=-1, le=_LARGEST_COUNT)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=FIRST_PRIORITY, le=LAST_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)] | None = None

    @property
    def streaming(self) -> bool:
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        return Sampling(
            max_tokens=self.max_tokens or 0,
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
        )

    def affinity(self, tenant: Tenant) -> bytes | None:
        """The name of turns that probably begin alike."""
        key = self.prompt_cache_key
        return digest("cache key", tenant.salt, key.encode("utf-8", "surrogatepass")) if key else None

    def queue_priority(self, limits: Limits) -> int:
        """Raises InvalidRequest: the tenant may not ask for it. A service tier that it may not have is not given."""
        if self.priority is not None:
            if self.priority < limits.priority:
                raise InvalidRequest(
                    f"priority {self.priority} is not for this caller; the first is {limits.priority}", param="priority"
                )
            return self.priority
        wanted = _TIERS.get(self.service_tier or "", limits.usual_priority)
        return wanted if wanted >= limits.priority else limits.usual_priority

    def served_tier(self, priority: int) -> str | None:
        """The service tier that was given, where one was asked for."""
        if self.service_tier is None:
            return None
        return next((tier for tier, given in _TIERS.items() if given == priority), "default")


class ChatRequest(GenerationRequest):
    """The fields that we act on."""

    messages: Annotated[list[RequestMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None  # OpenAI's, of the Responses API
    # They change no answer; of a good form all the same:
    safety_identifier: str | None = None
    store: bool | None = None
    metadata: Metadata | None = None

    def sampling(self) -> Sampling:
        return replace(
            super().sampling(),
            max_tokens=self.max_completion_tokens or self.max_tokens or 0,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self._json_schema(),
        )

    def tool_names(self) -> frozenset[str]:
        """What an answer may call."""
        if not self.tools or self.tool_choice == "none":
            return frozenset()
        return frozenset(tool.function.name for tool in self.tools)

    def chat_tools(self) -> Tools | None:
        """None: there are none. The choice "none" leaves them in the prompt, where the turns around have them, too."""
        if not self.tools:
            return None
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else ""
        choice = self.tool_choice if isinstance(self.tool_choice, str) else None
        return make_tools([tool.function for tool in self.tools], choice, named, self.parallel_tool_calls)

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
                tool_calls=message.as_counted(),
            )
            for message in self.messages
        )


def make_tools(
    functions: Sequence[Function], choice: Literal["none", "auto", "required"] | None, named: str, parallel: bool | None
) -> Tools:
    """named: the function that has to be called; else `choice` tells. Raises InvalidRequest: they are too long."""
    listed = [{"type": "function", "function": function.model_dump(exclude_none=True)} for function in functions]
    text = json.dumps(listed, separators=(",", ":"))
    if len(text) > _MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"the tools are over the limit of {_MAX_SCHEMA_BYTES} bytes", param="tools")
    return Tools(text, "required" if named else choice or "auto", named, parallel is not False)


def check_tool_choice(names: Sequence[str], choice: str | None, named: str) -> None:
    """Raises InvalidRequest."""
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have one name", param="tools")
    if not names and (named or choice not in (None, "none", "auto")):
        raise InvalidRequest("'tool_choice' is only allowed with 'tools'", param="tool_choice")
    if named and named not in names:
        raise InvalidRequest(f"'tool_choice' names {named!r}, which is no tool", param="tool_choice")


def parse(body: bytes) -> ChatRequest:
    """Raises InvalidRequest: what is wrong first, and its field where there is one."""
    request = validate(body, ChatRequest, _UNSUPPORTED)
    _check_combinations(request)
    return request


def validate(body: bytes, model: type[R], unsupported: Mapping[str, tuple[Any, ...]]) -> R:
    """A body as a checked value. unsupported: fields, with the values that ask for nothing. Raises as `parse`."""
    raw = read_json(body)
    check_supported(raw, unsupported)
    return parsing.validate(raw, model, _explain)


def _check_combinations(request: ChatRequest) -> None:
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise InvalidRequest("'max_tokens' and 'max_completion_tokens' disagree; give one", param="max_tokens")
    check_stream_options(request)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("'top_logprobs' is only allowed with 'logprobs': true", param="top_logprobs")
    asked = request.response_format
    if asked is not None and (asked.type == "json_schema") != (asked.json_schema is not None):
        raise InvalidRequest(
            "'response_format.json_schema' goes with type 'json_schema' and no other", param="response_format"
        )
    _check_tools(request)
    for index, message in enumerate(request.messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise InvalidRequest(
                f"a message of role '{message.role}' needs content", param=f"messages[{index}].content"
            )
        if message.role == "tool" and not message.tool_call_id:
            raise InvalidRequest("a tool message needs a 'tool_call_id'", param=f"messages[{index}].tool_call_id")


def check_stream_options(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.streaming:
        raise InvalidRequest("'stream_options' is only allowed with 'stream': true", param="stream_options")


def _check_tools(request: ChatRequest) -> None:
    choice = request.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else ""
    names = [tool.function.name for tool in request.tools or ()]
    check_tool_choice(names, choice if isinstance(choice, str) else None, named)
    is_free = request.response_format is None or request.response_format.type == "text"
    if request.tool_names() and not is_free:
        raise InvalidRequest(
            "'response_format' with 'tools' is only supported with 'tool_choice': 'none'", param="response_format"
        )


def _explain(error: ErrorDetails, param: str) -> InvalidRequest:
    if error["type"] == "missing":
        return explain(error, param)
    if re.fullmatch(r"messages\[\d+\]\.role", param):
        return InvalidRequest(f"'{param}' must be one of {', '.join(_ROLES)}", param=param)
    if param.startswith("logit_bias"):
        return InvalidRequest(
            f"'logit_bias' must be an object of at most {_MAX_BIASES} token ids, each with a number from -100 to 100",
            param="logit_bias",
        )
    if param.startswith("prompt") and not param.startswith("prompt_cache"):
        return InvalidRequest(
            "'prompt' must be a text, token ids, or a list of either, none of them empty", param="prompt"
        )
    if param.startswith("tool_choice"):
        return InvalidRequest(
            "'tool_choice' must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}",
            param="tool_choice",
        )
    return explain(error, param)
