"""/v1/responses: turns whose history the server keeps."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from gateway.api.answers import REJOIN_S, AnswerStream, begin, respond
from gateway.api.body import read_body
from gateway.api.chat import check_model, check_tools, with_calls_as_written
from gateway.api.errors import JsonResponse, to_json
from gateway.api.items import Item, input_items, output_items, page
from gateway.api.lists import Listed
from gateway.api.openapi import json_answer, json_body
from gateway.api.response import DeletedResponse, ResponseShape, of_journal
from gateway.api.response import Response as ResponseObject
from gateway.api.response_request import ResponseRequest, parse
from gateway.idempotency import Idempotency
from gateway.journal.conversations import Conversations, History, NotFound
from gateway.journal.journal import Journal
from gateway.journal.tables import Turn as JournaledTurn
from gateway.tenants import Tenant, Tenants
from gateway.turn import Turn, TurnRequest
from gateway.turns import Turns
from gateway.workers import Workers
from protocol.errors import CachedAttentionError, InvalidRequest
from protocol.ids import ID_BYTES
from protocol.messages import ChatMessage

Order = Literal["asc", "desc"]
Limit = Annotated[int, Query(ge=1, le=100)]


def responses_router(
    turns: Turns,
    workers: Workers,
    tenants: Tenants,
    journal: Journal,
    conversations: Conversations,
    idempotency: Idempotency,
    max_body_bytes: int,
) -> APIRouter:
    router = APIRouter(prefix="/v1/responses", tags=["Responses"])

    @router.post(
        "",
        openapi_extra=json_body(ResponseRequest, stream="OpenAI's events, from response.created to the last one"),
        responses=json_answer(ResponseObject),
    )
    async def create_response(request: Request) -> Response:
        arrived_s = time.monotonic()
        tenant = tenants.identify(request.headers.get("authorization"))
        body = await read_body(request, max_body_bytes)
        asked = parse(body)
        model = workers.model
        check_model(asked.model, model.model)
        check_tools(asked.tools, model)
        tenant = tenant.with_cache_salt(asked.cache_salt or "")
        key = request.headers.get("idempotency-key")
        repeated = asked.repeated() | {"model": model.model, "tool_format": model.tool_format if asked.tools else ""}
        new = await with_calls_as_written(journal, tenant, asked.new_messages(), model)
        one = await _turn_request(conversations, tenant, asked, new, repeated, arrived_s)
        one = replace(one, rejoin_s=0.0 if key is None else REJOIN_S)
        answers = begin(turns, idempotency, key, b"responses" + body, [one])

        def shape(begun: Sequence[Turn]) -> ResponseShape:
            return ResponseShape(begun[0], repeated, asked.stored, one.sampling.logprobs is not None)

        return await respond(request, answers, shape, bool(asked.stream), ResponseStream)

    @router.get("/{response_id}", responses=json_answer(ResponseObject))
    async def retrieve_response(request: Request, response_id: str) -> Response:
        tenant = tenants.identify(request.headers.get("authorization"))
        found = await conversations.turn(tenant.id, parse_id("resp", response_id))
        return JsonResponse(of_journal(found, workers.model.model))

    @router.delete("/{response_id}", responses=json_answer(DeletedResponse))
    async def delete_response(request: Request, response_id: str) -> Response:
        tenant = tenants.identify(request.headers.get("authorization"))
        await conversations.delete_turn(tenant.id, parse_id("resp", response_id))
        return JsonResponse(DeletedResponse(id=response_id, object="response", deleted=True))

    @router.get("/{response_id}/input_items", responses=json_answer(Listed[Item]))
    async def list_input_items(
        request: Request, response_id: str, limit: Limit = 20, after: str | None = None, order: Order = "desc"
    ) -> Response:
        """What was said to the model up to this response, earlier turns included; not its instructions."""
        tenant = tenants.identify(request.headers.get("authorization"))
        path = await conversations.path_to(tenant.id, parse_id("resp", response_id))
        return JsonResponse(page(_said(path), limit, after, order))

    return router


def parse_id(prefix: str, text: str) -> bytes:
    """The id of a turn or conversation. Raises NotFound: nothing has such an id."""
    match = re.fullmatch(rf"{prefix}_([0-9a-f]{{{2 * ID_BYTES}}})", text)
    if match is None:
        raise NotFound(f"there is no {text[:100]!r}; an id begins with '{prefix}_'")
    return bytes.fromhex(match[1])


def _said(path: Sequence[JournaledTurn]) -> list[Item]:
    """All items before the last turn's answer."""
    earlier = [item for turn in path[:-1] for item in (*input_items(turn), *output_items(turn))]
    return [*earlier, *input_items(path[-1])]


async def _turn_request(
    conversations: Conversations,
    tenant: Tenant,
    asked: ResponseRequest,
    new: tuple[ChatMessage, ...],
    repeated: dict[str, Any],
    arrived_s: float,
) -> TurnRequest:
    """Raises NotFound, InvalidRequest: nothing is said."""
    preamble = asked.preamble()
    history: History | None = None
    if asked.conversation_id is not None:
        history = await conversations.history(tenant.id, parse_id("conv", asked.conversation_id))
    elif asked.previous_response_id is not None:
        history = await conversations.history_to(tenant.id, parse_id("resp", asked.previous_response_id))
    messages = (*preamble, *(history.messages if history else ()), *new)
    if len(messages) == len(preamble) and not preamble:
        raise InvalidRequest("'input' is required where there is nothing to go on with", param="input")
    return TurnRequest(
        tenant=tenant,
        messages=messages,
        sampling=asked.sampling(),
        streaming=bool(asked.stream),
        arrived_s=arrived_s,
        place=history.place(new, is_end=asked.conversation_id is not None) if history else None,
        stored=asked.stored,
        response=repeated if asked.stored else None,
        preamble=len(preamble),
        priority=tenant.limits.usual_priority,
        truncation=asked.truncation or "auto",
        tools=asked.chat_tools(),
        keep=asked.prompt_cache_retention == "24h",
    )


class ResponseStream(AnswerStream):
    """The events of OpenAI's Responses API, which have names, and of which the last one is the end."""

    end = b""

    def encode(self, chunk: dict[str, Any]) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (chunk["type"].encode(), to_json(chunk))

    def failed_chunks(self, error: CachedAttentionError) -> list[dict[str, Any]]:
        assert isinstance(self.shape, ResponseShape)
        return self.shape.failed_chunks(error)
