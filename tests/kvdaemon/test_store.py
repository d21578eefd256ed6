"""The store's decisions, one by one: prefixes and reasons, sharing, saving, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvdaemon.dram import DramTier
from kvdaemon.index import Residence
from kvdaemon.placement.lru import LeastRecentlyUsed
from kvdaemon.store import MAX_LEASES, Store
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.registry import new_registry
from protocol.arena import Arena, SlotState
from protocol.errors import CapacityError, InvalidRequest
from protocol.ids import ROOT
from protocol.lineage import Truncation
from protocol.messages import Acquire, Acquired, CommittedChunk, ReservedSlot, SsdReadChunk, SsdRecord
from tests.kvdaemon.client import NAMESPACE, SMALL
from tests.kvdaemon.contexts import Turn, make_turn, tokens

A, B = b"a" * 16, b"b" * 16
IDS = [bytes([n]) * 16 for n in range(1, 40)]


class Ssd:
    can_read = True
    can_write = True


class Bench:
    """A store over an arena of `slots`, with the chunks that a test asks for."""

    def __init__(self, directory: Path, slots: int, verify: str = "sample") -> None:
        size = slots * (SMALL.slot_bytes + SMALL.entry_bytes) + 2 * 4096
        self.arena = Arena.create(directory / "arena", SMALL, size)
        assert self.arena.slots == slots
        self.ssd = Ssd()
        self.store = Store(LeastRecentlyUsed(), self.ssd, KvDaemonMetrics(new_registry()), verify)  # type: ignore[arg-type]
        self.store.bind(DramTier(self.arena))

    def save(self, *chunk_ids: bytes, client: bytes = A, clean: bool = True) -> None:
        for chunk_id in chunk_ids:
            (slot,) = self.store.reserve(client, 1)
            assert self.commit(slot, chunk_id, client)
            if clean:
                for chunk in self.store.next_dirty(1):
                    self.store.written_behind(chunk, 100)

    def commit(
        self,
        slot: ReservedSlot,
        chunk_id: bytes,
        client: bytes = A,
        layers: int = SMALL.layers,
        parent_id: bytes = ROOT,
        tokens: int = 5,
    ) -> bool:
        for layer in range(layers):
            self.arena.set_layer_ready(slot.slot, layer, 0)
        chunk = CommittedChunk(slot.slot, slot.generation, chunk_id, parent_id, NAMESPACE, tokens)
        return self.store.commit(client, [chunk])[0]

    def stored(self, *chunk_ids: bytes) -> None:
        """Chunks that are on SSD only."""
        self.listed([SsdRecord(c, ROOT, NAMESPACE, 5, 100) for c in chunk_ids])

    def listed(self, records: list[SsdRecord]) -> None:
        """A worker came up and told of these."""
        for _ in self.store.merge_listing(self.store.index.new_listing().add(records)):
            pass

    def acquire(
        self, *chunk_ids: bytes, client: bytes = A, namespace: bytes = NAMESPACE, **fields: object
    ) -> tuple[Acquired, list[SsdReadChunk]]:
        return self.store.acquire(client, Acquire(b"j" * 16, namespace, chunk_ids, **fields), 0.0)  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, 8)
    yield made
    made.arena.close()


def test_longest_prefix_and_why_it_ends(bench: Bench) -> None:
    bench.save(*IDS[:2])
    reply, reads = bench.acquire(*IDS[:4])
    assert [ref.chunk_id for ref in reply.chunks] == IDS[:2]
    assert ([ref.tier for ref in reply.chunks], reply.miss_reason, reads) == (["dram", "dram"], "unknown", [])
    assert bench.acquire(*IDS[:2])[0].miss_reason == ""
    assert bench.acquire(IDS[5], IDS[0])[0].chunks == ()


def test_kv_never_crosses_a_namespace(bench: Bench) -> None:
    bench.save(IDS[0])
    assert bench.acquire(IDS[0], namespace=b"other tenant's ns")[0].chunks == ()


def test_the_partial_chunk_stands_in_for_the_full_one(bench: Bench) -> None:
    """A context ends in a partial chunk; the next prompt asks for the full one, which never existed."""
    full, partial = IDS[2], IDS[10]
    bench.save(*IDS[:2], partial)
    reply, _ = bench.acquire(*IDS[:2], full, partial_id=partial, partial_index=2)
    assert [ref.chunk_id for ref in reply.chunks] == [*IDS[:2], partial]
    assert reply.miss_reason == ""
    reply, _ = bench.acquire(*IDS[:2], partial_id=partial, partial_index=2)  # behind the last full chunk
    assert [ref.chunk_id for ref in reply.chunks] == [*IDS[:2], partial]
    bench.save(full)
    reply, _ = bench.acquire(*IDS[:2], full, partial_id=partial, partial_index=2)
    assert [ref.chunk_id for ref in reply.chunks] == [*IDS[:2], full]  # the real one is better
    reply, _ = bench.acquire(IDS[20], *IDS[:2], partial_id=partial, partial_index=2)
    assert reply.chunks == ()  # not at its place
    with pytest.raises(InvalidRequest):
        bench.acquire(IDS[0], partial_id=partial, partial_index=2)


def test_ssd_chunks_get_slots_at_once_and_are_shared(bench: Bench) -> None:
    bench.stored(*IDS[:2])
    reply, reads = bench.acquire(*IDS[:2])
    assert [ref.tier for ref in reply.chunks] == ["ssd", "ssd"]
    assert [(r.slot, r.generation) for r in reads] == [(ref.slot, ref.generation) for ref in reply.chunks]
    again, more_reads = bench.acquire(*IDS[:2], client=B)
    assert more_reads == []
    assert [ref.slot for ref in again.chunks] == [ref.slot for ref in reply.chunks]
    for read in reads:
        assert bench.arena.state(read.slot) is SlotState.LOADING
        bench.store.fetched(read, "ok")
        assert bench.arena.state(read.slot) is SlotState.READY
    assert [ref.tier for ref in bench.acquire(*IDS[:2])[0].chunks] == ["dram", "dram"]


def test_what_turns_out_corrupt_is_gone_and_noticed(bench: Bench) -> None:
    bench.stored(IDS[0])
    reply, (read,) = bench.acquire(IDS[0])
    bench.store.fetched(read, "corrupt")
    assert not bench.arena.is_current(read.slot, read.generation, IDS[0])
    assert bench.acquire(IDS[0])[0].miss_reason == "corrupt"
    bench.store.release(A, reply.lease_id)
    assert bench.store.dram is not None
    assert bench.store.dram.free_slots == 8
    bench.save(IDS[0])  # recomputed and saved again: a hit again
    assert bench.acquire(IDS[0])[0].miss_reason == ""


def test_a_fetch_that_broke_off_can_be_had_again(bench: Bench) -> None:
    bench.stored(IDS[0])
    _, (read,) = bench.acquire(IDS[0])
    bench.store.fetch_failed(read)
    _, reads = bench.acquire(IDS[0])
    assert len(reads) == 1
    bench.store.fetched(read, "ok")  # the first one's late answer changes nothing
    chunk = bench.store.index.get(IDS[0])
    assert chunk is not None
    assert chunk.residence is Residence.LOADING


def test_eviction_spares_leased_chunks_and_this_very_request(bench: Bench) -> None:
    """Eight slots, all full: the SSD chunk takes the coldest that is neither leased nor part of the same context."""
    bench.save(*IDS[:8])
    bench.stored(*IDS[:8], IDS[20])
    held, _ = bench.acquire(IDS[1], client=B)
    reply, reads = bench.acquire(IDS[0], IDS[20])
    assert [ref.tier for ref in reply.chunks] == ["dram", "ssd"]
    assert len(reads) == 1
    gone = [c for c in IDS[:8] if (chunk := bench.store.index.get(c)) is None or chunk.residence is Residence.ABSENT]
    assert gone == [IDS[2]]
    assert bench.arena.is_current(held.chunks[0].slot, held.chunks[0].generation, IDS[1])


def test_no_slot_for_an_ssd_chunk(bench: Bench) -> None:
    """Everything leased: the prefix ends there with the reason, and nothing was evicted for it."""
    bench.save(*IDS[:8])
    bench.stored(*IDS[:8], IDS[20])
    bench.acquire(*IDS[:8], client=B)
    reply, reads = bench.acquire(IDS[0], IDS[20], IDS[1])
    assert (len(reply.chunks), reply.miss_reason, reads) == (1, "no_capacity", [])


def test_reserve_takes_free_then_clean_never_dirty(bench: Bench) -> None:
    bench.save(*IDS[:4], clean=False)
    bench.store.written_behind(next(bench.store.index.dirty()), 100)  # the first one is clean now
    assert len(bench.store.reserve(A, 100)) == 5  # four free, one clean
    assert bench.store.index.get(IDS[0]) is not None  # on SSD
    assert all(bench.store.index.get(c) is not None for c in IDS[1:4])


@pytest.mark.parametrize("why", ["disk full", "away"])
def test_without_an_ssd_dirty_chunks_make_room(bench: Bench, why: str) -> None:
    bench.save(*IDS[:8], clean=False)
    assert bench.store.reserve(A, 1) == []
    bench.ssd.can_write, bench.ssd.can_read = False, why == "disk full"
    assert len(bench.store.reserve(A, 1)) == 1
    assert bench.store.index.get(IDS[0]) is None
    assert bench.acquire(IDS[0])[0].miss_reason == "evicted"


def test_what_a_truncation_dropped_makes_room_first(bench: Bench) -> None:
    """Once a turn without it is saved; what is left of the conversation is still all there, and leased to its end."""
    size = SMALL.chunk_tokens
    transcript = make_turn(tokens(6 * size + 1, 1))
    truncated = make_turn(tokens(8 * size + 1, 1), truncations=(Truncation(6 * size, size, 4 * size),))
    dropped = [kv.chunk_id for kv in transcript.chain[1:4]]

    def save(turn: Turn) -> None:
        for kv in turn.chain:
            if bench.store.index.get(kv.chunk_id) is None:
                (slot,) = bench.store.reserve(A, 1)
                assert bench.commit(slot, kv.chunk_id, parent_id=kv.parent_id, tokens=size)
                for chunk in bench.store.next_dirty(1):
                    bench.store.written_behind(chunk, 100)
        bench.store.turn_ended(turn.manifest)

    save(transcript)
    save(truncated)
    kept = truncated.manifest.chunk_ids
    assert len(bench.store.reserve(B, 3)) == 3
    assert [c for c in dropped if bench.store.index.get(c).residence is Residence.READY] == []  # type: ignore[union-attr]
    assert [ref.tier for ref in bench.acquire(*kept)[0].chunks] == ["dram"] * 5
    assert bench.store.evict_from_ssd(300, 3) == dropped[::-1]
    assert bench.acquire(*transcript.manifest.chunk_ids)[0].miss_reason == "evicted"


def test_writers_leave_slots_for_fetches(tmp_path: Path) -> None:
    """Of 32 slots, two stay out of writers' reach while chunks may come back from SSD."""
    bench = Bench(tmp_path, 32)
    bench.stored(*IDS[:2])
    assert len(bench.store.reserve(A, 100)) == 30
    reply, reads = bench.acquire(*IDS[:2])
    assert (len(reply.chunks), len(reads)) == (2, 2)
    bench.arena.close()


