"""Working KV in pages: what is contiguous working KV's holds for it too, and pages add up whoever shares them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inference.layer_groups import Hold
from inference.paged_kv import NOT_HELD, PagedKv, Pages, context_pages, page_tokens_for
from inference.preload import LoadTask
from inference.working_kv import (
    Buffers,
    Kv,
    KvPool,
    KvShape,
    OutOfKv,
    RetentionPool,
    Rows,
    WorkingKv,
    context_bytes,
    new_context,
)
from protocol.errors import ConfigError
from tests.inference.test_preload import CHUNK, SHAPE, Bench

PAGE = 32
NAMESPACE = b"n" * 16


def pool_of(pages: int, shape: KvShape = SHAPE) -> Pages:
    return Pages(shape, PAGE, pages * PAGE * shape.token_bytes)


def paged(pool: KvPool, capacity: int, raw_base: int = 0, length: int = 0) -> PagedKv:
    kv = new_context(pool, capacity, raw_base, length)
    assert isinstance(kv, PagedKv)
    return kv


def filled(pool: Pages, tokens: int, seed: int = 0) -> PagedKv:
    generator = torch.Generator().manual_seed(seed)
    kv = paged(pool, tokens)
    for layer in range(kv.shape.layers):
        kv.write(layer, 0, *(torch.randn(tokens, 2, 8, generator=generator) for _ in range(3)))
    kv.length = tokens
    return kv


def whole(
    read: Callable[[int, int, int], torch.Tensor], start: int, end: int, layers: int = SHAPE.layers
) -> torch.Tensor:
    """All of it, read a page at a time.  # [layers, end - start, kv_heads, dim]"""
    borders = [start, *range(start // PAGE * PAGE + PAGE, end, PAGE), end]
    return torch.stack(
        [torch.cat([read(layer, a, b) for a, b in itertools.pairwise(borders)]) for layer in range(layers)]
    )


def raw_of(kv: Kv, start: int, end: int) -> torch.Tensor:
    return whole(kv.raw.span, start, end, kv.shape.layers)


def ids_of(count: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.uint32)


def test_a_page_holds_whole_chunks_and_is_one_that_flash_attention_reads() -> None:
    assert [page_tokens_for(chunk) for chunk in (16, 256, 384, 512)] == [256, 256, 768, 512]


def test_growing_copies_nothing() -> None:
    pool = pool_of(40)
    kv = filled(pool, 70)
    keys, values, raw = (whole(kv.keys_at, 0, 70), whole(kv.values_at, 0, 70), raw_of(kv, 0, 70))
    reader, table = kv.raw, kv.table
    kv.ensure(500)
    assert kv.capacity >= 500
    assert (kv.table[: len(table)] == table).all()
    assert torch.equal(whole(kv.keys_at, 0, 70), keys)
    assert torch.equal(whole(kv.values_at, 0, 70), values)
    assert torch.equal(whole(reader.span, 0, 70), raw)


@pytest.mark.parametrize("shape", [SHAPE, KvShape(2, 2, 8, 4, torch.float32, SHAPE.device)], ids=["equal", "unequal"])
def test_un_rotated_keys_share_pages_with_no_one(shape: KvShape) -> None:
    """Two pages' worth in one where values are as large as keys, one where they are smaller."""
    pool = pool_of(20, shape)
    kv = paged(pool, 5 * PAGE, raw_base=PAGE)
    assert kv.nbytes == pool.used_bytes == context_pages(shape, PAGE, 5 * PAGE, PAGE) * pool.page_bytes
    for memory in (pool.keys, pool.values):
        memory.fill_(1.0)
    for number, start in enumerate(range(PAGE, 5 * PAGE, PAGE)):
        kv.raw.span(slice(None), start, start + PAGE).fill_(number + 2.0)
    for number, start in enumerate(range(PAGE, 5 * PAGE, PAGE)):
        assert (kv.raw.span(slice(None), start, start + PAGE) == number + 2.0).all()
    assert (whole(kv.keys_at, 0, 5 * PAGE, shape.layers) == 1.0).all()
    assert (whole(kv.values_at, 0, 5 * PAGE, shape.layers) == 1.0).all()


def test_compact_keeps_the_partial_chunks_raw_keys_and_gives_the_rest_back() -> None:
    pool = pool_of(20)
    kv = filled(pool, 3 * PAGE + 20)
    kv.ensure(8 * PAGE)
    tail = raw_of(kv, 3 * PAGE + CHUNK, 3 * PAGE + 20).clone()
    kv.compact(CHUNK)
    assert kv.raw.base == 3 * PAGE + CHUNK
    assert torch.equal(raw_of(kv, 3 * PAGE + CHUNK, 3 * PAGE + 20), tail)
    assert pool.used_bytes == kv.nbytes == 5 * pool.page_bytes


def test_a_branch_shares_whole_pages_and_writes_to_its_own() -> None:
    pool = pool_of(20)
    retained = RetentionPool(1 << 30, CHUNK)
    kv = filled(pool, 3 * PAGE + 5)
    before = whole(kv.keys_at, 0, 3 * PAGE + 5).clone()
    kv.pending_saves = 1
    retained.put(NAMESPACE, ids_of(3 * PAGE + 5), kv)
    shared = 2 * PAGE + 21
    match = retained.match(NAMESPACE, np.concatenate([ids_of(shared), ids_of(10, 500)]).astype(np.uint32))
    assert match is not None
    assert match.tokens == shared
    used = pool.used_bytes
    branch = retained.take(match, 4 * PAGE)
    assert isinstance(branch, PagedKv)
    assert (branch.table[:2] == kv.table[:2]).all()
    assert not set(branch.table[2:]) & set(kv.table)
    assert pool.used_bytes - used == 3 * pool.page_bytes  # two of four tables' pages, and one of raw keys
    assert torch.equal(whole(branch.keys_at, 0, shared), before[:, :shared])
    base = branch.raw.base
    assert torch.equal(raw_of(branch, base, shared), raw_of(kv, base, shared))
    branch.write(0, shared, *(torch.zeros(30, 2, 8) for _ in range(3)))
    assert torch.equal(whole(kv.keys_at, 0, 3 * PAGE + 5), before)
    kv.pending_saves = 0
    retained.let_go()
    del kv
    assert torch.equal(whole(branch.keys_at, 0, 2 * PAGE), before[:, : 2 * PAGE])
    del branch
    assert pool.used_bytes == 0


def test_what_does_not_fit_takes_nothing() -> None:
    pool = pool_of(7)
    told = []
    kv = filled(pool, 2 * PAGE)
    pool.on_given = lambda: told.append(1)
    used = pool.used_bytes
    with pytest.raises(OutOfKv):
        new_context(pool, 3 * PAGE, 0)
    with pytest.raises(OutOfKv):
        kv.branch(PAGE, PAGE, 7 * PAGE)
    with pytest.raises(OutOfKv):
        kv.ensure(8 * PAGE)
    assert pool.used_bytes == used
    assert not told
    del kv
    assert told
    with pytest.raises(ConfigError, match="working_kv: a page takes"):
        Pages(SHAPE, PAGE, 100)


@pytest.mark.parametrize("windows", [(), (None, 20, 5, None)], ids=["no windows", "windows"])
@pytest.mark.parametrize("history", [40, 39, 33, 32, 16, 1])
def test_what_is_loaded_is_what_contiguous_working_kv_gets(
    tmp_path: Path, history: int, windows: tuple[int | None, ...]
) -> None:
    """Rotated keys, values and the raw tail, bit by bit; and nothing of what no window shows."""
    shape = dataclasses.replace(SHAPE, windows=windows)
    bench = Bench(tmp_path)
    refs = [bench.chunk(16), bench.chunk(16, verify=True), bench.chunk(8)]
    found = []
    try:
        for pool in (Buffers(shape, 0), pool_of(12, shape)):
            kv = new_context(pool, 128, history // CHUNK * CHUNK, history)
            for memory in kv.rows if isinstance(kv, WorkingKv) else (pool,):
                assert isinstance(memory, Pages | Rows)
                memory.keys.zero_()
                memory.values.zero_()
            ended = threading.Event()
            task = LoadTask(kv, bench.arena, refs, time.monotonic() + 10, ended.set)
            bench.loader.submit(task)
            assert ended.wait(10)
            assert task.failure is None
            loaded = task.loaded_bytes
            assert (loaded < history * shape.token_bytes) == (bool(windows) and history > 20)
            found.append(kv)
    finally:
        bench.loader.stop()
    contiguous, pages = found
    for layer in range(shape.layers):
        assert torch.equal(whole(pages.keys_at, 0, history)[layer], contiguous.keys_at(layer, 0, history))
        assert torch.equal(whole(pages.values_at, 0, history)[layer], contiguous.values_at(layer, 0, history))
    base = history // CHUNK * CHUNK
    if base < history:
        assert torch.equal(raw_of(pages, base, history), contiguous.raw.span(slice(None), base, history))


def test_what_the_engine_computes_is_not_loaded_over(tmp_path: Path) -> None:
    """The front of the history is the engine's when it says so, also in pages of which a part is still to come."""
    bench = Bench(tmp_path)
    refs = [bench.chunk(16) for _ in range(5)]
    bench.loader.stop()
    kv = paged(pool_of(12), 128)
    task = LoadTask(kv, bench.arena, refs, 1e12, lambda: None, end=80)
    kv.pages.keys.fill_(7.0)
    kv.pages.values.fill_(7.0)
    task.start = 16
    bench.loader._active = [task]
    for layer in range(SHAPE.layers):
        if layer == 2:
            task.start = 48
        bench.loader._advance(task, SHAPE.layers)
        assert task.ready_layers == layer + 1
    for layer, start in enumerate((16, 16, 48, 48)):
        keys, values = (whole(read, 0, 80)[layer] for read in (kv.keys_at, kv.values_at))
        assert (keys[:start] == 7.0).all()
        assert (values[:start] == 7.0).all()
        assert torch.equal(values[start:], torch.cat(bench.values, 1)[layer, start:])
        assert not (keys[start:] == 7.0).any()


class PoolMachine(RuleBasedStateMachine):
    """Contexts come, grow, branch, shrink and go; each token's KV says whose it is, and memory always adds up."""

    windows: tuple[int | None, ...] = (None,)

    def __init__(self) -> None:
        super().__init__()
        layers = len(self.windows)
        self.shape = KvShape(layers, 1, 1, 1, torch.float32, torch.device("cpu"), self.windows)
        self.pool = self.make_pool()
        self.held: list[tuple[Kv, list[float], list[Hold]]] = []
        self.next = 0

    def make_pool(self) -> KvPool:
        return Pages(self.shape, 4, 24 * 4 * self.shape.token_bytes)

    def pick(self, data: st.DataObject) -> tuple[Kv, list[float], list[Hold]]:
        return self.held[data.draw(st.integers(0, len(self.held) - 1))]

    def write(self, kv: Kv, said: list[float], count: int) -> None:
        start = len(said)
        new = [float(self.next + i) for i in range(count)]
        self.next += count
        rows = torch.tensor(new).view(-1, 1, 1)
        for layer in range(self.shape.layers):
            kv.write(layer, start, rows + layer / 4, -rows - layer / 4, rows + 0.125 + layer / 4)
        kv.length = start + count
        said += new

    @rule(count=st.integers(1, 12))
    def begin(self, count: int) -> None:
        try:
            kv = new_context(self.pool, count, 0)
        except OutOfKv:
            return
        self.held.append((kv, [], []))
        self.write(kv, self.held[-1][1], count)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 9))
    def grow(self, data: st.DataObject, count: int) -> None:
        kv, said, _ = self.pick(data)
        try:
            kv.ensure(len(said) + count)
        except OutOfKv:
            return
        self.write(kv, said, count)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), room=st.integers(0, 8))
    def branch(self, data: st.DataObject, room: int) -> None:
        kv, said, _ = self.pick(data)
        tokens = data.draw(st.integers(kv.raw.base, len(said)))
        base = tokens // 2 * 2
        if tokens == 0 or base < kv.raw.base or tokens < kv.whole_from:
            return
        try:
            other = kv.branch(tokens, base, tokens + room)
        except OutOfKv:
            return
        self.held.append((other, said[:tokens], []))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), room=st.integers(0, 8))
    def go_on(self, data: st.DataObject, room: int) -> None:
        """The next turn."""
        kv, said, holds = self.pick(data)
        if holds:  # whoever reads the earlier turn's raw keys has those
            return
        with contextlib.suppress(OutOfKv):
            kv.begin(len(said), max(kv.raw.base, len(said) // 2 * 2), len(said) + room)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        kv, _, holds = self.pick(data)
        if not holds:
            kv.compact(2)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """What comes from now on is to be saved."""
        kv, said, holds = self.pick(data)
        if kv.raw.base <= len(said) // 2 * 2:
            holds.append(kv.hold(len(said) // 2 * 2))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        _, said, holds = self.pick(data)
        if holds:
            holds[-1].start += 2
            if holds[-1].start >= len(said):
                holds.pop().release()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        del self.held[data.draw(st.integers(0, len(self.held) - 1))]

    @invariant()
    def everybody_has_their_own(self) -> None:
        for kv, said, holds in self.held:
            for layer in range(self.shape.layers):
                first = min([self.shape.hidden_before(layer, len(said)), *(hold.start for hold in holds)])
                for position in range(first, len(said)):
                    value = said[position] + layer / 4
                    assert float(kv.keys_at(layer, position, position + 1)) == value
                    assert float(kv.values_at(layer, position, position + 1)) == -value
                assert all(kv.raw.base <= hold.start for hold in holds)
                for position in range(kv.raw.base, len(said)):
                    assert float(kv.raw.span(layer, position, position + 1)) == said[position] + 0.125 + layer / 4

    @invariant()
    def memory_adds_up(self) -> None:
        assert isinstance(self.pool, Pages)
        tables = [table for kv, _, _ in self.held if isinstance(kv, PagedKv) for table in (kv.tables, kv.raw.table)]
        held = {page for table in tables for page in table.ravel().tolist()} - {NOT_HELD}
        assert self.pool.used_bytes == len(held) * self.pool.page_bytes


class WindowedPoolMachine(PoolMachine):
    """Nobody loses what a window still shows, or what is not saved, and pages are one layer each."""

    windows = (None, 6, 6, 1)


class BuffersMachine(PoolMachine):
    """The same of contiguous working KV."""

    windows = (None, 6, 6, 1)

    def make_pool(self) -> KvPool:
        return Buffers(self.shape, 4096, 20 * context_bytes(self.shape, 12, 0, 2), chunk_tokens=2)

    @invariant()
    def memory_adds_up(self) -> None:
        assert self.pool.used_bytes == sum(kv.nbytes for kv, _, _ in self.held)


TestPoolMachine = PoolMachine.TestCase
TestWindowedPoolMachine = WindowedPoolMachine.TestCase
TestBuffersMachine = BuffersMachine.TestCase
