"""What the machine is doing: who computes, who waits and where their history lies, how full devices and store are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.dispatch import Dispatcher
from gateway.hints import QueueHints
from gateway.turn import Turn
from gateway.turns import Account, Turns, estimate_tokens
from gateway.workers import Workers
from protocol.errors import CachedAttentionError
from protocol.messages import DescribeTurns, GetStatus, StoreStatus, TurnPlace, TurnsDescribed, WorkingKv

_DEADLINE_S = 1.0
_AGE_S = 0.7  # pages that are open at once share one look
_SHOWN = 32  # waiting turns


@dataclass(frozen=True)
class Waiting:
    """A turn in the queue. dram, ssd: tokens of its history in each tier (a chunk in both counts as dram)."""

    tenant: bytes
    dram: int
    ssd: int
    new: int  # tokens, estimated


@dataclass(frozen=True)
class Picture:
    """store: None while the daemon does not answer. queue: head first, the first few of `waiting`.

    devices: the working KV of each worker that answers, by its name.
    """

    store: StoreStatus | None = None
    running: int = 0
    waiting: int = 0
    queue: tuple[Waiting, ...] = ()
    devices: Mapping[str, WorkingKv] = field(default_factory=dict)


class Machine:
    """Owned by one loop."""

    def __init__(self, turns: Turns, dispatcher: Dispatcher, workers: Workers, daemon: QueueHints) -> None:
        self._turns = turns
        self._dispatcher = dispatcher
        self._workers = workers
        self._daemon = daemon
        self._picture = Picture()
        self._looked_s = 0.0
        self._looking = asyncio.Lock()

    async def look(self) -> Picture:
        """As of now, or of less than a second ago."""
        async with self._looking:
            if time.monotonic() - self._looked_s > _AGE_S:
                self._picture = await self._look()
                self._looked_s = time.monotonic()
        return self._picture

    def recent(self, tenant: bytes) -> list[Account]:
        """The turns of a tenant that ended lately, oldest first."""
        return [account for account in self._turns.recent if account.tenant == tenant]

    async def _look(self) -> Picture:
        at_hand = {turn.id: turn for turn in self._turns}
        waiting = [at_hand[turn_id] for turn_id in self._dispatcher.order if turn_id in at_hand]
        running = sum(turn.is_running for turn in at_hand.values())
        (store, places), devices = await asyncio.gather(self._ask_store(waiting), self._workers.working_kv(_DEADLINE_S))
        return Picture(store, running, len(waiting), _queue(waiting, places), devices)

    async def _ask_store(self, waiting: Sequence[Turn]) -> tuple[StoreStatus | None, dict[bytes, TurnPlace]]:
        """How the store is, and where the histories of the first waiting turns lie, by turn key."""
        try:
            store = await self._daemon.ask(GetStatus(), StoreStatus, _DEADLINE_S)
            keys = [turn.parent_turn_key for turn in waiting[:_SHOWN] if turn.parent_turn_key is not None]
            if not keys:
                return store, {}
            found = await self._daemon.ask(DescribeTurns(tuple(keys)), TurnsDescribed, _DEADLINE_S)
            return store, {place.turn_key: place for place in (TurnPlace(*row) for row in found.turns)}
        except CachedAttentionError:
            return None, {}


def _queue(waiting: Sequence[Turn], places: dict[bytes, TurnPlace]) -> tuple[Waiting, ...]:
    queue = []
    for turn in waiting[:_SHOWN]:
        place = places.get(turn.parent_turn_key or b"")
        dram = place.dram_tokens if place else 0
        ssd = max(0, place.stored_tokens - dram) if place else 0
        new = max(1, estimate_tokens(turn.request.messages) - dram - ssd)
        queue.append(Waiting(turn.request.tenant.id, dram, ssd, new))
    return tuple(queue)
