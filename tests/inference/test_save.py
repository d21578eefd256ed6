"""The saver against a real arena: whole chunks with their checksums, whatever the daemon answers, or does not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference.save import Saver, SaveTask
from inference.store import Reservation
from inference.working_kv import Buffers, KvShape, WorkingKv, as_bytes
from protocol.arena import Arena, Geometry, SlotState
from protocol.errors import PeerTimeout
from protocol.ids import ROOT, chunk_id, lineage, pack_tokens
from protocol.messages import CommittedChunk, Manifest

LAYERS, HEADS, DIM, CHUNK = 4, 2, 8, 16
SHAPE = KvShape(LAYERS, HEADS, DIM, DIM, torch.float32, torch.device("cpu"))
GEOMETRY = Geometry(LAYERS, HEADS * DIM * 4, HEADS * DIM * 4, CHUNK)
NAMESPACE = b"n" * 16
WAIT_S = 20.0


@dataclass
class FakeStore:
    """A daemon's answers without the daemon: slots of a real arena, chunks by id; told how to misbehave."""

    arena: Arena
    free: list[int]
    session: int = 1
    chunks: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # id -> slot, tokens
    manifests: list[Manifest] = field(default_factory=list)
    reserved: set[int] = field(default_factory=set)
    written_after_commit: list[int] = field(default_factory=list)
    refuse: int = 0  # so many chunks from now on
    lose_answers: int = 0  # of so many commits: taken in, but the answer is lost
    forget_before_commit: bool = False  # the daemon restarts once, before the next commit
    lock: threading.Lock = field(default_factory=threading.Lock)  # as in the real store, held while somebody writes

    @contextmanager
    def writing(self, reservation: Reservation) -> Iterator[Arena | None]:
        with self.lock:
            is_valid = reservation.session == self.session
            if is_valid and reservation.slot not in self.reserved:
                self.written_after_commit.append(reservation.slot)
            yield self.arena if is_valid else None

    async def reserve(self, count: int) -> list[Reservation]:
        taken, self.free = self.free[:count], self.free[count:]
        self.reserved.update(taken)
        return [Reservation(s, self.arena.take(s, SlotState.RESERVED, bytes(16)), self.session) for s in taken]

    async def unreserve(self, reservations: list[Reservation]) -> None:
        for given in reservations:
            if given.session == self.session and given.slot in self.reserved:
                self._free(given.slot)

    async def commit(
        self, chunks: list[CommittedChunk], manifest: Manifest | None, reserve: int, trace: str = ""
    ) -> tuple[tuple[bool, ...], list[Reservation]]:
        if self.forget_before_commit:
            self.forget_before_commit = False
            with self.lock:
                self.session += 1
            for slot in list(self.reserved):
                self._free(slot)
        accepted = tuple(self._commit(chunk) for chunk in chunks)
        if self.lose_answers:
            self.lose_answers -= 1
            raise PeerTimeout("lost")
        if manifest is not None and all(accepted):
            self.manifests.append(manifest)
        return accepted, await self.reserve(reserve)

    def _commit(self, chunk: CommittedChunk) -> bool:
        if chunk.slot not in self.reserved or chunk.generation != self.arena.generation(chunk.slot):
            return False
        if self.refuse or chunk.chunk_id in self.chunks:
            was_refused = self.refuse > 0
            self.refuse = max(0, self.refuse - 1)
            self._free(chunk.slot)
            return not was_refused
        assert self.arena.ready_layers(chunk.slot) == LAYERS
        assert all(self.arena.verify_layer(chunk.slot, layer, chunk.tokens) for layer in range(LAYERS))
        self.reserved.remove(chunk.slot)
        self.chunks[chunk.chunk_id] = (chunk.slot, chunk.tokens)
        return True

    def _free(self, slot: int) -> None:
        self.reserved.remove(slot)
        self.arena.free(slot)
        self.free.append(slot)


