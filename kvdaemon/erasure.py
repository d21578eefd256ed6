"""Erasure: a turn's context and KV removed from every tier, and a receipt of what was removed.

What goes: the turn, the turns that continue it (they contain it), the earlier turns that nothing else continues, and
all their chunks that no other saved context needs; also chunks that continue an erased one and belong to no context,
which a cancelled turn leaves. Memory in no use is overwritten too, for evicted chunks may have lain there.

    plan       read all contexts: who is related to the turn, which chunks others need
    DRAM       the chunks leave the books, leases on them end, their slots are overwritten with zeros
    unused     so are free slots, and what partial chunks leave unused of theirs
    SSD        chunks are deleted, where they lay destroyed, and what held records compacted; manifests last, so that an
               erasure that broke off can be asked for again

Nothing that is under way brings anything back: manifests are withheld meanwhile; a chunk that is being fetched or
written behind is waited for; a turn that continues the erased one and is saved meanwhile is erased in another round. A
turn that is saved after the end of it all is a new turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvdaemon.catalog import Catalog
from kvdaemon.conversations import Relation, common_tokens, relation
from kvdaemon.dram import DramTier
from kvdaemon.index import Chunk
from kvdaemon.manifests import ManifestStore
from kvdaemon.ssd.client import SsdLink
from kvdaemon.store import Store
from monitoring.logs import get_logger
from protocol.arena import Arena, SlotState
from protocol.errors import CachedAttentionError, InvalidRequest, PeerError, PeerUnavailable
from protocol.ids import unpack_tokens
from protocol.lineage import lineage_of
from protocol.messages import ErasureReceipt, Manifest, ManifestEntry

log = get_logger(__name__)

_ROUNDS = 4  # a conversation that goes on while it is erased
_BUSY_S = 75.0  # longer than a fetch or a write to SSD may take
_POLL_S = 0.02
_SETTLE_S = 0.5
_WIPE_AT_ONCE_BYTES = 64 * 1024 * 1024
_CHUNKS_AT_ONCE = 10_000  # looked at before others have a turn on the event loop


@dataclass
class _Plan:
    """turn_keys: contexts to erase. doomed: chunks that they alone need. shared: chunks that others need too."""

    turn_keys: set[bytes]
    doomed: set[bytes]
    shared: int


@dataclass
class _Progress:
    """A receipt being written."""

    turn_keys: list[bytes] = field(default_factory=list)
    dram_chunks: list[bytes] = field(default_factory=list)
    dram_bytes: int = 0
    wiped_bytes: int = 0
    ssd_chunks: list[bytes] = field(default_factory=list)
    ssd_bytes: int = 0
    ssd_manifests: int = 0
    physical_before: int | None = None
    physical_after: int = 0
    shared_chunks: int = 0
    leases_revoked: int = 0
    deferred_slots: int = 0
    left: list[str] = field(default_factory=list)

    def receipt(self) -> ErasureReceipt:
        return ErasureReceipt(
            tuple(self.turn_keys),
            tuple(self.dram_chunks),
            self.dram_bytes,
            self.wiped_bytes,
            tuple(self.ssd_chunks),
            self.ssd_bytes,
            self.ssd_manifests,
            self.physical_before or 0,
            self.physical_after,
            self.shared_chunks,
            self.leases_revoked,
            self.deferred_slots,
            tuple(self.left),
        )


class Eraser:
    """One erasure at a time. One event loop owns it."""

    def __init__(
        self,
        store: Store,
        manifests: ManifestStore,
        catalog: Catalog,
        ssd: SsdLink | None,
        opening: asyncio.Lock,
        put_aside: Callable[[], Iterable[Path]],
    ) -> None:
        """opening: held while the arena must not be replaced. put_aside: damaged databases that were kept."""
        self._store = store
        self._manifests = manifests
        self._catalog = catalog
        self._ssd = ssd
        self._opening = opening
        self._put_aside = put_aside
        self._one = asyncio.Lock()
        self._unsettled: set[int] = set()  # slots that others were filling while unused memory was wiped
        self._arena: Arena | None = None  # that they belong to

    async def erase(self, turn_key: bytes, keep: Collection[bytes] = ()) -> ErasureReceipt:
        """keep: see messages.Erase.

        Raises InvalidRequest: no such turn; PeerError: the SSD tier is away, and nothing was erased.
        """
        async with self._one:
            if self._ssd is not None and not self._ssd.is_up:
                raise PeerUnavailable(f"nothing was erased: {self._ssd.problem}")
            target = (await self._manifests.get(turn_key)).manifest
            if target is None:
                raise InvalidRequest(f"no turn {turn_key.hex()} is saved", param="turn_key")
            progress = _Progress()
            late: list[Manifest] = []
            with self._manifests.watching() as saved:
                for _ in range(_ROUNDS):
                    saved.clear()
                    try:
                        plan = await self._plan(target, late, keep)
                    except PeerError as error:
                        if not progress.turn_keys:
                            raise
                        progress.left.append(f"turns that were saved meanwhile: {error.message}")
                        break
                    await self._carry_out(plan, target, saved, progress)
                    late = [manifest for manifest in saved if _continues(manifest, target)]
                    if not late or progress.left:
                        break
            if late:
                progress.left.append(f"{len(late)} turns that were saved while the conversation was erased")
            receipt = progress.receipt()
            log.info(
                "erased",
                turns=[key.hex() for key in receipt.turn_keys],
                dram_chunks=len(receipt.dram_chunks),
                ssd_chunks=len(receipt.ssd_chunks),
                left=receipt.left,
            )
            return receipt

    async def run(self) -> None:
        """Wipe what was left in slots that others were filling, when they have filled them or given them back."""
        while True:
            await asyncio.sleep(_SETTLE_S)
            if self._unsettled:
                async with self._opening:
                    await self._settle()

    # -- the plan -----------------------------------------------------------------------------------------

    async def _plan(self, target: Manifest, late: Iterable[Manifest], keep: Collection[bytes]) -> _Plan:
        """late: saved during an earlier round; erased whether or not they can still be found."""
        earlier: dict[bytes, int] = {}  # turn key -> tokens
        # Of the target and its relatives.
        chunk_ids = {manifest.turn_key: self._chunks_of(manifest) for manifest in late}
        fork = 0  # where the last of the others leaves the target's path, in tokens
        async for entry in self._catalog.entries():
            kind = relation(entry, target)
            if kind is Relation.OTHER:
                fork = max(fork, common_tokens(entry, target))
                continue
            chunk_ids[entry.turn_key] = self._chunks_of(entry)
            if kind is Relation.EARLIER:
                earlier[entry.turn_key] = len(entry.token_ids) // 4
        for turn_key, tokens in earlier.items():
            if tokens <= fork or turn_key in keep:
                del chunk_ids[turn_key]
        doomed = {chunk_id for ids in chunk_ids.values() for chunk_id in ids}
        total = len(doomed)
        await self._spare(doomed, chunk_ids)
        shared = total - len(doomed)
        orphaned = await self._with_orphans(doomed)
        if len(orphaned) > len(doomed):
            await self._spare(orphaned, chunk_ids)
        return _Plan(set(chunk_ids), orphaned, shared)

    def _chunks_of(self, context: Manifest | ManifestEntry) -> tuple[bytes, ...]:
        """All that are named by a context, those that truncations dropped from it included."""
        size, tokens = self._store.index.chunk_tokens, unpack_tokens(context.token_ids)
        if not context.truncations or not size:
            return context.chunk_ids
        named = lineage_of(context.namespace, tokens[: context.kv_tokens], size, context.truncations)
        return (*context.chunk_ids, *named.dropped_ids)

    async def _spare(self, doomed: set[bytes], erased: Collection[bytes]) -> None:
        """Take out what contexts need that are not erased."""
        async for entry in self._catalog.entries():
            if entry.turn_key not in erased:
                doomed.difference_update(entry.chunk_ids)

    async def _with_orphans(self, doomed: set[bytes]) -> set[bytes]:
        """Also the chunks that continue them. Only a context that has dropped their parents can need those."""
        found = set(doomed)
        grows = bool(doomed)
        while grows:
            grows = False
            chunks = list(self._store.index)
            for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
                for chunk in chunks[start : start + _CHUNKS_AT_ONCE]:
                    if chunk.parent_id in found and chunk.chunk_id not in found:
                        found.add(chunk.chunk_id)
                        grows = True
                await asyncio.sleep(0)
        return found

    # -- carrying it out ------------------------------------------------------------------------------------

    async def _carry_out(self, plan: _Plan, target: Manifest, saved: list[Manifest], progress: _Progress) -> None:
        # Contexts saved since the plan was begun: their chunks stay. Another round takes those that continue the turn.
        for manifest in saved:
            if manifest.turn_key not in plan.turn_keys and not _continues(manifest, target):
                plan.doomed.difference_update(manifest.chunk_ids)
        progress.shared_chunks = plan.shared
        with self._manifests.withholding(plan.turn_keys):
            await self._erase_from_dram(plan.doomed, progress)
            await self._manifests.forget(plan.turn_keys)
            if self._ssd is not None:
                await self._erase_from_ssd(self._ssd, plan, progress)
        for chunk_id in plan.doomed:
            self._catalog.hits.forget(chunk_id)
        progress.turn_keys += plan.turn_keys

    async def _erase_from_dram(self, doomed: Iterable[bytes], progress: _Progress) -> None:
        busy = list(doomed)
        deadline_s = time.monotonic() + _BUSY_S
        while busy:
            async with self._withdrawing(progress) as wiping:
                waiting = []
                for chunk_id in busy:
                    withdrawn = self._store.withdraw(chunk_id)
                    if withdrawn is None:
                        waiting.append(chunk_id)
                        continue
                    progress.leases_revoked += withdrawn.leases_revoked
                    if withdrawn.slot is not None:
                        wiping.append(withdrawn.slot)
                        progress.dram_chunks.append(chunk_id)
                        progress.dram_bytes += withdrawn.tokens * self._token_bytes()
            busy = waiting
            if busy and time.monotonic() > deadline_s:
                progress.left.append(
                    f"{len(busy)} chunks in DRAM are on their way from or to the SSD and do not arrive"
                )
                return
            if busy:
                await asyncio.sleep(_POLL_S)
        await self._wipe_unused(progress)

    @asynccontextmanager
    async def _withdrawing(self, progress: _Progress) -> AsyncIterator[list[int]]:
        """A list for slots that are WIPING; they are overwritten and given back at its end."""
        async with self._opening:
            slots: list[int] = []
            yield slots
            dram = self._store.dram
            if dram is not None:
                await self._wipe(dram, slots, progress)

    async def _wipe(self, dram: DramTier, slots: list[int], progress: _Progress) -> None:
        at_once = max(1, _WIPE_AT_ONCE_BYTES // dram.arena.geometry.slot_bytes)
        for start in range(0, len(slots), at_once):
            batch = slots[start : start + at_once]
            used = [slot for slot in batch if dram.generation(slot) > 1]  # memory that was never given out is zero
            await asyncio.to_thread(_wipe_all, dram.arena, used)
            for slot in batch:
                dram.wiped(slot)
            progress.wiped_bytes += len(used) * dram.arena.geometry.slot_bytes

    async def _wipe_unused(self, progress: _Progress) -> None:
        """Overwrite what chunks that were evicted or moved left in memory that is in no use now."""
        async with self._opening:
            dram = self._store.dram
            if dram is None:
                return
            geometry = dram.arena.geometry
            at_once = max(1, _WIPE_AT_ONCE_BYTES // geometry.slot_bytes)
            remaining = dram.free_slots
            while remaining > 0:
                slots = dram.withdraw_free(min(remaining, at_once))
                if not slots:
                    break
                remaining -= len(slots)
                await self._wipe(dram, slots, progress)
            for chunk in list(self._store.index.resident()):
                progress.wiped_bytes += await self._wipe_tail(dram, chunk)
            # Last: whoever takes a slot from here on takes a wiped one.
            self._arena = dram.arena
            self._unsettled = {
                slot for slot in range(dram.slots) if dram.state(slot) in (SlotState.RESERVED, SlotState.LOADING)
            }
            progress.deferred_slots = len(self._unsettled)

    async def _wipe_tail(self, dram: DramTier, chunk: Chunk) -> int:
        """Overwrite what a partial chunk leaves unused of its slot. Returns how many bytes that was."""
        arena, slot, generation = dram.arena, chunk.slot, chunk.generation
        wiped = 0
        if chunk.tokens < arena.geometry.chunk_tokens:
            for layer in range(arena.geometry.layers):
                # On the event loop, not in a thread: between the look and the write nobody can be given the slot.
                if self._store.resident(slot, generation, chunk.chunk_id) is not chunk:
                    break
                wiped += arena.wipe_unused(slot, layer, chunk.tokens)
                await asyncio.sleep(0)
        return wiped

    async def _settle(self) -> None:
        dram = self._store.dram
        if dram is None or dram.arena is not self._arena:
            self._unsettled.clear()
            return
        settled = [slot for slot in self._unsettled if dram.state(slot) in (SlotState.READY, SlotState.FREE)]
        if not settled:
            return
        chunks = {chunk.slot: chunk for chunk in self._store.index.resident()}
        for slot in settled:
            if slot in chunks:
                await self._wipe_tail(dram, chunks[slot])
            elif dram.state(slot) is SlotState.FREE:
                dram.withdraw(slot)
                await self._wipe(dram, [slot], _Progress())
            self._unsettled.discard(slot)

    async def _erase_from_ssd(self, ssd: SsdLink, plan: _Plan, progress: _Progress) -> None:
        try:
            erased = await ssd.erase(sorted(plan.doomed), sorted(plan.turn_keys))
        except CachedAttentionError as error:
            progress.left.append(f"on SSD, perhaps all of it: {error.message}; ask again when it is back")
            return
        for chunk_id in plan.doomed:
            self._store.erased_from_ssd(chunk_id)
        progress.ssd_chunks += erased.chunk_ids
        progress.ssd_bytes += erased.bytes
        progress.ssd_manifests += erased.manifests
        if progress.physical_before is None:
            progress.physical_before = erased.physical_before
        progress.physical_after = erased.physical_after
        for path in await asyncio.to_thread(lambda: list(self._put_aside())):
            progress.left.append(f"{path}, a damaged database that was put aside, was not searched")

    def _token_bytes(self) -> int:
        return self._store.dram.arena.geometry.token_bytes if self._store.dram is not None else 0


def _wipe_all(arena: Arena, slots: Iterable[int]) -> None:
    for slot in slots:
        arena.wipe(slot)


def _continues(manifest: Manifest, target: Manifest) -> bool:
    return relation(manifest, target) in (Relation.SAME, Relation.LATER)
