"""Orders that look back only, and the paper's, which adds the queue to the latter."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from kvdaemon.placement.policy import IsCurrent, Order, Rank, TurnEnd
from kvdaemon.placement.runs import Run

_SMALL = 1024  # entries; larger heaps are cleaned when half of them are void


class HeapOrder:
    """Runs by a number that each has when it is pushed, smallest first."""

    def __init__(self, is_current: IsCurrent, rank: Callable[[Run], float]) -> None:
        self._is_current = is_current
        self._rank = rank
        self._heap: list[tuple[float, int, int, Run]] = []
        self._clean_at = _SMALL

    def push(self, run: Run, stamp: int, now_s: float) -> None:
        heapq.heappush(self._heap, (self._rank(run), run.serial, stamp, run))
        if len(self._heap) > self._clean_at:
            self._heap = [entry for entry in self._heap if self._is_current(entry[3], entry[2])]
            heapq.heapify(self._heap)
            self._clean_at = max(_SMALL, 2 * len(self._heap))

    def worst(self, now_s: float) -> Run | None:
        heap = self._heap
        while heap:
            _, _, stamp, run = heap[0]
            if self._is_current(run, stamp):
                return run
            heapq.heappop(heap)
        return None


class FirstInFirstOut:
    """The conversation that came first goes first, however recently it was used."""

    looks_ahead = False

    def new_order(self, is_current: IsCurrent) -> Order:
        return HeapOrder(is_current, lambda run: run.entered_s)

    def turn_ended(self, end: TurnEnd, now_s: float) -> Rank:
        return Rank()

    def turn_returned(self, profile: object, now_s: float, *, partial_hit: bool | None) -> None:
        pass

    def turn_forked(self, profile: object, now_s: float) -> Rank:
        return Rank()


class LeastRecentlyUsed(FirstInFirstOut):
    """The conversation that was used longest ago goes first."""

    def new_order(self, is_current: IsCurrent) -> Order:
        return HeapOrder(is_current, lambda run: run.used_s)


class SchedulerAware(LeastRecentlyUsed):
    """The paper's policy (section 3.3): waiting turns keep what they need; where the paper is silent, LRU."""

    looks_ahead = True
