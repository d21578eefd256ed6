"""Turns: whose piece of work is next, where only a few may be under way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator

URGENT, BACKGROUND = 0, 1


class Turns:
    """A semaphore that goes to the most urgent waiter, first come first served among equals.

    A waiter passed over for longer than `patience_s` is next whatever it is, so that prefetches and writes go on under
    a stream of reads. One event loop owns it.
    """

    def __init__(self, at_once: int = 1, *, patience_s: float = 0.5) -> None:
        self._patience_s = patience_s
        self._free = at_once
        self._waiting: list[tuple[int, int, float, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def order(self) -> int:
        """A place in the line for a request whose pieces shall not queue behind later requests."""
        return next(self._order)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a turn: who has one should end it with the piece at hand. From any thread."""
        return bool(self._waiting)

    @contextlib.asynccontextmanager
    async def turn(self, urgency: int, order: int | None = None) -> AsyncIterator[None]:
        """Hold one of the turns. order: of the request that this piece belongs to."""
        future = asyncio.get_running_loop().create_future()
        place = next(self._order) if order is None else order
        self._waiting.append((urgency, place, time.monotonic(), future))
        self._choose_soon()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # the turn was ours already
                self._end()
            raise
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        self._free += 1
        self._choose_soon()

    def _choose_soon(self) -> None:
        # Not at once: who ends a piece asks for its next one in the same breath, and must be in the line by then.
        asyncio.get_running_loop().call_soon(self._choose)

    def _choose(self) -> None:
        self._waiting = [entry for entry in self._waiting if not entry[3].done()]
        while self._free and self._waiting:
            chosen = min(self._waiting, key=lambda entry: entry[2])
            if time.monotonic() - chosen[2] <= self._patience_s:
                chosen = min(self._waiting, key=lambda entry: entry[:2])
            self._waiting.remove(chosen)
            self._free -= 1
            chosen[3].set_result(None)
