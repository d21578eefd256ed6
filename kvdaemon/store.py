"""The store: every decision about slots, chunks and leases, without a socket, a disk or a thread.

The service hands requests in and carries out what comes back: an SsdReadChunk is to be read by the SSD worker, and the
outcome reported by `fetched` or `fetch_failed`. One event loop owns the store. Every method is short and leaves the
books true: sums equal a full scan after each call, whatever it raised.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

from kvdaemon.dram import DramTier
from kvdaemon.index import Chunk, ChunkIndex, Listing, Residence, parents_first
from kvdaemon.leases import LeaseBook
from kvdaemon.placement.placement import Placement
from kvdaemon.placement.policy import Policy, TurnEnd
from kvdaemon.placement.runs import Tier
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from protocol.arena import Arena, SlotState
from protocol.errors import CapacityError, InvalidRequest
from protocol.lineage import kept_tokens
from protocol.messages import (
    Acquire,
    Acquired,
    CommittedChunk,
    Manifest,
    ReservedSlot,
    SlotRef,
    SsdReadChunk,
)
from protocol.table import Table

_ABSENT, _READY = Residence.ABSENT, Residence.READY  # an enumeration looks its members up each time
MAX_LEASES = 4096
MAX_LEASE_MS = 120_000
_VERIFY_EVERY = 16  # chunks handed out, of which one is checked by its reader where it is resident
_REMEMBERED_LOSSES = 65_536
# Slots that writers leave for chunks coming back from SSD, as a share of all: saving must not starve loading.
_FETCH_RESERVE = 1 / 16


class SsdTier(Protocol):
    """What the store asks of the SSD tier's state."""

    @property
    def can_read(self) -> bool: ...
    @property
    def can_write(self) -> bool:
        """False: disabled, away, or its disk is full. Dirty chunks are then as good as any other to evict."""
        ...


@dataclass(frozen=True)
class Withdrawal:
    """What came of withdrawing a chunk. slot: None where it had none."""

    slot: int | None = None
    tokens: int = 0
    leases_revoked: int = 0


