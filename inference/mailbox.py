"""From other threads to the event loop: many events for one wake, which costs a system call."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Mailbox:
    """Puts events into queues that belong to the event loop, in order. `put` from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_waking = False

    def put(self, queue: asyncio.Queue[Any], event: object) -> None:
        self._events.append((queue, event))
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First the flag: what is put from here on is either taken below or wakes the loop again.
        self._is_waking = False
        while self._events:
            queue, event = self._events.popleft()
            queue.put_nowait(event)
