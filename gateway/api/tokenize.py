"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from typing_extensions import TypedDict

from gateway.api.body import read_body
from gateway.api.chat import check_model
from gateway.api.chat_request import MAX_MESSAGES, ChatRequest, RequestMessage, Tool, validate
from gateway.api.completion import token_list
from gateway.api.errors import JsonResponse
from gateway.api.openapi import json_answer, json_body
from gateway.api.parsing import Strict
from gateway.tenants import Tenants
from gateway.workers import Workers
from protocol.errors import InvalidRequest
from protocol.ids import pack_tokens
from protocol.messages import Detokenize, Detokenized, Tokenize, Tokenized

_MOST_TOKENS = 4 * 1024 * 1024  # 16 MiB, half of a message

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[RequestMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True  # to a prompt
    add_generation_prompt: bool = True  # to messages
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(max_length=_MOST_TOKENS)]


class TokenizedText(TypedDict):
    """token_strs: as the tokenizer writes each, where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedTokens(TypedDict):
    prompt: str


def tokenize_router(workers: Workers, tenants: Tenants, max_body_bytes: int) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/tokenize",
        tags=["Tokens"],
        openapi_extra=json_body(TokenizeRequest),
        responses=json_answer(TokenizedText),
    )
    async def tokenize(request: Request) -> JsonResponse:
        """A prompt, or messages as the chat template renders them; one of both."""
        tenants.identify(request.headers.get("authorization"))
        asked = validate(await read_body(request, max_body_bytes), TokenizeRequest, _UNSUPPORTED)
        model = workers.model
        check_model(asked.model or model.model, model.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise InvalidRequest("give either 'prompt' or 'messages'", param="prompt")
        chat = ChatRequest(model=model.model, messages=asked.messages, tools=asked.tools) if asked.messages else None
        tools = chat.chat_tools() if chat is not None else None
        found = await workers.ask(
            Tokenize(
                text=asked.prompt or "",
                messages=chat.chat_messages() if chat is not None else (),
                tools=tools.functions if tools is not None else "",
                add_special_tokens=asked.add_special_tokens,
                add_generation_prompt=asked.add_generation_prompt,
                want_strings=bool(asked.return_token_strs),
            ),
            Tokenized,
        )
        tokens = token_list(found.tokens)
        return JsonResponse(
            TokenizedText(
                count=len(tokens),
                max_model_len=model.max_context,
                tokens=tokens,
                token_strs=list(found.strings) if asked.return_token_strs else None,
            )
        )

    @router.post(
        "/detokenize",
        tags=["Tokens"],
        openapi_extra=json_body(DetokenizeRequest),
        responses=json_answer(DetokenizedTokens),
    )
    async def detokenize(request: Request) -> JsonResponse:
        tenants.identify(request.headers.get("authorization"))
        asked = validate(await read_body(request, max_body_bytes), DetokenizeRequest, {})
        check_model(asked.model or workers.model.model, workers.model.model)
        found = await workers.ask(Detokenize(pack_tokens(asked.tokens)), Detokenized)
        return JsonResponse(DetokenizedTokens(prompt=found.text))

    return router
