"""The answers to one request, which are several where n > 1 or there are several prompts: as events, as one body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.api.body import while_connected
from gateway.api.errors import JsonResponse, error_body, error_response, to_json
from gateway.idempotency import Idempotency
from gateway.turn import Event, Finished, Listener, Turn, TurnRequest
from gateway.turns import Turns
from protocol.errors import CachedAttentionError
from protocol.messages import TurnDelta

_STALLED_S = 60.0  # a client that takes nothing for so long counts as gone
REJOIN_S = 30.0  # how long a turn with an Idempotency-Key goes on without its client


class Shape(Protocol):
    """Events of turns as an API's objects. Of one request; `index` counts its answers."""

    def whole(self, finished: Sequence[Finished]) -> dict[str, Any]: ...

    def first_chunks(self) -> list[dict[str, Any]]: ...

    def delta_chunks(self, index: int, delta: TurnDelta) -> list[dict[str, Any]]: ...

    def last_chunks(self, index: int, finished: Finished) -> list[dict[str, Any]]: ...

    def usage_chunks(self, finished: Sequence[Finished]) -> list[dict[str, Any]]: ...


class Answers:
    """What one client hears of its turns."""

    def __init__(self, turns: Sequence[Turn], listeners: Sequence[Listener]) -> None:
        self.turns = turns
        self._listeners = listeners

    def leave(self) -> None:
        """The client is gone; see Listener.leave."""
        for listener in self._listeners:
            listener.leave()

    async def finished(self) -> list[Finished]:
        """All answers, in their order. Raises the first error that ended one."""
        found: dict[int, Finished] = {}
        async with aclosing(self.events()) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    found[index] = event
        return [found[index] for index in range(len(found))]

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all turns as they come, until each has its last one. Raises the first error that ends one."""
        if len(self._listeners) == 1:  # no task between a token and its client
            event: Event | None = None
            while not isinstance(event, Finished):
                event = await self._listeners[0].next_event()
                yield 0, event
            return
        merged: asyncio.Queue[tuple[int, Event | CachedAttentionError]] = asyncio.Queue()
        tasks = [asyncio.create_task(_copy(number, one, merged)) for number, one in enumerate(self._listeners)]
        try:
            left = len(tasks)
            while left:
                index, found = await merged.get()
                if isinstance(found, CachedAttentionError):
                    raise found
                left -= isinstance(found, Finished)
                yield index, found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _copy(
    number: int, listener: Listener, merged: asyncio.Queue[tuple[int, Event | CachedAttentionError]]
) -> None:
    try:
        event: Event | None = None
        while not isinstance(event, Finished):
            event = await listener.next_event()
            merged.put_nowait((number, event))
    except CachedAttentionError as error:
        merged.put_nowait((number, error))


def begin(
    turns: Turns, idempotency: Idempotency, key: str | None, content: bytes, requests: Sequence[TurnRequest]
) -> Answers:
    """Start all turns or none, or join those that the same request with the same Idempotency-Key began earlier.

    content: of the request, its route included. Raises as Turns.start and Idempotency.find.
    """
    tenant, arrived_s = requests[0].tenant.id, requests[0].arrived_s
    if key is not None and (earlier := idempotency.find(tenant, key, content, arrived_s)) is not None:
        return Answers(earlier, [turn.listen() for turn in earlier])
    begun: list[Turn] = []
    try:
        for request in requests:
            begun.append(turns.start(request))
    except BaseException:
        for turn in begun:
            turn.cancel()
        raise
    if key is not None:
        idempotency.note(tenant, key, content, begun, arrived_s)
    return Answers(begun, [turn.first_listener for turn in begun])


async def respond(
    request: Request,
    answers: Answers,
    make_shape: Callable[[Sequence[Turn]], Shape],
    streaming: bool,
    stream: type[AnswerStream] | None = None,
) -> Response:
    """The response; a stream's comes as its answers do.

    stream: whose events are written in another form. Raises the first error that ended an answer, unless streaming.
    """
    shape = make_shape(answers.turns)
    if streaming:
        return (stream or AnswerStream)(answers, shape)
    try:
        return JsonResponse(shape.whole(await while_connected(request.receive, answers.finished())))
    except BaseException:
        answers.leave()
        raise


class AnswerStream(Response):
    """Answers as server-sent events, or the error that ended one before any had started."""

    media_type = "text/event-stream"
    end = b"data: [DONE]\n\n"

    def __init__(self, answers: Answers, shape: Shape) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers = answers
        self._events = answers.events()
        self.shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(scope, receive, send))
        except (CachedAttentionError, OSError):  # the client left, or stalled (TimeoutError); there is nobody to tell
            pass
        finally:
            await self._events.aclose()
            self._answers.leave()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(chunks: Sequence[dict[str, Any]], end: bytes = b"", more: bool = True) -> None:
            data = b"".join(self.encode(chunk) for chunk in chunks) + end
            if data:
                async with asyncio.timeout(_STALLED_S):
                    await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await anext(self._events)
        except CachedAttentionError as error:
            await error_response(error)(scope, receive, send)
            return
        # Not before a turn has started does a client see a status: until then it may still be an error.
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await write(self.shape.first_chunks())
        finished: dict[int, Finished] = {}
        try:
            async for index, event in self._events:
                if isinstance(event, TurnDelta):
                    await write(self.shape.delta_chunks(index, event))
                elif isinstance(event, Finished):
                    finished[index] = event
                    if len(finished) < len(self._answers.turns):
                        await write(self.shape.last_chunks(index, event))
                    else:
                        last = self.shape.last_chunks(index, event)
                        usage = self.shape.usage_chunks([finished[n] for n in range(len(finished))])
                        await write([*last, *usage], self.end, more=False)
        except CachedAttentionError as error:
            await write(self.failed_chunks(error), more=False)

    def encode(self, chunk: dict[str, Any]) -> bytes:
        return b"data: " + to_json(chunk) + b"\n\n"

    def failed_chunks(self, error: CachedAttentionError) -> list[dict[str, Any]]:
        return [error_body(error)]
