"""How much KV each tenant has in the store, asked of it now and then, for the limits of those that have one."""

from __future__ import annotations

import asyncio
import contextlib

from gateway.hints import QueueHints
from gateway.limits import Meters
from protocol.errors import CachedAttentionError
from protocol.messages import MeasureNamespaces, NamespacesMeasured

_EVERY_S = 5.0
_DEADLINE_S = 5.0


class Quotas:
    """Owned by one loop. Best effort: while the daemon is away, what it said last counts."""

    def __init__(self, daemon: QueueHints, meters: Meters) -> None:
        self._daemon = daemon
        self._meters = meters
        self._measuring: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._measuring = asyncio.create_task(self._measure())

    async def stop(self) -> None:
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.gather(self._measuring, return_exceptions=True)

    async def measure(self) -> None:
        """Ask once. Raises as QueueHints.ask."""
        meters = [meter for _, meter in self._meters if meter.limits.stored_bytes is not None and meter.namespaces]
        for meter in meters:
            asked = MeasureNamespaces(tuple(meter.namespaces))
            meter.stored_bytes = sum((await self._daemon.ask(asked, NamespacesMeasured, _DEADLINE_S)).bytes)

    async def _measure(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            if self._daemon.is_connected:
                with contextlib.suppress(CachedAttentionError):
                    await self.measure()
