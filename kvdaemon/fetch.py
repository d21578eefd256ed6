"""Fetches: reads from SSD into slots, each followed to its end whoever asked for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from kvdaemon.failpoints import reach
from kvdaemon.ssd.client import SsdLink
from kvdaemon.store import Store
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.logs import get_logger
from protocol.errors import CachedAttentionError, PeerUnavailable
from protocol.messages import SsdReadChunk

log = get_logger(__name__)


class Fetcher:
    """One event loop owns it. A fetch ends by the worker's answer or its death, and tells the store which."""

    def __init__(self, store: Store, ssd: SsdLink | None, metrics: KvDaemonMetrics) -> None:
        self._store = store
        self._ssd = ssd
        self._metrics = metrics
        self._running: set[asyncio.Task[bool]] = set()

    def start(self, reads: Sequence[SsdReadChunk], *, background: bool = False) -> asyncio.Task[bool]:
        """Begin to read. Does not wait. The task returned never fails; it tells whether the worker answered."""
        task = asyncio.ensure_future(self._fetch(reads, background))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def drain(self) -> None:
        """Wait until nothing is being fetched. Bounded by the reads' own deadline."""
        while self._running:
            await asyncio.wait(self._running)

    async def _fetch(self, reads: Sequence[SsdReadChunk], background: bool) -> bool:
        started = time.monotonic()
        try:
            if self._ssd is None:
                raise PeerUnavailable("there is no SSD tier")
            if background:
                reach("prefetch.before")
            outcomes = await self._ssd.read(reads, background=background)
            if background:
                reach("prefetch.after")
        except CachedAttentionError as error:
            log.warning("a fetch from SSD failed", chunks=len(reads), reason=error.message)
            for read in reads:
                self._store.fetch_failed(read)
            return False
        for read, outcome in zip(reads, outcomes, strict=True):
            if outcome != "ok":
                log.warning("a chunk on SSD cannot be used", chunk=read.chunk_id.hex(), outcome=outcome)
            self._store.fetched(read, outcome)
        self._metrics.loaded_from_ssd(time.monotonic() - started)
        return True
