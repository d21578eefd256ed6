"""Prefetch: bring chunks of waiting turns from SSD into DRAM before they are asked for (the paper's section 3.3.1)."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence

from kvdaemon.fetch import Fetcher
from kvdaemon.manifests import ManifestStore
from kvdaemon.store import Store

_JOBS = 1024  # waiting turns that are looked at; the windows of most stores reach less far
_CHUNKS_AT_ONCE = 4  # small, so that the plan is made anew while the queue changes
_START_S = 5.0  # a turn that left the queue has asked for its context by then, or never will

_ANTICIPATED = 256  # contexts that are fetched for people who are typing
_ANTICIPATED_S = 15.0  # who does not come for so long after they were expected did not mean it
_BEHIND = 1 << 62  # tickets of anticipated turns: behind all that wait

_Job = tuple[bytes, int]  # turn key, and which of the waiting turns with that key


class Prefetcher:
    """Follows the latest queue order. One event loop owns it."""

    def __init__(
        self, store: Store, manifests: ManifestStore, fetcher: Fetcher, chunks_at_once: int = _CHUNKS_AT_ONCE
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._fetcher = fetcher
        self._chunks_at_once = chunks_at_once
        self._order: tuple[bytes, ...] = ()
        self._tickets: dict[_Job, int] = {}  # of waiting turns, in order
        self._starting: dict[int, tuple[bytes, ...]] = {}  # out of the queue, and not here yet: ticket -> context
        self._came: set[_Job] = set()  # still in the queue, as far as we were told, and running
        self._next_ticket = itertools.count()
        self._anticipated: dict[bytes, tuple[int, tuple[bytes, ...]]] = {}  # turn key -> ticket, context
        self._later_ticket = itertools.count(_BEHIND)
        self._news = asyncio.Event()
        self._is_planning = False

    @property
    def is_busy(self) -> bool:
        """Whether something is being fetched, or may be in a moment."""
        return self._news.is_set() or self._is_planning

    def follow(self, turn_keys: Sequence[bytes]) -> None:
        """The queue's order changed; forget the one before."""
        self._order = tuple(turn_keys[:_JOBS])
        self._news.set()

    def anticipate(self, turn_key: bytes, context: Sequence[bytes], in_s: float) -> None:
        """Somebody is about to go on after this turn: its context is fetched as if it waited, behind all that do."""
        self._no_longer(turn_key)
        if len(self._anticipated) >= _ANTICIPATED or not context:
            return
        ticket = next(self._later_ticket)
        self._store.placement.wait(ticket, context)
        self._anticipated[turn_key] = (ticket, tuple(context))
        asyncio.get_running_loop().call_later(max(0.0, in_s) + _ANTICIPATED_S, self._no_longer, turn_key, ticket)
        self._news.set()

    def _no_longer(self, turn_key: bytes, ticket: int | None = None) -> None:
        """ticket: only if it is this one; somebody may have been anticipated again."""
        found = self._anticipated.get(turn_key)
        if found is not None and ticket in (None, found[0]):
            del self._anticipated[turn_key]
            self._store.placement.go(found[0])

    def started(self, chunk_ids: Sequence[bytes]) -> None:
        """A turn asks for its context: until now it was kept as that of a waiting turn."""
        asked = set(chunk_ids)
        placement = self._store.placement
        for turn_key, (_, chain) in list(self._anticipated.items()):
            if asked.issuperset(chain):
                self._no_longer(turn_key)
        for ticket, chain in self._starting.items():
            if asked.issuperset(chain):
                self._forget(ticket)
                return
        for job, ticket in self._tickets.items():  # the queue's next order may come later than the turn
            chain = placement.context_of(ticket)
            if chain and asked.issuperset(chain):
                placement.go(self._tickets.pop(job))
                self._came.add(job)
                return

    def look(self) -> None:
        """There may be room for something that there was none for."""
        if self._tickets or self._anticipated:
            self._news.set()

    async def run(self) -> None:
        """Fetch what the queue needs, for ever."""
        while True:
            self._is_planning = False
            await self._news.wait()
            self._is_planning = True
            self._news.clear()
            await self._tell_placement(self._order)
            while not self._news.is_set() and self._store.can_fetch:
                reads = self._store.plan_prefetch(self._chunks_at_once)
                if not reads or not await self._fetcher.start(reads, background=True):
                    break

    def _forget(self, ticket: int) -> None:
        if self._starting.pop(ticket, None) is not None:
            self._store.placement.go(ticket)

    async def _tell_placement(self, order: Sequence[bytes]) -> None:
        """Tell which turns wait no longer, and which wait since."""
        placement = self._store.placement
        seen: Counter[bytes] = Counter()
        jobs: list[_Job] = []
        for turn_key in order:
            jobs.append((turn_key, seen[turn_key]))
            seen[turn_key] += 1
        self._came.intersection_update(jobs)
        jobs = [job for job in jobs if job not in self._came]
        waiting = set(jobs)
        stay = [job for job in self._tickets if job in waiting]
        # Turns join the queue at its end. One that was put before another has to take its place anew.
        if jobs[: len(stay)] != stay:
            stay = []
        for job in [job for job in self._tickets if job not in set(stay)]:
            ticket = self._tickets.pop(job)
            context = placement.context_of(ticket)
            if job in waiting or not context:
                placement.go(ticket)
            else:  # what was fetched for it is not given to those behind it before it has come
                self._starting[ticket] = context
                asyncio.get_running_loop().call_later(_START_S, self._forget, ticket)
        for job in jobs[len(stay) :]:
            reply = await self._manifests.get(job[0])
            ticket = self._tickets[job] = next(self._next_ticket)
            context = reply.manifest.chunk_ids if reply.manifest is not None else ()
            self._store.wait(ticket, context)
