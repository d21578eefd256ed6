"""The connection to kvdaemon. Hints tell whose KV is needed next; best effort: a daemon that is away or slow costs us
nothing. Other requests are those of somebody who waits for their answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from monitoring.logs import get_logger
from protocol.errors import CachedAttentionError
from protocol.messages import Ack, QueueOrder, Welcome
from protocol.rpc import Ask, Curve, RpcClient

log = get_logger(__name__)
M = TypeVar("M")

_DEADLINE_S = 1.0


class QueueHints:
    """Tells the daemon the order of the waiting turns. Owned by one loop.

    Changes that come while one is being told are told once, as the newest order. on_change: called whenever the
    daemon comes or goes.
    """

    def __init__(self, endpoint: str, curve: Curve | None, on_change: Callable[[], None]) -> None:
        self._client = RpcClient(
            endpoint, "gateway", curve=curve, on_connected=self._connected, on_disconnected=on_change
        )
        self._on_change = on_change
        self._order: tuple[bytes, ...] = ()
        self._told: tuple[bytes, ...] = ()
        self._changed = asyncio.Event()
        self._teller: asyncio.Task[None] | None = None

    @property
    def is_connected(self) -> bool:
        return self._client.is_connected

    async def start(self) -> None:
        await self._client.start()
        self._teller = asyncio.create_task(self._tell())

    async def stop(self) -> None:
        if self._teller is not None:
            self._teller.cancel()
            await asyncio.gather(self._teller, return_exceptions=True)
        await self._client.stop()

    def tell(self, turn_keys: tuple[bytes, ...]) -> None:
        """The parent turn keys of the waiting turns, head first. Returns at once."""
        self._order = turn_keys
        if turn_keys != self._told:
            self._changed.set()

    async def ask(self, message: Any, expect: type[M], timeout_s: float) -> M:
        """One request of another kind. Raises as RpcClient.request does."""
        return await self._client.request(message, expect, timeout_s)

    async def _tell(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not self._client.is_connected:
                continue  # told when it is back
            self._told = self._order
            with contextlib.suppress(CachedAttentionError):  # a hint; the next change brings the next one
                await self._client.request(QueueOrder(self._told), Ack, _DEADLINE_S)

    async def _connected(self, welcome: Welcome, ask: Ask) -> None:
        self._told = self._order
        await ask(QueueOrder(self._told), Ack, _DEADLINE_S)
        asyncio.get_running_loop().call_soon(self._on_change)  # after the client counts as connected
