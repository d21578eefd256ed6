"""Which worker a turn goes to. Pure: no clock, no socket; workers.py acts on what is decided here.

Workers share the store, so any of them continues any conversation. The one that ran the turn before may still hold
its KV on the device; another one loads it from DRAM, which costs little beside the computing power of a busy worker.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

# A turn stays with the holder of its history up to so many times the least load. An idle worker goes before a busy
# holder: loading from DRAM is cheaper than sharing.
_LOYALTY = 1.5
# When a turn ends, its context is on its way to the store; a worker that continues it elsewhere waits so long for it.
_SAVING_S = 1.0
_REMEMBERED = 16_384  # turns; the workers' devices hold far fewer


@dataclass(frozen=True)
class Load:
    """Of one worker, in turns."""

    running: int
    places: int  # 0: it takes none now
    served: int = 0  # so far

    @property
    def share(self) -> float:
        return self.running / self.places


def choose_worker(loads: Sequence[Load], holder: int | None) -> int | None:
    """The worker, by its number, for the next turn. None: no place is free.

    holder: who ran the turn before. Among equals the one that served fewest: held history spreads over all devices.
    """
    free = [worker for worker, load in enumerate(loads) if load.running < load.places]
    if not free:
        return None
    least = min(free, key=lambda worker: (loads[worker].share, loads[worker].served))
    if holder is not None and holder in free and loads[holder].share <= _LOYALTY * loads[least].share:
        return holder
    return least


class Holders:
    """Which worker ended which turn, and when. The oldest are forgotten. Times are monotonic seconds."""

    def __init__(self, limit: int = _REMEMBERED) -> None:
        self._limit = limit
        self._ended: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def note(self, turn_key: bytes, worker: int, now_s: float) -> None:
        self._ended[turn_key] = (worker, now_s)
        self._ended.move_to_end(turn_key)
        while len(self._ended) > self._limit:
            self._ended.popitem(last=False)

    def find(self, turn_key: bytes) -> int | None:
        found = self._ended.get(turn_key)
        return found[0] if found else None

    def save_wait_s(self, turn_key: bytes, worker: int, now_s: float) -> float:
        """How long `worker` should wait for the context of this turn to be saved, if it is not there yet.

        0 where it holds the context itself, and where nobody is saving it any more.
        """
        holder, ended_s = self._ended.get(turn_key, (worker, now_s))
        return 0.0 if holder == worker else max(0.0, ended_s + _SAVING_S - now_s)

    def forget(self, worker: int) -> None:
        """The worker is gone, and its device's memory with it."""
        for turn_key in [key for key, (holder, _) in self._ended.items() if holder == worker]:
            del self._ended[turn_key]
