"""From other threads to the event loop: many events for one wake, which costs a system call and takes a core away."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Mailbox:
    """Puts events into queues that belong to the event loop, in order. `put` from any thread.

    An urgent event is delivered at once, and so is one that comes `interval_s` after a delivery, with all that came
    before it. None lies here for longer than twice that.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval_s: float) -> None:
        self._loop = loop
        self._interval_s = interval_s
        self._events: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_waking = False
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, queue: asyncio.Queue[Any], event: object, *, urgent: bool) -> None:
        self._events.append((queue, event))
        if not self._is_waking and (urgent or self._loop.time() >= self._due_s):
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First the flags: what is put from here on is either taken below or wakes the loop again.
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_waking = False
        if not self._events:
            return
        while self._events:
            queue, event = self._events.popleft()
            queue.put_nowait(event)
        if self._interval_s:
            # Who puts the next events delivers them, at the end of a step rather than in its middle: it has the
            # processor's attention anyway. The timer is for those that nothing follows.
            self._due_s = self._loop.time() + self._interval_s
            self._timer = self._loop.call_later(2 * self._interval_s, self._deliver)
