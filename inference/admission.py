"""Who gets working KV: running jobs before new ones, new ones in the gateway's order, retained contexts last."""

from __future__ import annotations

import asyncio
import itertools
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from inference.working_kv import OutOfKv

T = TypeVar("T")


@dataclass(order=True)
class _Waiting:
    order: int
    arrival: int
    may_try: asyncio.Event = field(compare=False, default_factory=asyncio.Event)


class Admission:
    """Lets turns take working KV one after another. A large one is not overtaken for ever by small ones.

    Owned by the event loop. `wake` is to be called whenever memory may have come free.
    """

    def __init__(self, reclaim: Callable[[], bool], is_closed: Callable[[], bool]) -> None:
        """reclaim: lets go of a retained context; False: there is none. is_closed: running jobs lack memory."""
        self._reclaim = reclaim
        self._is_closed = is_closed
        self._waiting: list[_Waiting] = []
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        """Turns that wait."""
        return len(self._waiting)

    async def enter(self, order: int, take: Callable[[], T]) -> T:
        """What `take` returns as soon as it finds memory. Lowest order first; of equals, who came first.

        take: takes the memory that a turn needs, or raises OutOfKv. It may be called several times.
        There is no deadline here: the caller's ends it.
        """
        place = _Waiting(order, next(self._arrivals))
        insort(self._waiting, place)
        try:
            while True:
                if self._waiting[0] is place and not self._is_closed():
                    try:
                        return take()
                    except OutOfKv:
                        if self._reclaim():
                            continue
                await place.may_try.wait()
                place.may_try.clear()
        finally:
            self._waiting.remove(place)
            self.wake()

    def wake(self) -> None:
        if self._waiting:
            self._waiting[0].may_try.set()
