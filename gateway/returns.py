"""What clients say about their conversations' future, told to the store: prompt_cache_key and prompt_cache_retention.

Turns of one prompt_cache_key come in a rhythm of their own, which is learned: when one ends, the store hears when the
next one is due. What is to be kept for a day is expected at any time until then. Both are hints: where there is no room
for all that is expected, the store lets go of what it expects last.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from gateway.hints import QueueHints
from protocol.errors import CachedAttentionError
from protocol.messages import Ack, Anticipate

KEPT_S = 24 * 3600.0
_REMIND_S = 15.0
_DEADLINE_S = 1.0
_SAVING_S = 1.0  # the end of a turn is on its way to the store
_MOST_KEPT = 1024
_MOST_RHYTHMS = 16_384
_NEWEST = 0.3  # what the last gap counts for


@dataclass
class Rhythms:
    """Seconds between the arrivals of what has one name. The names not used for the longest time are forgotten."""

    limit: int = _MOST_RHYTHMS
    _known: OrderedDict[bytes, tuple[float, float | None]] = field(default_factory=OrderedDict)

    def arrived(self, name: bytes, now_s: float) -> None:
        last_s, gap_s = self._known.pop(name, (None, None))
        if last_s is not None:
            newest_s = now_s - last_s
            gap_s = newest_s if gap_s is None else (1 - _NEWEST) * gap_s + _NEWEST * newest_s
        self._known[name] = (now_s, gap_s)
        if len(self._known) > self.limit:
            self._known.popitem(last=False)

    def due_in_s(self, name: bytes, now_s: float) -> float | None:
        """When the next one should come; None: too few came."""
        last_s, gap_s = self._known.get(name, (now_s, None))
        return None if gap_s is None else max(0.0, last_s + gap_s - now_s)


class Returns:
    """Owned by one loop. Best effort: a daemon that is away or slow costs nothing."""

    def __init__(self, daemon: QueueHints) -> None:
        self._daemon = daemon
        self._rhythms = Rhythms()
        self._kept: OrderedDict[bytes, float] = OrderedDict()  # turn key -> until
        self._tasks: set[asyncio.Task[None]] = set()
        self._reminding: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._reminding = asyncio.create_task(self._remind())

    async def stop(self) -> None:
        tasks = {*self._tasks, *([self._reminding] if self._reminding else [])}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def arrived(self, affinity: bytes) -> None:
        self._rhythms.arrived(affinity, time.monotonic())

    def ended(self, parent_key: bytes | None, turn_key: bytes, affinity: bytes | None, keep: bool) -> None:
        """A turn ended well. keep: its context, for a day from now, or until the conversation goes on."""
        now_s = time.monotonic()
        if parent_key is not None:
            self._kept.pop(parent_key, None)
        if keep:
            self._kept[turn_key] = now_s + KEPT_S
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        due_s = None if affinity is None else self._rhythms.due_in_s(affinity, now_s)
        if due_s is not None or keep:
            self._spawn(turn_key, 2 * _REMIND_S if due_s is None else due_s)

    def _spawn(self, turn_key: bytes, in_s: float) -> None:
        async def tell() -> None:
            await asyncio.sleep(_SAVING_S)
            await self._tell(turn_key, in_s - _SAVING_S)

        task = asyncio.create_task(tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, turn_key: bytes, in_s: float) -> None:
        with contextlib.suppress(CachedAttentionError):
            await self._daemon.ask(Anticipate(turn_key, max(0.0, in_s)), Ack, _DEADLINE_S)

    async def _remind(self) -> None:
        while True:
            await asyncio.sleep(_REMIND_S)
            now_s = time.monotonic()
            while self._kept and next(iter(self._kept.values())) < now_s:
                self._kept.popitem(last=False)
            for turn_key in list(self._kept):
                if self._daemon.is_connected:
                    # Not overdue before the next reminder, so that the placement keeps it before others.
                    await self._tell(turn_key, 2 * _REMIND_S)
