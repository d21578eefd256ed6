"""Prefetch: bring chunks of waiting jobs from SSD into DRAM before they are asked for (the paper's section 3.3.1)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvdaemon.fetch import Fetcher
from kvdaemon.manifests import ManifestStore
from kvdaemon.store import Store

_JOBS = 64  # looked ahead; the slots reach no further anyway
_CHUNKS_AT_ONCE = 4  # small, so that the plan is made anew while the queue changes


class Prefetcher:
    """Follows the latest queue order. One event loop owns it."""

    def __init__(self, store: Store, manifests: ManifestStore, fetcher: Fetcher) -> None:
        self._store = store
        self._manifests = manifests
        self._fetcher = fetcher
        self._order: tuple[bytes, ...] = ()
        self._news = asyncio.Event()

    def follow(self, turn_keys: Sequence[bytes]) -> None:
        """The queue's order changed; forget the one before."""
        self._order = tuple(turn_keys[:_JOBS])
        self._news.set()

    async def run(self) -> None:
        """Fetch what the queue needs, for ever."""
        while True:
            await self._news.wait()
            self._news.clear()
            jobs: list[tuple[bytes, ...]] = []
            for turn_key in self._order:
                reply = await self._manifests.get(turn_key)
                jobs.append(reply.manifest.chunk_ids if reply.manifest is not None else ())
            while not self._news.is_set() and self._store.can_fetch:
                reads = self._store.plan_prefetch(jobs, _CHUNKS_AT_ONCE)
                if not reads or not await self._fetcher.start(reads, background=True):
                    break