def test_commit_accepts_what_is_there_already(bench: Bench) -> None:
    bench.save(IDS[0])
    (slot,) = bench.store.reserve(B, 1)
    assert bench.commit(slot, IDS[0], B)
    assert bench.arena.state(slot.slot) is SlotState.FREE


def test_commit_refuses_half_chunks_and_frees_the_slot(bench: Bench) -> None:
    (slot,) = bench.store.reserve(A, 1)
    assert not bench.commit(slot, IDS[0], layers=SMALL.layers - 1)
    assert bench.arena.state(slot.slot) is SlotState.FREE
    assert bench.store.index.get(IDS[0]) is None
    assert not bench.commit(slot, IDS[0])  # and a second try with the same reservation is too late


def test_only_its_own_reservation_counts(bench: Bench) -> None:
    """Slots never given, given to somebody else, or out of range: refused as a whole, nothing changed."""
    mine, other = bench.store.reserve(A, 1)[0], bench.store.reserve(B, 1)[0]
    never = ReservedSlot(next(s for s in range(8) if bench.arena.state(s) is SlotState.FREE), 0)
    for wrong in (other, ReservedSlot(8, 1), ReservedSlot(2**40, 1), ReservedSlot(mine.slot, 99), never):
        chunks = [CommittedChunk(s.slot, s.generation, IDS[0], ROOT, NAMESPACE, 5) for s in (mine, wrong)]
        with pytest.raises(InvalidRequest):
            bench.store.commit(A, chunks)
        with pytest.raises(InvalidRequest):
            bench.store.unreserve(A, [mine, wrong])
    assert bench.arena.state(mine.slot) is SlotState.RESERVED
    with pytest.raises(InvalidRequest):
        bench.store.commit(A, [CommittedChunk(mine.slot, mine.generation, IDS[0], ROOT, NAMESPACE, 5)] * 2)
    bench.store.unreserve(A, [mine, mine])
    bench.store.unreserve(A, [mine])  # given back before: nothing to do
    assert bench.store.dram is not None
    assert bench.store.dram.free_slots == 7


