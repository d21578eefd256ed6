"""POST /v1/completions: prompts as they are, without a chat template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from gateway.api.answers import REJOIN_S, begin, respond
from gateway.api.body import read_body
from gateway.api.chat import check_model, several
from gateway.api.chat_request import (
    MAX_CHOICES,
    UNSUPPORTED_EVERYWHERE,
    GenerationRequest,
    check_stream_options,
    validate,
)
from gateway.api.completion import CompletionOptions
from gateway.api.openapi import json_answer, json_body
from gateway.api.text_completion import TextShape
from gateway.idempotency import Idempotency
from gateway.tenants import Tenants
from gateway.turn import Turn, TurnRequest
from gateway.turns import Turns
from gateway.workers import Workers
from protocol.errors import InvalidRequest
from protocol.ids import pack_tokens
from protocol.messages import ChatMessage, Detokenize, Detokenized, Prompt, Sampling

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_LOGPROBS = 5
_MAX_TOKEN_ID = 2**32 - 1

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    **UNSUPPORTED_EVERYWHERE,
    "add_special_tokens": (True,),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
}

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None

    def sampling(self) -> Sampling:
        return replace(super().sampling(), max_tokens=self.max_tokens or _DEFAULT_MAX_TOKENS, logprobs=self.logprobs)

    def prompts(self) -> list[Prompt]:
        """Those of token ids without their text."""
        one: Any = self.prompt
        given = [one] if isinstance(one, str) or isinstance(one[0], int) else one
        return [Prompt(prompt) if isinstance(prompt, str) else Prompt("", pack_tokens(prompt)) for prompt in given]


def parse(body: bytes) -> CompletionRequest:
    """Raises InvalidRequest: what is wrong first, and its field where there is one."""
    request = validate(body, CompletionRequest, _UNSUPPORTED)
    check_stream_options(request)
    if request.echo and request.logprobs is not None:
        raise InvalidRequest("'logprobs' of a prompt are not supported; leave 'echo' out", param="echo")
    if len(request.prompts()) * (request.n or 1) > MAX_CHOICES:
        raise InvalidRequest(f"'n' times the prompts are more than {MAX_CHOICES} answers", param="n")
    return request


def completions_router(
    turns: Turns, workers: Workers, tenants: Tenants, idempotency: Idempotency, max_body_bytes: int
) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/completions",
        tags=["Chat"],
        openapi_extra=json_body(CompletionRequest, stream="OpenAI's chunks, and [DONE]"),
        responses=json_answer(dict[str, Any]),
    )
    async def create_completion(request: Request) -> Response:
        arrived_s = time.monotonic()
        tenant = tenants.identify(request.headers.get("authorization"))
        body = await read_body(request, max_body_bytes)
        asked = parse(body)
        check_model(asked.model, workers.model.model)
        tenant = tenant.with_cache_salt(asked.cache_salt or "")
        key = request.headers.get("idempotency-key")
        priority = asked.queue_priority(tenant.limits)
        prompts = [await _with_text(workers, prompt) for prompt in asked.prompts()]
        each = asked.n or 1
        requests: list[TurnRequest] = []
        for prompt in prompts:
            one = TurnRequest(
                tenant=tenant,
                messages=(ChatMessage("user", prompt.text),),
                sampling=asked.sampling(),
                streaming=asked.streaming,
                arrived_s=arrived_s,
                return_prompt_tokens=bool(asked.return_token_ids),
                priority=priority,
                affinity=asked.affinity(tenant),
                prompt=prompt,
                truncation="disabled",  # nobody could say which part of a raw prompt is the beginning that stays
                keep=asked.prompt_cache_retention == "24h",
                rejoin_s=0.0 if key is None else REJOIN_S,
            )
            requests += several(one, each)
        answers = begin(turns, idempotency, key, b"completion" + body, requests)

        def shape(begun: Sequence[Turn]) -> TextShape:
            options = CompletionOptions(
                f"cmpl-{begun[0].id.hex()}",
                begun[0].created_s,
                begun[0].model.model,
                begun[0].model.namespace,
                token_ids=bool(asked.return_token_ids),
                logprobs=asked.logprobs is not None,
                stream_usage=asked.include_usage,
                service_tier=asked.served_tier(priority),
            )
            echoes = [prompt.text if asked.echo else "" for prompt in prompts for _ in range(each)]
            return TextShape(options, echoes, len(prompts))

        return await respond(request, answers, shape, asked.streaming)

    return router


async def _with_text(workers: Workers, prompt: Prompt) -> Prompt:
    """The journal wants the text of token ids, too."""
    if not prompt.tokens:
        return prompt
    return replace(prompt, text=(await workers.ask(Detokenize(prompt.tokens), Detokenized)).text)
