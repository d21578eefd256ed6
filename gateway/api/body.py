"""Reading a request's body, bounded in bytes and time, and noticing that its client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from gateway.api.errors import RequestTimeout, RequestTooLarge
from protocol.errors import Cancelled

T = TypeVar("T")

_DEADLINE_S = 60.0
# A client hears our answer only once it has sent its body; one that is too large by much more is cut off instead.
_DRAINED_TIMES = 8


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Nothing of it is parsed before it is known to be small enough.

    Raises RequestTooLarge: over `limit` bytes, announced or not. RequestTimeout: it does not come. Cancelled: its
    client left.
    """
    body = bytearray()
    seen = 0
    try:
        async with asyncio.timeout(_DEADLINE_S):
            async for piece in request.stream():
                seen += len(piece)
                if seen <= limit:
                    body += piece
                elif seen > _DRAINED_TIMES * limit:
                    break
    except TimeoutError as error:
        raise RequestTimeout(f"the request's body did not arrive in {_DEADLINE_S:g} s") from error
    except ClientDisconnect as error:
        raise Cancelled("the client went away") from error
    if seen > limit:
        raise RequestTooLarge(f"the request's body is over the limit of {limit} bytes")
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end. Raises Cancelled, and cancels it, when the client leaves first.

    receive: of a request whose body was read; the next message from it is the disconnect.
    """
    watching: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(None) as connected:  # ends when the watcher says so
            watching = asyncio.create_task(_watch(receive, connected))
            return await work
    except TimeoutError:
        if connected.expired():
            raise Cancelled("the client went away") from None
        raise
    finally:
        if watching is not None:
            watching.cancel()


async def _watch(receive: Receive, connected: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    connected.reschedule(asyncio.get_running_loop().time())
