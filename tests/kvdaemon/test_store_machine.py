"""The store against a plain model, driven at random: sums equal a full scan after every step, no leased chunk ever
leaves its slot, no slot is lost, and what a lease names is what was committed."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvdaemon.dram import DramTier
from kvdaemon.index import Residence
from kvdaemon.placement.policies import POLICIES
from kvdaemon.store import Store
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.registry import new_registry
from protocol.arena import Arena, SlotState
from protocol.ids import ROOT
from protocol.messages import Acquire, CommittedChunk, Manifest, ReservedSlot, SlotRef, SsdReadChunk, SsdRecord
from tests.kvdaemon.client import NAMESPACE, SMALL

CLIENTS = [b"a" * 16, b"b" * 16]
# Three conversations of four chunks, each chunk's parent before it.
CHAINS = [[bytes([chain, chunk]) * 8 for chunk in range(4)] for chain in range(1, 4)]
CHUNKS = [chunk for chain in CHAINS for chunk in chain]
PARENTS = {chunk: parent for chain in CHAINS for parent, chunk in itertools.pairwise([ROOT, *chain])}
SLOTS = 5


class Ssd:
    """The SSD tier's state as the store sees it, switched by the test."""

    can_read = True
    can_write = True


class StoreMachine(RuleBasedStateMachine):
    reserved = Bundle("reserved")

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, policy: str) -> None:
        self.directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        path = Path(self.directory.name) / "arena"
        self.arena = Arena.create(path, SMALL, SLOTS * (SMALL.slot_bytes + SMALL.entry_bytes) + 2 * 4096)
        assert self.arena.slots == SLOTS
        self.ssd = Ssd()
        self.metrics = KvDaemonMetrics(new_registry())
        self.now_s = 0.0
        self.store = Store(POLICIES[policy](), self.ssd, self.metrics, "sample", 1 << 20, lambda: self.now_s)
        self.store.bind(DramTier(self.arena))
        self.waiting: list[int] = []  # tickets of waiting turns
        self.tickets = 0
        # The model.
        self.on_disk: set[bytes] = set()  # what the worker would list
        self.in_slot: dict[tuple[int, int], bytes] = {}  # (slot, generation) -> chunk, for everything handed out
        self.mine: dict[tuple[int, int], bytes] = {}  # reserved (slot, generation) -> client
        self.held: dict[bytes, tuple[bytes, tuple[SlotRef, ...], float]] = {}  # lease -> client, chunks, expiry

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.arena.close()
            self.directory.cleanup()

    # -- saving -------------------------------------------------------------------------------------------

    @rule(target=reserved, client=st.sampled_from(CLIENTS), count=st.integers(0, 3))
    def reserve(self, client: bytes, count: int):  # type: ignore[no-untyped-def]
        slots = self.store.reserve(client, count)
        assert len(slots) <= count
        for slot in slots:
            assert self.arena.state(slot.slot) is SlotState.RESERVED
            self.mine[slot.slot, slot.generation] = client
        return multiple(*((client, slot) for slot in slots))

    @rule(item=consumes(reserved), chunk_id=st.sampled_from(CHUNKS), whole=st.sampled_from([True, True, True, False]))
    def commit(self, item: tuple[bytes, ReservedSlot], chunk_id: bytes, whole: bool) -> None:
        client, slot = item
        was_mine = self.mine.pop((slot.slot, slot.generation), None) == client
        if was_mine:
            for layer in range(SMALL.layers if whole else 1):
                self.arena.set_layer_ready(slot.slot, layer, 0)
        known = self.store.index.get(chunk_id)
        was_resident = known is not None and known.residence is not Residence.ABSENT
        chunk = CommittedChunk(slot.slot, slot.generation, chunk_id, PARENTS[chunk_id], NAMESPACE, 5)
        (accepted,) = self.store.commit(client, [chunk])
        assert accepted == (was_mine and whole)
        if accepted and not was_resident:
            self.in_slot[slot.slot, slot.generation] = chunk_id

    @rule(client=st.sampled_from(CLIENTS), chain=st.sampled_from(CHAINS), length=st.integers(1, 4))
    def save_a_context(self, client: bytes, chain: list[bytes], length: int) -> None:
        """The whole way at once, so that the tier fills: reserve, fill, commit, write behind."""
        for chunk_id in chain[:length]:
            for slot in self.store.reserve(client, 1):
                self.mine[slot.slot, slot.generation] = client
                self.commit((client, slot), chunk_id, True)
                self.write_behind(1)

    @rule(item=consumes(reserved))
    def unreserve(self, item: tuple[bytes, ReservedSlot]) -> None:
        client, slot = item
        self.mine.pop((slot.slot, slot.generation), None)
        self.store.unreserve(client, [slot])

    @rule(reopens=st.booleans(), client=st.sampled_from(CLIENTS))
    def client_goes(self, client: bytes, reopens: bool) -> None:
        """It dies, or opens the store again; its slots come back, and its leases with its death."""
        if reopens:
            self.store.forget_reservations(client)
        else:
            self.store.client_died(client)
            self.held = {key: lease for key, lease in self.held.items() if lease[0] != client}
        self.mine = {key: owner for key, owner in self.mine.items() if owner != client}

    # -- loading ------------------------------------------------------------------------------------------

    @rule(
        client=st.sampled_from(CLIENTS),
        chain=st.sampled_from(CHAINS),
        length=st.integers(1, 4),
        lease_ms=st.integers(1, 5000),
    )
    def acquire(self, client: bytes, chain: list[bytes], length: int, lease_ms: int) -> None:
        wanted = tuple(chain[:length])
        request = Acquire(b"j" * 16, NAMESPACE, wanted, lease_ms=lease_ms)
        reply, reads = self.store.acquire(client, request, self.now_s)
        assert tuple(ref.chunk_id for ref in reply.chunks) == wanted[: len(reply.chunks)]
        assert bool(reply.miss_reason) == (len(reply.chunks) < len(wanted))
        for read in reads:
            assert read.chunk_id in self.on_disk
            self.in_slot[read.slot, read.generation] = read.chunk_id
        self.held[reply.lease_id] = (client, reply.chunks, self.now_s + lease_ms / 1e3)

    @rule()
    def release(self) -> None:
        if self.held:
            lease_id, (client, _, _) = next(iter(self.held.items()))
            self.store.release(client, lease_id)
            del self.held[lease_id]

    @rule(seconds=st.floats(0.1, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.store.expire(self.now_s)
        self.held = {key: lease for key, lease in self.held.items() if lease[2] > self.now_s}

    @rule(chains=st.lists(st.sampled_from(CHAINS), max_size=4))
    def queue_changes(self, chains: list[list[bytes]]) -> None:
        while self.waiting:
            self.store.placement.go(self.waiting.pop())
        for chain in chains:
            self.tickets += 1
            self.waiting.append(self.tickets)
            self.store.placement.wait(self.tickets, chain)

    @rule(chain=st.sampled_from(CHAINS), length=st.integers(1, 4))
    def turn_ends(self, chain: list[bytes], length: int) -> None:
        ids = tuple(chain[:length])
        self.store.turn_ended(Manifest(b"t" * 16, NAMESPACE, b"", "", ids, SMALL.chunk_tokens * length))

    @rule(limit=st.integers(1, 4))
    def prefetch(self, limit: int) -> None:
        for read in self.store.plan_prefetch(limit):
            assert read.chunk_id in self.on_disk
            self.in_slot[read.slot, read.generation] = read.chunk_id

    @rule(outcome=st.sampled_from(["ok", "ok", "ok", "missing", "corrupt", "died"]))
    def fetch_ends(self, outcome: str) -> None:
        for chunk in list(self.store.index.resident()):
            if chunk.residence is not Residence.LOADING:
                continue
            read = SsdReadChunk(chunk.chunk_id, chunk.slot, chunk.generation)
            if outcome == "died":
                self.store.fetch_failed(read)
            else:
                self.store.fetched(read, outcome)
            if outcome in ("missing", "corrupt"):
                self.on_disk.discard(chunk.chunk_id)
            if outcome != "ok":
                self._slot_lost(read.slot, read.generation)
            return

    @rule()
    def corruption_in_dram(self) -> None:
        for chunk in self.store.index.resident():
            if chunk.residence is Residence.READY:
                self._slot_lost(chunk.slot, chunk.generation)
                self.store.quarantine(chunk)
                return

    def _slot_lost(self, slot: int, generation: int) -> None:
        """Leases that name this slot no longer protect anything; their readers notice by the generation."""
        self.held = {
            key: (client, tuple(r for r in refs if (r.slot, r.generation) != (slot, generation)), expiry)
            for key, (client, refs, expiry) in self.held.items()
        }

    # -- the SSD tier ---------------------------------------------------------------------------------------

    @rule(limit=st.integers(1, 3))
    def write_behind(self, limit: int) -> None:
        for chunk in self.store.next_dirty(limit):
            assert chunk.residence is Residence.READY
            self.store.written_behind(chunk, 100)
            self.on_disk.add(chunk.chunk_id)

    @rule(need=st.integers(1, 300))
    def cap(self, need: int) -> None:
        self.on_disk -= set(self.store.evict_from_ssd(need, limit=2))

    @rule(lost=st.sets(st.sampled_from(CHUNKS), max_size=3))
    def worker_restarts(self, lost: set[bytes]) -> None:
        """It forgets some chunks that were not flushed. Its reads end first."""
        for chunk in list(self.store.index.resident()):
            if chunk.residence is Residence.LOADING:
                self._slot_lost(chunk.slot, chunk.generation)
                self.store.fetch_failed(SsdReadChunk(chunk.chunk_id, chunk.slot, chunk.generation))
        self.on_disk -= lost
        records = [SsdRecord(c, ROOT, NAMESPACE, 5, 100) for c in sorted(self.on_disk)]
        for _ in self.store.merge_listing(self.store.index.new_listing().add(records)):
            pass

    @rule(can_read=st.booleans(), can_write=st.booleans())
    def ssd_state(self, can_read: bool, can_write: bool) -> None:
        self.ssd.can_read, self.ssd.can_write = can_read, can_read and can_write

    # -- what must always hold ----------------------------------------------------------------------------

    @invariant()
    def accounting_equals_a_scan(self) -> None:
        if not hasattr(self, "store"):
            return
        index, dram = self.store.index, self.store.dram
        assert dram is not None
        states = [self.arena.state(slot) for slot in range(SLOTS)]
        assert [dram.state(slot) for slot in range(SLOTS)] == states
        assert dram.free_slots == states.count(SlotState.FREE)
        assert dram.reserved_slots == states.count(SlotState.RESERVED) == len(self.mine)
        resident = list(index.resident())
        assert index.dram_chunks == len(resident) == SLOTS - dram.free_slots - dram.reserved_slots
        assert len({chunk.slot for chunk in resident}) == len(resident)
        for chunk in resident:
            expected = SlotState.READY if chunk.residence is Residence.READY else SlotState.LOADING
            assert states[chunk.slot] is expected
            assert self.arena.is_current(chunk.slot, chunk.generation, chunk.chunk_id)
            assert self.in_slot[chunk.slot, chunk.generation] == chunk.chunk_id
        stored = list(index.stored())
        assert {chunk.chunk_id for chunk in stored} == self.on_disk
        assert index.ssd_bytes == 100 * len(stored)
        assert len(index) == len({chunk.chunk_id for chunk in [*stored, *resident]})
        dirty = list(index.dirty())
        assert all(chunk.dirty and chunk.residence is Residence.READY and not chunk.on_ssd for chunk in dirty)
        assert index.dirty_chunks == len(dirty) == sum(chunk.dirty for chunk in resident)

    @invariant()
    def placement_knows_the_same(self) -> None:
        if not hasattr(self, "store"):
            return
        index, placement = self.store.index, self.store.placement
        tree = placement.tree
        assert tree.unsaved <= {chunk.chunk_id for chunk in index}
        assert tree.held == sum(chunk.holds > 0 for chunk in index)
        for chunk in index:
            assert tree.holds("dram", chunk.chunk_id) == (chunk.residence is not Residence.ABSENT)
            assert tree.holds("ssd", chunk.chunk_id) == chunk.on_ssd
            assert (chunk.chunk_id in tree.unsaved) == chunk.dirty
            assert chunk.leases >= 0
        for victim in (placement.next_victim("dram", self.now_s), placement.next_victim("ssd", self.now_s)):
            known = index.get(victim) if victim is not None else None
            assert (victim is None) == (known is None)
            assert known is None or not known.holds
        is_free_to_go = any(not c.holds and not c.dirty for c in index.resident())
        if is_free_to_go and not any(c.holds or c.dirty for c in index.resident()):
            assert placement.next_victim("dram", self.now_s) is not None

    @invariant()
    def leased_chunks_stay(self) -> None:
        if not hasattr(self, "store"):
            return
        assert len(self.store.leases) == len(self.held)
        counts: dict[tuple[int, int], int] = {}
        for _, refs, _ in self.held.values():
            for ref in refs:
                assert self.arena.is_current(ref.slot, ref.generation, ref.chunk_id)
                counts[ref.slot, ref.generation] = counts.get((ref.slot, ref.generation), 0) + 1
        for chunk in self.store.index.resident():
            assert chunk.leases >= counts.get((chunk.slot, chunk.generation), 0)
        if not self.held:
            assert all(chunk.leases == 0 for chunk in self.store.index.resident())


StoreMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestStore = StoreMachine.TestCase
