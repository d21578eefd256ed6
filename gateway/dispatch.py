"""Gives the places at inference to turns in the queue's order, and tells the store who waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from gateway.inference_link import InferenceLink
from gateway.queue import TurnQueue
from gateway.queue_policies import estimate_wait_s
from gateway.workers import Workers
from monitoring.gateway_metrics import GatewayMetrics
from protocol.errors import QueueFull

_NEWEST = 0.2  # what the last turn counts for in the mean time that turns hold a place


class Place(NamedTuple):
    """A turn's place at a worker."""

    worker: InferenceLink
    order: int  # lowest first; see TurnQueue.rank
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
        self._affinities: dict[bytes, bytes] = {}
        self._began_s: dict[bytes, float] = {}  # of the running turns
        self._turn_s: float | None = None  # how long turns held their places lately

    def enter(self, turn_id: bytes, tenant: bytes = b"", priority: int = 0) -> None:
        """Take a ticket. Every turn that enters must leave. Raises QueueFull, which says when to come again."""
        try:
            self._queue.enter(turn_id, self._workers.places, tenant, priority)
        except QueueFull as error:
            error.retry_after_s = self.estimate_wait_s()
            raise

    def estimate_wait_s(self) -> float:
        """How long a turn that came now would wait, if turns take as long as lately, or as those that run by now."""
        now = asyncio.get_running_loop().time()
        ages = [now - began for began in self._began_s.values()]
        turn_s = max(self._turn_s or 0.0, sum(ages) / len(ages) if ages else 0.0)
        return estimate_wait_s(self._queue.waiting, self._workers.places, turn_s)

    @property
    def order(self) -> list[bytes]:
        """The waiting turns, head first."""
        return self._queue.order

    def charge(self, turn_id: bytes, answer_tokens: int) -> None:
        """The turn got so many tokens."""
        self._queue.charge(turn_id, answer_tokens)

    def leave(self, turn_id: bytes) -> None:
        self._queue.leave(turn_id)
        self.pump()

    @asynccontextmanager
    async def slot(
        self, turn_id: bytes, parent_turn_key: bytes | None, new_tokens: int = 0, affinity: bytes | None = None
    ) -> AsyncIterator[Place]:
        """Wait for this turn's place at a worker and hold it. The caller sets the deadline.

        new_tokens: of its prompt that nothing is stored for, estimated. affinity: as in Workers.take.
        A turn may come again after it left; it then goes before those that never ran.
        """
        grant: asyncio.Future[InferenceLink] = asyncio.get_running_loop().create_future()
        self._grants[turn_id] = grant
        if parent_turn_key is not None:
            self._parent_keys[turn_id] = parent_turn_key
        if affinity is not None:
            self._affinities[turn_id] = affinity
        self._queue.wait(turn_id, new_tokens)
        try:
            self.pump()
            worker = await grant
            save_wait_s = self._workers.save_wait_s(parent_turn_key, worker)
            yield Place(worker, self._queue.rank(turn_id), save_wait_s)
            self._note_duration(turn_id)
        finally:
            if grant.done() and not grant.cancelled():
                self._workers.give_back(grant.result())
            for known in (self._grants, self._parent_keys, self._affinities, self._began_s):
                known.pop(turn_id, None)
            self._queue.release(turn_id)
            self.pump()  # the place is somebody else's while this turn's end is journaled

    def pump(self) -> None:
        """Dispatch whom there is room for, and tell who still waits."""
        # Turns that a lost worker has not given back yet take no place from the others.
        while (turn_id := self._queue.pop(self._queue.running + self._workers.free_places)) is not None:
            grant = self._grants.pop(turn_id)
            if not grant.done():  # cancelled this moment, and about to leave
                grant.set_result(self._workers.take(self._parent_keys.get(turn_id), self._affinities.get(turn_id)))
                self._began_s[turn_id] = asyncio.get_running_loop().time()
        waiting = self._queue.order
        keys = (self._parent_keys[turn_id] for turn_id in waiting if turn_id in self._parent_keys)
        self._tell_order(tuple(dict.fromkeys(keys)))
        self._metrics.queue_depth.set(len(waiting))
        self._metrics.running_jobs.set(self._queue.running)

    def _note_duration(self, turn_id: bytes) -> None:
        took_s = asyncio.get_running_loop().time() - self._began_s[turn_id]
        self._turn_s = took_s if self._turn_s is None else (1 - _NEWEST) * self._turn_s + _NEWEST * took_s
