"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.api.body import read_body, while_connected
from gateway.api.chat_request import ChatRequest, parse
from gateway.api.completion import CompletionShape
from gateway.api.errors import JsonResponse, error_body, to_json
from gateway.tenants import Tenants
from gateway.turn import Finished, Turn, TurnRequest
from gateway.turns import Turns
from gateway.workers import Workers
from protocol.errors import CachedAttentionError, ModelNotFound
from protocol.messages import TurnDelta

_STALLED_S = 60.0  # a client that takes nothing for so long counts as gone
DEFAULT_MODEL = "default"  # stands for whatever is served


def chat_router(turns: Turns, workers: Workers, tenants: Tenants, max_body_bytes: int) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        arrived_s = time.monotonic()
        tenant = tenants.identify(request.headers.get("authorization"))
        asked = parse(await read_body(request, max_body_bytes))
        check_model(asked.model, workers.model.model)
        turn = turns.start(
            TurnRequest(
                tenant=tenant,
                messages=asked.chat_messages(),
                sampling=asked.sampling(),
                streaming=asked.streaming,
                arrived_s=arrived_s,
                return_prompt_tokens=bool(asked.return_token_ids),
            )
        )
        shape = _shape(turn, asked)
        try:
            if asked.streaming:
                # Not before the turn has started does a client see a status: until then it may still be an error.
                await while_connected(request.receive, turn.next_event())
                return EventStream(turn, shape)
            finished = await while_connected(request.receive, _finished(turn))
        except BaseException:
            turn.cancel()
            raise
        return JsonResponse(shape.completion(finished))

    return router


def check_model(asked: str, served: str) -> None:
    """Raises ModelNotFound."""
    if asked not in (served, DEFAULT_MODEL):
        raise ModelNotFound(f"the model {asked!r} does not exist here; served is {served!r}", param="model")


class EventStream(Response):
    """A turn that has started, as server-sent events. Cancels the turn when its client leaves."""

    media_type = "text/event-stream"

    def __init__(self, turn: Turn, shape: CompletionShape) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._turn = turn
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except (CachedAttentionError, OSError):  # the client left, or stalled (TimeoutError); there is nobody to tell
            pass
        finally:
            self._turn.cancel()

    async def _send(self, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(_STALLED_S):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await write(_event(self._shape.first_chunk()))
        try:
            while True:
                event = await self._turn.next_event()
                if isinstance(event, TurnDelta):
                    for chunk in self._shape.delta_chunks(event):
                        await write(_event(chunk))
                elif isinstance(event, Finished):
                    for chunk in self._shape.last_chunks(event):
                        await write(_event(chunk))
                    await write(b"data: [DONE]\n\n", more=False)
                    return
        except CachedAttentionError as error:
            await write(_event(error_body(error)), more=False)


async def _finished(turn: Turn) -> Finished:
    while not isinstance(event := await turn.next_event(), Finished):
        pass
    return event


def _shape(turn: Turn, asked: ChatRequest) -> CompletionShape:
    return CompletionShape(
        turn.id,
        turn.created_s,
        turn.model.model,
        turn.model.namespace,
        token_ids=bool(asked.return_token_ids),
        logprobs=bool(asked.logprobs),
        stream_usage=asked.include_usage,
    )


def _event(content: Any) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"
