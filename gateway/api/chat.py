"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.api.answers import REJOIN_S, begin, respond
from gateway.api.body import read_body
from gateway.api.chat_request import ChatRequest, parse
from gateway.api.completion import ChatShape, CompletionOptions
from gateway.api.openapi import json_answer, json_body
from gateway.idempotency import Idempotency
from gateway.journal.journal import Journal
from gateway.recognize import as_written, calling_turns
from gateway.tenants import Tenant, Tenants
from gateway.turn import Turn, TurnRequest
from gateway.turns import Turns
from gateway.workers import Workers
from protocol.errors import InvalidRequest, ModelNotFound
from protocol.messages import ChatMessage, ModelInfo

DEFAULT_MODEL = "default"  # stands for whatever is served


def chat_router(
    turns: Turns, workers: Workers, tenants: Tenants, journal: Journal, idempotency: Idempotency, max_body_bytes: int
) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        tags=["Chat"],
        openapi_extra=json_body(ChatRequest, stream="OpenAI's chunks, and [DONE]"),
        responses=json_answer(dict[str, Any]),
    )
    async def create_chat_completion(request: Request) -> Response:
        arrived_s = time.monotonic()
        tenant = tenants.identify(request.headers.get("authorization"))
        body = await read_body(request, max_body_bytes)
        asked = parse(body)
        model = workers.model
        check_model(asked.model, model.model)
        check_tools(asked.tools, model)
        tenant = tenant.with_cache_salt(asked.cache_salt or "")
        key = request.headers.get("idempotency-key")
        messages = await with_calls_as_written(journal, tenant, asked.chat_messages(), model)
        priority = asked.queue_priority(tenant.limits)
        one = TurnRequest(
            tenant=tenant,
            messages=messages,
            sampling=asked.sampling(),
            streaming=asked.streaming,
            arrived_s=arrived_s,
            return_prompt_tokens=bool(asked.return_token_ids),
            priority=priority,
            affinity=asked.affinity(tenant),
            tools=asked.chat_tools(),
            keep=asked.prompt_cache_retention == "24h",
            truncation=asked.truncation or "auto",
            rejoin_s=0.0 if key is None else REJOIN_S,
        )
        answers = begin(turns, idempotency, key, b"chat" + body, several(one, asked.n or 1))

        def shape(begun: Sequence[Turn]) -> ChatShape:
            options = CompletionOptions(
                f"chatcmpl-{begun[0].id.hex()}",
                begun[0].created_s,
                begun[0].model.model,
                begun[0].model.namespace,
                token_ids=bool(asked.return_token_ids),
                logprobs=bool(asked.logprobs),
                stream_usage=asked.include_usage,
                service_tier=asked.served_tier(priority),
            )
            return ChatShape(options, begun, asked.tool_names())

        return await respond(request, answers, shape, asked.streaming)

    return router


def several(request: TurnRequest, n: int) -> list[TurnRequest]:
    """n of the same. A seed is counted up, so that the answers differ and each can be had again."""
    seed = request.sampling.seed
    if n == 1 or seed is None:
        return [request] * n
    wrapped = [(seed + number + 2**63) % 2**64 - 2**63 for number in range(n)]
    return [replace(request, sampling=replace(request.sampling, seed=other)) for other in wrapped]


def check_tools(asked: Sequence[Any] | None, model: ModelInfo) -> None:
    """Raises InvalidRequest: the model knows none."""
    if asked and not model.tool_format:
        raise InvalidRequest("this model's chat template knows no tools", param="tools")


async def with_calls_as_written(
    journal: Journal, tenant: Tenant, messages: tuple[ChatMessage, ...], model: ModelInfo
) -> tuple[ChatMessage, ...]:
    """Calls of earlier turns in the model's own words, where the journal has them."""
    if callers := calling_turns(messages):
        return as_written(messages, await journal.answers(tenant.id, callers), model.tool_format)
    return messages


def check_model(asked: str, served: str) -> None:
    """Raises ModelNotFound."""
    if asked not in (served, DEFAULT_MODEL):
        raise ModelNotFound(f"the model {asked!r} does not exist here; served is {served!r}", param="model")