def test_a_client_that_opens_again_loses_its_reservations(bench: Bench) -> None:
    (mine,), (other,) = bench.store.reserve(A, 1), bench.store.reserve(B, 1)
    assert bench.store.forget_reservations(A) == 1
    assert not bench.commit(mine, IDS[0])
    assert bench.commit(other, IDS[1], B)


def test_death_of_a_client_gives_back_everything(bench: Bench) -> None:
    bench.save(IDS[0])
    bench.acquire(IDS[0], client=B)
    bench.store.reserve(B, 3)
    bench.store.client_died(B)
    assert len(bench.store.leases) == 0
    assert bench.store.dram is not None
    assert bench.store.dram.reserved_slots == 0


def test_sampling_is_one_in_sixteen_and_always_is_all(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 8)
    bench.save(IDS[0])
    marked = [bench.acquire(IDS[0])[0].chunks[0].verify for _ in range(64)]
    assert sum(marked) == 4
    bench.arena.close()
    always = Bench(tmp_path, 8, verify="always")
    always.save(IDS[0])
    always.stored(IDS[0], IDS[1])
    reply, _ = always.acquire(IDS[0], IDS[1])
    assert [ref.verify for ref in reply.chunks] == [True, True]
    always.arena.close()


def test_quarantine_keeps_the_good_copy_on_ssd(bench: Bench) -> None:
    bench.save(IDS[0])
    chunk = bench.store.index.get(IDS[0])
    assert chunk is not None
    assert bench.store.resident(chunk.slot, chunk.generation + 1, IDS[0]) is None
    bench.store.quarantine(chunk)
    assert [ref.tier for ref in bench.acquire(IDS[0])[0].chunks] == ["ssd"]


