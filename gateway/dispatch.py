"""Gives the places at inference to turns in the queue's order, and tells the store who waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from gateway.inference_link import InferenceLink
from gateway.queue import TurnQueue
from gateway.workers import Workers
from monitoring.gateway_metrics import GatewayMetrics


class Place(NamedTuple):
    """A turn's place at a worker."""

    worker: InferenceLink
    order: int  # its ticket: who came earlier has less
    save_wait_s: float  # how long to wait there for the context that the turn continues; see Holders


class Dispatcher:
    """Acts on the decisions of a TurnQueue, which it owns. Owned by one loop.

    workers: who has the places; call `pump` whenever one comes or goes.
    tell_order: takes the parent turn keys of the waiting turns whenever their order changes.
    """

    def __init__(
        self,
        queue: TurnQueue,
        workers: Workers,
        tell_order: Callable[[tuple[bytes, ...]], None],
        metrics: GatewayMetrics,
    ) -> None:
        self._queue = queue
        self._workers = workers
        self._tell_order = tell_order
        self._metrics = metrics
        self._grants: dict[bytes, asyncio.Future[InferenceLink]] = {}  # of the waiting turns
        self._parent_keys: dict[bytes, bytes] = {}

    def enter(self, turn_id: bytes) -> None:
        """Take a place in the order of arrival. Every turn that enters must leave. Raises QueueFull."""
        self._queue.enter(turn_id, self._workers.places)

    def leave(self, turn_id: bytes) -> None:
        self._queue.leave(turn_id)
        self.pump()

    @asynccontextmanager
    async def slot(self, turn_id: bytes, parent_turn_key: bytes | None) -> AsyncIterator[Place]:
        """Wait for this turn's place at a worker and hold it. The caller sets the deadline.

        A turn may come again after it left; it then stands where its arrival puts it.
        """
        grant: asyncio.Future[InferenceLink] = asyncio.get_running_loop().create_future()
        self._grants[turn_id] = grant
        if parent_turn_key is not None:
            self._parent_keys[turn_id] = parent_turn_key
        self._queue.wait(turn_id)
        try:
            self.pump()
            worker = await grant
            save_wait_s = self._workers.save_wait_s(parent_turn_key, worker)
            yield Place(worker, self._queue.ticket(turn_id), save_wait_s)
        finally:
            if grant.done() and not grant.cancelled():
                self._workers.give_back(grant.result())
            self._grants.pop(turn_id, None)
            self._parent_keys.pop(turn_id, None)
            self._queue.release(turn_id)
            self.pump()  # the place is somebody else's while this turn's end is journaled

    def pump(self) -> None:
        """Dispatch whom there is room for, and tell who still waits."""
        # Turns that a lost worker has not given back yet take no place from the others.
        while (turn_id := self._queue.pop(self._queue.running + self._workers.free_places)) is not None:
            grant = self._grants.pop(turn_id)
            if not grant.done():  # cancelled this moment, and about to leave
                grant.set_result(self._workers.take(self._parent_keys.get(turn_id)))
        waiting = self._queue.order
        keys = (self._parent_keys[turn_id] for turn_id in waiting if turn_id in self._parent_keys)
        self._tell_order(tuple(dict.fromkeys(keys)))
        self._metrics.queue_depth.set(len(waiting))
        self._metrics.running_jobs.set(self._queue.running)