class Bench:
    """A running saver, its event loop, and the KV of one turn."""

    def __init__(self, directory: Path, slots: int, link_bandwidth: int = 0) -> None:
        capacity = 2 * 4096 + slots * (GEOMETRY.slot_bytes + GEOMETRY.entry_bytes)
        arena = Arena.create(directory / "arena", GEOMETRY, capacity)
        self.store = FakeStore(arena, list(range(arena.slots)))
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        store: Any = self.store
        self.observed: list[int] = []
        self.saver = Saver(
            store, self.loop, lambda tokens, seconds: self.observed.append(tokens), link_bandwidth=link_bandwidth
        )
        self.saver.start()

    def close(self) -> None:
        self.saver.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()

    def task(self, tokens: int, *, computed: bool = True) -> SaveTask:
        """A turn of `tokens` tokens. computed: all of its KV is there already."""
        kv = WorkingKv(Buffers(SHAPE, 0), tokens)
        kv.begin(tokens if computed else 0, 0, tokens)
        generator = torch.Generator().manual_seed(tokens)
        for part in (kv.raw.keys, kv.values):
            part.copy_(torch.randn(part.shape, generator=generator))
        nothing = np.zeros(0, dtype=np.uint32)
        task = SaveTask(kv, NAMESPACE, nothing, np.arange(tokens, dtype=np.uint32), CHUNK)
        self.saver.begin(task)
        return task

    def finish(self, task: SaveTask, tokens: int) -> bool:
        """End the turn with the KV of `tokens` tokens and wait. True: saved."""
        ended = threading.Event()
        outcome: list[bool] = []

        def on_end(saved: bool) -> None:
            outcome.append(saved)
            ended.set()

        packed = pack_tokens(np.arange(tokens, dtype=np.uint32))
        self.saver.finish(task, Manifest(b"t" * 16, NAMESPACE, packed, "", (), tokens), on_end)
        assert ended.wait(WAIT_S)
        assert len(outcome) == 1
        return outcome[0]

    def check_saved(self, task: SaveTask, tokens: int) -> None:
        """Every chunk of the context lies in the store, to the bit, and the manifest names them."""
        ids = lineage(NAMESPACE, np.arange(tokens, dtype=np.uint32), CHUNK)
        assert self.store.manifests[-1].chunk_ids == tuple(ids)
        keys, values = as_bytes(task.raw.keys), as_bytes(task.kv.values)
        for place, identity in enumerate(ids):
            slot, held = self.store.chunks[identity]
            start, end = place * CHUNK, min((place + 1) * CHUNK, tokens)
            assert held == end - start
            for layer in range(LAYERS):
                key, value = self.store.arena.layer(slot, layer, held)
                row = GEOMETRY.key_bytes
                assert np.array_equal(key, keys[layer, start * row : end * row])
                assert np.array_equal(value, values[layer, start * row : end * row])
        assert not self.store.written_after_commit

    def wait(self, condition: Any) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, slots=12)
    yield made
    made.close()


@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
def test_a_turn_is_saved_to_the_bit(bench: Bench, tokens: int) -> None:
    task = bench.task(tokens)
    assert bench.finish(task, tokens)
    bench.check_saved(task, tokens)
    assert sum(bench.observed) == tokens
    bench.wait(lambda: len(bench.store.reserved) <= 2)  # kept for the next turn


def test_a_chunk_is_committed_before_its_turn_ends(bench: Bench) -> None:
    """Layers come one by one, as in prefill; the chunk is there with its last layer, the rest with the turn's end."""
    task = bench.task(40, computed=False)
    for layer in range(LAYERS):
        assert not bench.store.chunks
        task.layer_done(layer, 20)
        bench.saver.notify()
    bench.wait(lambda: bench.store.chunks)
    assert list(bench.store.chunks) == [chunk_id(NAMESPACE, ROOT, list(range(CHUNK)))]
    for layer in range(LAYERS):
        task.layer_done(layer, 40)
    assert bench.finish(task, 40)
    bench.check_saved(task, 40)


def test_a_turn_that_ends_while_its_last_chunk_is_committed_keeps_its_manifest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk's commit is on its way when it turns out that there is nothing behind it."""
    task = bench.task(CHUNK, computed=False)
    committing, has_ended = threading.Event(), threading.Event()
    committed = task.committed

    def wait_for_the_end(chunk: Any) -> CommittedChunk:
        committing.set()
        assert has_ended.wait(WAIT_S)
        return committed(chunk)

    monkeypatch.setattr(task, "committed", wait_for_the_end)
    task.all_done(CHUNK)
    bench.saver.notify()
    assert committing.wait(WAIT_S)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(bench.finish, task, CHUNK)
        bench.wait(lambda: task.final is not None)
        has_ended.set()
        assert ended.result(WAIT_S)
    bench.check_saved(task, CHUNK)