@dataclass(frozen=True, slots=True)
class _Loss:
    why: Literal["evicted", "corrupt"]
    tier: Tier
    at_s: float  # wall clock

    @property
    def in_words(self) -> str:
        at = datetime.fromtimestamp(self.at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return f"{self.why} {'from' if self.why == 'evicted' else 'in'} {self.tier} at {at}"


@dataclass(frozen=True)
class _Adopted:
    """A slot whose chunk is taken over from an earlier daemon."""

    slot: int
    chunk_id: bytes
    parent_id: bytes


class Store:
    """Index, slots, leases and placement, kept together. `dram` is None until an arena is adopted or made.

    ssd_bytes: what the SSD tier may hold, for the look-ahead windows. clock: seconds, of any origin.
    """

    def __init__(
        self,
        policy: Policy,
        ssd: SsdTier,
        metrics: KvDaemonMetrics,
        verify: Literal["sample", "always"],
        ssd_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.placement = Placement(policy, {"dram": 0, "ssd": 0})
        self.index = ChunkIndex(self.placement, clock)
        self.leases = LeaseBook(self.index)
        self.dram: DramTier | None = None
        self._ssd_bytes = ssd_bytes
        self._clock = clock
        self._ssd = ssd
        self._metrics = metrics
        self._verify_always = verify == "always"
        self._handed_out = 0  # chunks so far
        self._losses: OrderedDict[bytes, _Loss] = OrderedDict()  # chunk id -> why it is gone

    @property
    def can_fetch(self) -> bool:
        return self.dram is not None and self._ssd.can_read

    # -- the arena ----------------------------------------------------------------------------------------

    def bind(self, dram: DramTier, adopted: Iterable[int] = ()) -> int:
        """Begin to use an arena. adopted: its READY slots that were verified. Returns how many chunks came with it."""
        self.dram = dram
        arena = dram.arena
        self.index.chunk_tokens = arena.geometry.chunk_tokens
        self.placement.capacity = {"dram": dram.slots, "ssd": self._ssd_bytes // arena.geometry.slot_bytes}
        found: dict[bytes, _Adopted] = {}
        for slot in adopted:
            item = _Adopted(slot, arena.chunk_id(slot), arena.parent_id(slot))
            if found.setdefault(item.chunk_id, item) is not item:  # the same chunk in two slots
                dram.drop(slot)
        for item in parents_first(found.values()):
            slot = item.slot
            chunk = self.index.add(item.chunk_id, item.parent_id, arena.namespace(slot), arena.tokens(slot))
            self.index.place(chunk, slot, dram.generation(slot), Residence.READY)
        return self.index.dram_chunks

    def unbind(self) -> None:
        """Forget the arena and all that is only in it."""
        for holder in self.leases.holders():
            self._metrics.lease_revoked(len(self.leases.revoke_client(holder)))
        for chunk in list(self.index.resident()):
            if not chunk.on_ssd:
                self._note_loss(chunk, "evicted", "dram")
            self.index.leave_dram(chunk)
        self.dram = None

    # -- reading ------------------------------------------------------------------------------------------

    def acquire(
        self, client: bytes, request: Acquire, now_s: float, *, is_turn: bool = True
    ) -> tuple[Acquired, list[SsdReadChunk]]:
        """Lease the longest available prefix. Returns also what the SSD worker must read for it.

        is_turn: a conversation goes on; otherwise somebody merely looks. Raises InvalidRequest; CapacityError: too
        many open leases.
        """
        dram = self._bound()
        if len(set(request.chunk_ids)) != len(request.chunk_ids):
            raise InvalidRequest("a chunk is asked for twice", param="chunk_ids")
        if len(self.leases) >= MAX_LEASES:
            raise CapacityError(f"{MAX_LEASES} leases are open")
        prefix, miss_reason, explained = self._available_prefix(request)
        if is_turn:
            at = request.partial_index if request.partial_id is not None else len(request.chunk_ids)
            partial = (request.partial_id,) if request.partial_id is not None else ()
            self.placement.used((*request.chunk_ids[:at], *partial, *request.chunk_ids[at:]), self._clock())
        absent = [chunk for chunk in prefix if chunk.residence is _ABSENT]
        spared = prefix if absent else []  # room is not made of what is asked for
        self.index.hold(spared)
        room = self._make_room(len(absent), "fetch")
        if room < len(absent):
            prefix, miss_reason, explained = prefix[: prefix.index(absent[room])], "no_capacity", ""
        reads = [self._begin_fetch(dram, chunk) for chunk in absent[:room]]
        lease = self.leases.grant(client, prefix, now_s + min(request.lease_ms, MAX_LEASE_MS) / 1e3)
        self.index.release(spared)
        resident = [chunk.residence is _READY for chunk in prefix]
        refs = self._refer(prefix, resident)
        self._count_reuse(self.index.use(prefix), refs.columns["tokens"], resident)
        return Acquired(lease.lease_id, refs, miss_reason, explained), reads

    def _refer(self, chunks: Sequence[Chunk], resident: Sequence[bool]) -> Table[SlotRef]:
        verify = [self._verify_always] * len(chunks)
        for at in range(-self._handed_out % _VERIFY_EVERY, len(chunks), _VERIFY_EVERY):
            verify[at] |= resident[at]
        self._handed_out += len(chunks)
        return Table(
            SlotRef,
            slot=[chunk.slot for chunk in chunks],
            generation=[chunk.generation for chunk in chunks],
            chunk_id=[chunk.chunk_id for chunk in chunks],
            tokens=[chunk.tokens for chunk in chunks],
            tier=["dram" if is_resident else "ssd" for is_resident in resident],
            verify=verify,
        )

    def _count_reuse(self, prefetched: Sequence[Chunk], tokens: Sequence[int], resident: Sequence[bool]) -> None:
        from_dram = sum(itertools.compress(tokens, resident))
        for chunk in prefetched:
            self._metrics.prefetched("used")
            from_dram -= chunk.tokens if chunk.residence is _READY else 0
        for tier, size in (("dram", from_dram), ("ssd", sum(tokens) - from_dram)):
            if size:
                self._metrics.reused(tier, size * self._bound().arena.geometry.token_bytes)

    def turn_ended(self, manifest: Manifest) -> None:
        """A turn is saved whole: its conversation may go on with it some time."""
        size = self.index.chunk_tokens
        if not size:
            return  # its chunks are of an arena that is gone
        whole, rest = divmod(kept_tokens(manifest.kv_tokens, manifest.truncations), size)
        end = TurnEnd(manifest.next_speaker, manifest.answer_tokens, rest / size if rest else 1.0)
        self.placement.turn_ended(manifest.chunk_ids, min(whole, len(manifest.chunk_ids)), end, self._clock())

    def expected(self, manifest: Manifest, in_s: float) -> None:
        """Somebody says that the next turn after this one comes in about so many seconds."""
        self.placement.expected(manifest.chunk_ids, self._clock() + max(0.0, in_s))

    def wait(self, ticket: int, context: Sequence[bytes]) -> None:
        """A turn waits with this context, since now. Lower tickets run first."""
        self.placement.wait(ticket, context, self._clock())

    def release(self, client: bytes, lease_id: bytes) -> None:
        """Raises InvalidRequest: no such lease of this client."""
        self.leases.release(lease_id, client)

    def release_all(self, client: bytes, lease_ids: Iterable[bytes]) -> None:
        """Release leases on the way to something else. Those that ended already, or are another's, do no harm."""
        for lease_id in lease_ids:
            with contextlib.suppress(InvalidRequest):
                self.leases.release(lease_id, client)

    def fetched(self, read: SsdReadChunk, outcome: str) -> None:
        """The SSD worker is done with one chunk: "ok", "missing" or "corrupt"."""
        dram, chunk = self._bound(), self._loading(read)
        if chunk is None:
            return
        if outcome == "ok":
            dram.loaded(chunk.slot)
            self.index.arrived(chunk)
            return
        if outcome == "corrupt":
            self._metrics.corrupt("ssd")
        if chunk.prefetched:
            self._metrics.prefetched("failed")
        self._note_loss(chunk, "corrupt" if outcome == "corrupt" else "evicted", "ssd")
        dram.drop(chunk.slot)
        if chunk.on_ssd:
            self.index.leave_ssd(chunk)
        self.index.leave_dram(chunk)

    def fetch_failed(self, read: SsdReadChunk) -> None:
        """The read broke off and nobody touches the slot any more; the chunk is still on SSD, as far as we know."""
        dram, chunk = self._bound(), self._loading(read)
        if chunk is None:
            return
        if chunk.prefetched:
            self._metrics.prefetched("failed")
        dram.drop(chunk.slot)
        self.index.leave_dram(chunk)

    def plan_prefetch(self, limit: int) -> list[SsdReadChunk]:
        """Begin to fetch what the waiting turns will ask for. Returns what is to be read, at most `limit` chunks."""
        dram = self._bound()
        reads: list[SsdReadChunk] = []
        while len(reads) < limit:
            fetch = self.placement.next_fetch(dram.free_slots, self._clock())
            if fetch is None:
                break
            if fetch.victim is not None:
                self._evict(dram, self._known(fetch.victim), "prefetch")
            chunk = self._known(fetch.chunk_id)
            chunk.prefetched = True
            reads.append(self._begin_fetch(dram, chunk))
            self._metrics.prefetched("started")
        return reads

    def resident(self, slot: int, generation: int, chunk_id: bytes) -> Chunk | None:
        """The chunk that lies whole in this slot, if it is still this one."""
        chunk = self.index.get(chunk_id)
        if chunk is None or chunk.residence is not Residence.READY:
            return None
        return chunk if (chunk.slot, chunk.generation) == (slot, generation) else None

    def quarantine(self, chunk: Chunk) -> None:
        """A chunk's bytes in DRAM are not what was saved: never hand them out again. A copy on SSD stays."""
        self._metrics.corrupt("dram")
        if not chunk.on_ssd:
            self._note_loss(chunk, "corrupt", "dram")
        self._bound().drop(chunk.slot)
        self.index.leave_dram(chunk)

    # -- writing ------------------------------------------------------------------------------------------

    def reserve(self, client: bytes, count: int) -> list[ReservedSlot]:
        """As many of `count` slots as there are to give now."""
        dram = self._bound()
        # Chunks being saved hold their slots until they are on SSD; past this share the writers wait for the disk.
        keep = int(dram.slots * _FETCH_RESERVE) if self._ssd.can_read else 0
        held = dram.reserved_slots + (self.index.dirty_chunks if self._ssd.can_write else 0)
        room = self._make_room(min(count, max(0, dram.slots - keep - held)), "save")
        slots = [dram.reserve(client) for _ in range(room)]
        return [ReservedSlot(slot, dram.generation(slot)) for slot in slots]

    def unreserve(self, client: bytes, slots: Sequence[ReservedSlot]) -> None:
        """Give slots back unused. Raises InvalidRequest, and then changes nothing: a slot this client never had."""
        mine = [item.slot for item in slots if self._is_reserved(client, item.slot, item.generation)]
        self._bound().drop_all(dict.fromkeys(mine))

    def commit(self, client: bytes, chunks: Sequence[CommittedChunk]) -> tuple[bool, ...]:
        """Take filled slots into the store. The reservation ends in any case; refused chunks' slots are freed.

        Raises InvalidRequest, and then changes nothing: a slot that does not exist or was never given to this client.
        """
        dram = self._bound()
        if len({item.slot for item in chunks}) != len(chunks):
            raise InvalidRequest("a slot is committed twice", param="chunks")
        current = [self._is_reserved(client, item.slot, item.generation) for item in chunks]
        return tuple(
            is_current and self._commit_one(dram, item) for is_current, item in zip(current, chunks, strict=True)
        )

    def _commit_one(self, dram: DramTier, item: CommittedChunk) -> bool:
        arena = dram.arena
        is_whole = (
            arena.ready_layers(item.slot) == arena.geometry.layers
            and 0 < item.tokens <= arena.geometry.chunk_tokens
            # A writer may leave the count to the commit.
            and arena.tokens(item.slot) in (0, item.tokens)
        )
        known = self.index.get(item.chunk_id)
        is_resident = known is not None and known.residence is not Residence.ABSENT
        if not is_whole or is_resident:
            dram.drop(item.slot)
            return is_whole
        dram.commit(item.slot, item.chunk_id, item.parent_id, item.namespace, item.tokens)
        chunk = self.index.add(item.chunk_id, item.parent_id, item.namespace, item.tokens)
        self.index.place(chunk, item.slot, item.generation, Residence.READY)
        self._losses.pop(item.chunk_id, None)
        self._metrics.written("dram", item.tokens * arena.geometry.token_bytes)
        return True

    def next_dirty(self, limit: int) -> list[Chunk]:
        """The oldest chunks to write behind that nobody is writing yet."""
        return list(itertools.islice((c for c in self.index.dirty() if not c.writing), limit))

    def decline(self, chunk: Chunk) -> None:
        """The chunk is not admitted to the SSD. It stays in DRAM until it is evicted; used again, it is dirty again."""
        self._metrics.declined(chunk.tokens * self._bound().arena.geometry.token_bytes)
        self.index.decline(chunk)

    # -- the SSD tier's books ---------------------------------------------------------------------------------

    def written_behind(self, chunk: Chunk, stored_bytes: int) -> None:
        """The SSD worker wrote the chunk."""
        self._metrics.written("ssd", stored_bytes)
        if self.index.get(chunk.chunk_id) is chunk:
            self.index.store_on_ssd(chunk, stored_bytes)

    def merge_listing(self, listing: Listing) -> Iterator[None]:
        """Believe the database: a worker that died took its unflushed chunks with it.

        A million chunks take seconds. It pauses often, and in a pause the store may do anything that needs no SSD.
        """
        for chunk in [chunk for chunk in self.index.stored() if chunk.chunk_id not in listing]:
            self._note_loss(chunk, "evicted", "ssd")
            self.index.leave_ssd(chunk)
            if chunk.residence is Residence.READY:
                self.index.mark_dirty(chunk)
        if not self.index.chunk_tokens:  # no arena says so yet; most chunks are full ones
            self.index.chunk_tokens = listing.most_tokens
        yield from listing.store()

    def evict_from_ssd(self, need_bytes: int, limit: int) -> list[bytes]:
        """Let go of chunks on SSD, at most `limit`. Returns their ids; the caller has them deleted."""
        victims: list[bytes] = []
        while need_bytes > 0 and len(victims) < limit:
            chunk_id = self.placement.next_victim("ssd", self._clock())
            if chunk_id is None:
                break
            chunk = self._known(chunk_id)
            victims.append(chunk_id)
            need_bytes -= chunk.ssd_bytes
            if chunk.residence is Residence.ABSENT:
                self._note_loss(chunk, "evicted", "ssd")
            self.index.leave_ssd(chunk)
            self._metrics.evicted("ssd", "capacity")
        return victims

    # -- erasing ------------------------------------------------------------------------------------------

    def withdraw(self, chunk_id: bytes) -> Withdrawal | None:
        """Forget a chunk that is to be erased, in both tiers; leases on it end. Its slot is WIPING and is the caller's.

        None: the chunk is on its way in or out. Ask again; it is not written behind anew meanwhile.
        """
        self._losses.pop(chunk_id, None)
        chunk = self.index.get(chunk_id)
        if chunk is None:
            return Withdrawal()
        if chunk.residence is Residence.LOADING or chunk.writing:
            self.index.mark_clean(chunk)
            return None
        revoked = len(self.leases.revoke_holding(chunk)) if chunk.leases else 0
        self._metrics.lease_revoked(revoked)
        slot = None
        if chunk.on_ssd:
            self.index.leave_ssd(chunk)
        if chunk.residence is Residence.READY:
            slot = chunk.slot
            self._bound().withdraw(slot)
            self.index.leave_dram(chunk)
        return Withdrawal(slot, chunk.tokens, revoked)

    def erased_from_ssd(self, chunk_id: bytes) -> None:
        """The SSD tier has this chunk no more. One that was saved again meanwhile is to be written behind again."""
        chunk = self.index.get(chunk_id)
        if chunk is not None and chunk.on_ssd:
            self.index.leave_ssd(chunk)
            if chunk.residence is Residence.READY:
                self.index.mark_dirty(chunk)

    def damaged_on_ssd(self, chunk_id: bytes) -> None:
        """The SSD worker found the chunk's record damaged, and deleted it."""
        self._metrics.corrupt("ssd")
        chunk = self.index.get(chunk_id)
        if chunk is not None and chunk.on_ssd:
            if chunk.residence is not Residence.READY:
                self._note_loss(chunk, "corrupt", "ssd")
            self.index.leave_ssd(chunk)
            if chunk.residence is Residence.READY:
                self.index.mark_dirty(chunk)

    # -- clients and time -------------------------------------------------------------------------------------

    def forget_reservations(self, client: bytes) -> int:
        """The client says that it forgot its slots, or it is dead. Returns how many there were."""
        if self.dram is None:
            return 0
        slots = self.dram.reserved_by(client)
        self.dram.drop_all(slots)
        return len(slots)

    def client_died(self, client: bytes) -> None:
        self._metrics.lease_revoked(len(self.leases.revoke_client(client)))
        self.forget_reservations(client)

    def expire(self, now_s: float) -> None:
        """Revoke leases whose time is up."""
        self._metrics.lease_revoked(len(self.leases.revoke_expired(now_s)))

    # -- inside -------------------------------------------------------------------------------------------

    def _bound(self) -> DramTier:
        if self.dram is None:
            raise InvalidRequest("open the store first")
        return self.dram

    def _available_prefix(self, request: Acquire) -> tuple[list[Chunk], str, str]:
        """Chunks that could be handed out, oldest first, and why there are no more, as a reason and in words."""
        if request.partial_id is not None and request.partial_index > len(request.chunk_ids):
            raise InvalidRequest("partial_index lies behind the end of chunk_ids", param="partial_index")
        prefix = self._available(request.chunk_ids, request.namespace)
        missing = request.chunk_ids[len(prefix) : len(prefix) + 1]
        if request.partial_id is not None and request.partial_index == len(prefix):
            partial = self._available((request.partial_id,), request.namespace)
            if partial:
                return prefix + partial, "", ""
            # What was saved was the partial chunk; the full one may never have existed.
            missing = (request.partial_id,)
        return prefix, *(self._miss_reason(missing[0]) if missing else ("", ""))

    def _available(self, chunk_ids: Sequence[bytes], namespace: bytes) -> list[Chunk]:
        """The chunks that could be handed out, up to the first that could not."""
        known = self.index.leading(chunk_ids, namespace)
        if self._ssd.can_read:
            return known
        return list(itertools.takewhile(lambda chunk: chunk.residence is not Residence.ABSENT, known))

    def _miss_reason(self, chunk_id: bytes) -> tuple[str, str]:
        """Also in words, where there is more to say."""
        if self.index.get(chunk_id) is not None:
            return "no_capacity", ""
        loss = self._losses.get(chunk_id)
        return ("unknown", "") if loss is None else (loss.why, loss.in_words)

    def _known(self, chunk_id: bytes) -> Chunk:
        chunk = self.index.get(chunk_id)
        assert chunk is not None
        return chunk

    def _make_room(self, need: int, reason: str) -> int:
        """Free slots, by eviction where there are too few. Returns how many of `need` are free now."""
        dram = self._bound()
        while dram.free_slots < need:
            # What exists in DRAM only goes as well where it will not get to SSD.
            victim = self.placement.next_victim("dram", self._clock(), unsaved_too=not self._ssd.can_write)
            if victim is None:
                break
            chunk = self._known(victim)
            self._evict(dram, chunk, "unsaved" if chunk.dirty else reason)
        return min(need, dram.free_slots)

    def _evict(self, dram: DramTier, chunk: Chunk, reason: str) -> None:
        assert not chunk.holds
        if chunk.prefetched:
            self._metrics.prefetched("wasted")
        if not chunk.on_ssd:
            self._note_loss(chunk, "evicted", "dram")
        self._metrics.evicted("dram", "declined" if chunk.declined else reason)
        dram.drop(chunk.slot)
        self.index.leave_dram(chunk)

    def _begin_fetch(self, dram: DramTier, chunk: Chunk) -> SsdReadChunk:
        slot = dram.fetch(chunk.chunk_id, chunk.parent_id, chunk.namespace, chunk.tokens)
        self.index.place(chunk, slot, dram.generation(slot), Residence.LOADING)
        return SsdReadChunk(chunk.chunk_id, slot, chunk.generation)

    def _loading(self, read: SsdReadChunk) -> Chunk | None:
        """The chunk of a read, unless the arena was replaced meanwhile."""
        chunk = self.index.get(read.chunk_id)
        if chunk is None or chunk.residence is not Residence.LOADING:
            return None
        return chunk if (chunk.slot, chunk.generation) == (read.slot, read.generation) else None

    def _is_reserved(self, client: bytes, slot: int, generation: int) -> bool:
        """Whether the client holds this slot. False: it did once. Raises InvalidRequest: it never did."""
        dram = self._bound()
        if slot >= dram.slots:
            raise InvalidRequest(f"there is no slot {slot}", param="slot")
        if generation < dram.generation(slot):
            return False
        if generation > dram.generation(slot) or slot not in dram.reserved_by(client):
            raise InvalidRequest(f"slot {slot} was not reserved by this client", param="slot")
        return dram.state(slot) is SlotState.RESERVED

    def _note_loss(self, chunk: Chunk, why: Literal["evicted", "corrupt"], tier: Tier) -> None:
        self._losses[chunk.chunk_id] = _Loss(why, tier, time.time())
        while len(self._losses) > _REMEMBERED_LOSSES:
            self._losses.popitem(last=False)


def intact(arena: Arena, slot: int) -> bool:
    """Whether a READY slot is sealed and every layer of it has its checksum. Slow: reads the whole slot."""
    tokens = arena.tokens(slot)
    return 0 < tokens <= arena.geometry.chunk_tokens and all(
        arena.verify_layer(slot, layer, tokens) for layer in range(arena.geometry.layers)
    )
