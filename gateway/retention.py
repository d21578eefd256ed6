"""How long conversations stay: erased on demand with a receipt, deleted when their time is over, kept while pinned."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.hints import QueueHints
from gateway.idempotency import Idempotency
from gateway.journal.conversations import Conversations, NotFound
from gateway.journal.journal import ConversationBusy, JournalUnavailable
from gateway.workers import Workers
from monitoring.gateway_metrics import GatewayMetrics
from monitoring.logs import get_logger
from protocol.errors import CachedAttentionError, InvalidRequest
from protocol.messages import (
    MAX_DESCRIBED,
    Ack,
    Anticipate,
    DescribeTurns,
    Erase,
    ErasureReceipt,
    TurnPlace,
    TurnsDescribed,
)

log = get_logger(__name__)

_SWEEP_S = 15.0
_HINT_S = 1.0
_DESCRIBE_S = 10.0
_ERASE_S = 600.0  # it goes on to its end in the daemon; whoever asks again then is told that nothing is left
_ROUNDS = 4  # a conversation that goes on while it is erased
_PINNED = 1024  # conversations whose KV is asked to be kept, the latest used


@dataclass
class Receipt:
    """What was erased, tier by tier; see messages.ErasureReceipt. left: one sentence for each thing that may remain;
    notes: for what lies outside, where nobody finds it by what we serve."""

    turns: int = 0  # of the journal, with all they said
    turn_keys: list[bytes] = field(default_factory=list)  # whose contexts were erased
    hbm_contexts: int = 0
    hbm_bytes: int = 0
    dram_chunks: int = 0
    dram_bytes: int = 0
    wiped_bytes: int = 0
    deferred_slots: int = 0
    ssd_chunks: int = 0
    ssd_bytes: int = 0
    ssd_manifests: int = 0
    shared_chunks: int = 0
    leases_revoked: int = 0
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, found: ErasureReceipt) -> None:
        self.turn_keys += found.turn_keys
        self.dram_chunks += len(found.dram_chunks)
        self.dram_bytes += found.dram_bytes
        self.wiped_bytes += found.wiped_bytes
        self.deferred_slots = found.deferred_slots
        self.ssd_chunks += len(found.ssd_chunks)
        self.ssd_bytes += found.ssd_bytes
        self.ssd_manifests += found.ssd_manifests
        self.shared_chunks = found.shared_chunks
        self.leases_revoked += found.leases_revoked
        self.left += found.left


class Retention:
    """Owned by one loop. Errors of the daemon are raised as they come."""

    def __init__(
        self,
        conversations: Conversations,
        daemon: QueueHints,
        workers: Workers,
        idempotency: Idempotency,
        metrics: GatewayMetrics,
    ) -> None:
        self._conversations = conversations
        self._daemon = daemon
        self._workers = workers
        self._idempotency = idempotency
        self._metrics = metrics
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)

    def created(self) -> None:
        """Somebody made a conversation without a turn."""
        self._metrics.conversations.inc()

    async def delete(self, tenant: bytes, conversation_id: bytes) -> int:
        """From the journal alone: its KV ages out of the store. Returns how many turns went. Raises NotFound, Busy."""
        turns = await self._conversations.delete(tenant, conversation_id)
        self._metrics.conversations.dec()
        return turns

    async def erase(self, tenant: bytes, conversation_id: bytes) -> Receipt:
        """From the devices, then from the store, whose contexts the journal names, and at last from the journal.

        May be asked for again.

        Raises NotFound; ConversationBusy; PeerError: the daemon is away or not done yet, and the journal still has it.
        """
        receipt, tried = Receipt(), set[bytes]()
        for _ in range(_ROUNDS):
            found, shared = await self._conversations.erasable(tenant, conversation_id)
            keys = [key for key in found if key not in tried]
            if not keys:
                break
            await self._forget(keys, receipt)
            for key in keys:
                if key not in receipt.turn_keys:
                    with contextlib.suppress(InvalidRequest):  # nothing is saved under it
                        receipt.add(await self._daemon.ask(Erase(key, tuple(shared)), ErasureReceipt, _ERASE_S))
            tried.update(keys)
        receipt.turns = await self.delete(tenant, conversation_id)
        self._idempotency.forget(conversation_id)
        try:
            receipt.notes += await self._conversations.vacuum()
        except JournalUnavailable as error:
            receipt.left.append(f"rows that the journal's database has deleted and not vacuumed: {error.message}")
        log.info("conversation erased", conversation=conversation_id.hex(), turns=receipt.turns, left=receipt.left)
        return receipt

    async def _forget(self, keys: Sequence[bytes], receipt: Receipt) -> None:
        """Before the store erases them: what is being saved has to be there for it."""
        found, left = await self._workers.forget(keys)
        receipt.hbm_contexts += sum(one.contexts for one in found)
        receipt.hbm_bytes += sum(one.bytes for one in found)
        receipt.left += [sentence for sentence in left if sentence not in receipt.left]

    async def anticipate(self, tenant: bytes, conversation_id: bytes, in_s: float) -> bool:
        """The next turn is about to come: have its context fetched. False: there is none, or nobody to tell."""
        key = await self._conversations.end_key(tenant, conversation_id)
        if key is None:
            return False
        try:
            await self._daemon.ask(Anticipate(key, in_s, fetch=True), Ack, _HINT_S)
        except CachedAttentionError:
            return False
        return True

    async def describe(self, turn_keys: Sequence[bytes]) -> TurnsDescribed:
        """Where the contexts of these turns lie, of very many the first ones."""
        if not turn_keys:
            return TurnsDescribed((), 0, 0, 0)
        found = await self._daemon.ask(DescribeTurns(tuple(turn_keys[:MAX_DESCRIBED])), TurnsDescribed, _DESCRIBE_S)
        return TurnsDescribed(
            tuple(TurnPlace(*turn) for turn in found.turns), found.dram_bytes, found.ssd_bytes, found.leases
        )

    async def sweep(self, now_s: float) -> int:
        """Erase what is over, and remind the daemon of what is pinned. Returns how many conversations went."""
        erased = 0
        for tenant, conversation_id in await self._conversations.expired(now_s):
            try:
                await self.erase(tenant, conversation_id)
                erased += 1
            except (NotFound, ConversationBusy):
                continue
        for key in await self._conversations.pinned(_PINNED):
            # Not overdue before the next sweep, so that the placement keeps it before others.
            await self._daemon.ask(Anticipate(key, 2 * _SWEEP_S), Ack, _HINT_S)
        return erased

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self.sweep(time.time())
            except CachedAttentionError as error:  # the journal or the daemon is away; the next sweep does it
                log.warning("expired conversations are not erased yet", error=error.message)
            except Exception:
                log.exception("sweeping conversations failed")