@pytest.mark.parametrize(
    ("start", "end", "wake_chunks", "told"),
    [
        (0, CHUNK - 1, 1, set()),  # fills no chunk
        (CHUNK - 1, CHUNK, 1, {LAYERS - 1}),
        (0, 4 * CHUNK, 2, {1, 3}),  # two layers of four chunks are as much as two whole chunks
        (0, 3 * CHUNK, 1, {1, 3}),
        (0, CHUNK, 1e-3, set(range(LAYERS))),
    ],
)
def test_the_saver_is_told_of_layers_when_there_is_enough_to_copy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, start: int, end: int, wake_chunks: float, told: set[int]
) -> None:
    """A wake costs as much as a copy of some size: it comes for that size at the earliest, and after the last layer."""
    monkeypatch.setattr("inference.save._WAKE_BYTES", int(wake_chunks * CHUNK * SHAPE.token_bytes))
    task = bench.task(4 * CHUNK)
    assert task.told_after(start, end) == told


def test_a_refused_chunk_and_those_behind_it_are_saved_again(bench: Bench) -> None:
    bench.store.refuse = 2
    task = bench.task(70)
    assert bench.finish(task, 70)
    bench.check_saved(task, 70)


def test_a_lost_answer_never_makes_a_slot_written_again(bench: Bench) -> None:
    """The daemon took the chunks in and its answer was lost: their slots are the daemon's, others are filled."""
    bench.store.lose_answers = 2
    task = bench.task(70)
    assert bench.finish(task, 70)
    bench.check_saved(task, 70)
    bench.wait(lambda: len(bench.store.reserved) <= 2)


def test_what_a_daemon_forgot_is_saved_again(bench: Bench) -> None:
    bench.store.forget_before_commit = True
    task = bench.task(70)
    assert bench.finish(task, 70)
    bench.check_saved(task, 70)


def test_a_context_larger_than_the_slots_given_at_once_is_saved_all_the_same(tmp_path: Path) -> None:
    """Chunks are committed where the daemon has no slot left, and room that comes later is taken."""
    bench = Bench(tmp_path, slots=3)
    try:
        task = bench.task(100)
        packed = pack_tokens(np.arange(100, dtype=np.uint32))
        ended = threading.Event()
        bench.saver.finish(task, Manifest(b"t" * 16, NAMESPACE, packed, "", (), 100), lambda saved: ended.set())
        seen: set[bytes] = set()

        def make_room() -> bool:
            # As a daemon that evicts: what is committed leaves, and its slot is free.
            for identity, (slot, _) in list(bench.store.chunks.items()):
                seen.add(identity)
                del bench.store.chunks[identity]
                bench.store.arena.free(slot)
                bench.store.free.append(slot)
            return ended.is_set()

        bench.wait(make_room)
        assert seen == set(lineage(NAMESPACE, np.arange(100, dtype=np.uint32), CHUNK))
    finally:
        bench.close()


def test_an_abandoned_turn_leaves_no_slot_behind(bench: Bench) -> None:
    task = bench.task(40, computed=False)
    task.layer_done(0, 40)
    bench.saver.notify()
    bench.wait(lambda: task.chunk is not None)
    bench.saver.abandon(task)
    bench.wait(lambda: len(bench.store.reserved) <= 2)
    assert not bench.store.chunks
    other = bench.task(100)
    assert bench.finish(other, 100)
    bench.check_saved(other, 100)


def test_a_turn_that_ends_inside_a_begun_chunk_keeps_that_chunk_whole(bench: Bench) -> None:
    """Tokens of a stop string have KV but do not belong to the context: layers copied before and after have as many."""
    task = bench.task(16, computed=False)
    task.layer_done(0, 16)
    bench.saver.notify()
    bench.wait(lambda: task.chunk is not None and task.chunk.layers == 1)
    for layer in range(LAYERS):
        task.layer_done(layer, 16)
    assert bench.finish(task, 14)
    assert next(iter(bench.store.chunks.values()))[1] == 16  # and its checksums held when it was committed


def test_a_slowed_link_saves_the_same_bytes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, slots=12, link_bandwidth=500_000)
    try:
        task = bench.task(100)
        assert bench.finish(task, 100)
        bench.check_saved(task, 100)
    finally:
        bench.close()


def test_an_abandoned_turn_does_not_wait_for_the_link(tmp_path: Path) -> None:
    """Its first chunk alone would be on the link for hours."""
    bench = Bench(tmp_path, slots=12, link_bandwidth=1)
    try:
        task = bench.task(40)
        bench.saver.notify()
        bench.wait(lambda: task.filled)
        bench.saver.abandon(task)
        bench.wait(lambda: not bench.saver._tasks and len(bench.store.reserved) <= 2)
        assert not bench.store.chunks
    finally:
        bench.close()