def test_a_restarted_worker_is_believed(bench: Bench) -> None:
    """Chunks that it lost are dirty again where DRAM has them, and gone where it has not."""
    bench.save(*IDS[:8])
    bench.store.reserve(A, 1)  # evicts the coldest
    bench.listed([])
    assert bench.store.index.get(IDS[0]) is None
    assert [chunk.chunk_id for chunk in bench.store.next_dirty(100)] == IDS[1:8]


def test_a_long_listing_leaves_room_for_others(bench: Bench) -> None:
    """Between two pauses chunks that are listed are saved, used and evicted; in the end the books are right."""
    listed = [n.to_bytes(16, "big") for n in range(1, 6001)]
    records = [SsdRecord(c, ROOT, NAMESPACE, 5, 100) for c in listed]
    steps = 0
    for _ in bench.store.merge_listing(bench.store.index.new_listing().add(records)):
        late = listed[-1 - steps]  # told of last
        bench.save(late, clean=False)
        assert [ref.tier for ref in bench.acquire(late)[0].chunks] == ["dram"]
        bench.save(IDS[steps], clean=False)
        steps += 1
    index = bench.store.index
    assert steps >= 3
    assert (index.ssd_chunks, index.ssd_bytes) == (6000, 600_000)
    assert {chunk.chunk_id for chunk in index.stored()} == set(listed)
    assert [chunk.chunk_id for chunk in index.dirty()] == IDS[:steps]  # of what was saved, what was not listed
    assert bench.acquire(listed[0])[0].chunks[0].tier == "ssd"


def test_what_the_cap_evicts_is_not_written_again(bench: Bench) -> None:
    bench.save(*IDS[:3])
    assert bench.store.evict_from_ssd(150, limit=10) == IDS[:2]
    assert bench.store.next_dirty(10) == []
    assert [ref.tier for ref in bench.acquire(*IDS[:3])[0].chunks] == ["dram"] * 3


def test_open_leases_are_bounded(bench: Bench) -> None:
    for _ in range(MAX_LEASES):
        bench.acquire()
    with pytest.raises(CapacityError):
        bench.acquire()


def test_formatting_anew_forgets_dram_and_keeps_ssd(bench: Bench) -> None:
    bench.save(IDS[0])
    bench.save(IDS[1], clean=False)
    bench.acquire(IDS[0])
    bench.store.unbind()
    with pytest.raises(InvalidRequest):
        bench.acquire(IDS[0])
    assert len(bench.store.leases) == 0
    assert [chunk.chunk_id for chunk in bench.store.index.stored()] == [IDS[0]]
    assert bench.store.index.get(IDS[1]) is None
