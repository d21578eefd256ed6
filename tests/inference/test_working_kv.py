"""Working KV and retention: growth keeps every byte, branches do not disturb each other, bytes add up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference.paged_kv import Pages, context_pages
from inference.working_kv import (
    Buffers,
    KvShape,
    OutOfKv,
    RetentionPool,
    WorkingKv,
    common_prefix,
    context_bytes,
    new_context,
)

SHAPE = KvShape(2, 2, 4, 4, torch.float32, torch.device("cpu"))
BUFFERS = Buffers(SHAPE, 1 << 20)
NAMESPACE = b"n" * 16
CHUNK = 16


def filled(tokens: int, raw_base: int = 0, seed: int = 0) -> WorkingKv:
    generator = torch.Generator().manual_seed(seed)
    kv = WorkingKv(BUFFERS, tokens)
    kv.begin(0, 0, tokens)
    for layer in range(SHAPE.layers):
        key, value, raw = (torch.randn(tokens, 2, 4, generator=generator) for _ in range(3))
        kv.write(layer, 0, key, value, raw)
    kv.length = tokens
    if raw_base:
        kv.compact(CHUNK)
    return kv


def ids_of(count: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.uint32)


def test_growing_keeps_every_byte_and_old_readers() -> None:
    kv = filled(200)
    keys, values, raw = kv.keys.clone(), kv.values.clone(), kv.raw.keys.clone()
    reader = kv.raw
    kv.ensure(1000)
    assert kv.capacity >= 1000
    assert torch.equal(kv.keys[:, :200], keys[:, :200])
    assert torch.equal(kv.values[:, :200], values[:, :200])
    assert torch.equal(reader.span(1, 0, 200), raw[1, :200])


def test_memory_that_a_step_made_is_everybodys() -> None:
    """What a job grew into is written to by later turns outside of a step: the loader, a branch, a next turn."""
    buffers = Buffers(SHAPE, 1 << 20)
    with torch.inference_mode():
        grown = WorkingKv(buffers, 10)
        grown.ensure(1000)
    del grown
    kv = WorkingKv(buffers, 1000)
    kv.begin(0, 0, 1000)
    kv.write(0, 0, *(torch.ones(3, 2, 4) for _ in range(3)))
    assert kv.keys[0, :3].sum() == kv.raw.keys[0, :3].sum() == 24


def test_compact_keeps_the_partial_chunks_raw_keys() -> None:
    kv = filled(40)
    tail = kv.raw.span(1, 32, 40).clone()
    kv.compact(CHUNK)
    assert kv.raw.base == 32
    assert torch.equal(kv.raw.span(1, 32, 40), tail)


def test_appending_takes_the_context_over() -> None:
    pool = RetentionPool(1 << 30, CHUNK)
    kv = filled(40)
    pool.put(NAMESPACE, ids_of(40), kv)
    match = pool.match(NAMESPACE, ids_of(60))
    assert match is not None
    assert match.tokens == 40
    assert pool.take(match, 100) is kv
    assert kv.raw.base == 32
    assert len(pool) == 0
    assert pool.used_bytes == 0


def test_a_branch_gets_a_copy() -> None:
    pool = RetentionPool(1 << 30, CHUNK)
    kv = filled(40)
    before = kv.keys.clone()
    pool.put(NAMESPACE, ids_of(40), kv)
    prompt = np.concatenate([ids_of(37), ids_of(10, 500)]).astype(np.uint32)
    match = pool.match(NAMESPACE, prompt)
    assert match is not None
    assert match.tokens == 37
    branch = pool.take(match, 100)
    assert branch is not kv
    assert branch.length == 37
    assert torch.equal(branch.raw.span(0, 32, 37), kv.raw.span(0, 32, 37))
    branch.write(0, 37, *(torch.zeros(3, 2, 4) for _ in range(3)))
    assert torch.equal(kv.keys[:, :40], before[:, :40])
    assert len(pool) == 1


def test_a_branch_before_the_raw_keys_is_cut_to_a_chunk() -> None:
    pool = RetentionPool(1 << 30, CHUNK)
    pool.put(NAMESPACE, ids_of(40), filled(40, raw_base=32))
    prompt = np.concatenate([ids_of(21), ids_of(10, 500)]).astype(np.uint32)
    match = pool.match(NAMESPACE, prompt)
    assert match is not None
    assert match.tokens == 16


def test_a_branch_that_would_see_what_was_not_loaded_is_left_to_the_store() -> None:
    """In layers with a sliding window a context begins with its load."""
    pool = RetentionPool(1 << 30, CHUNK)
    kv = filled(40)
    kv.whole_from = 36
    pool.put(NAMESPACE, ids_of(40), kv)
    assert pool.match(NAMESPACE, np.concatenate([ids_of(35), ids_of(10, 500)]).astype(np.uint32)) is None
    match = pool.match(NAMESPACE, np.concatenate([ids_of(36), ids_of(10, 500)]).astype(np.uint32))
    assert match is not None
    assert match.tokens == 36
    assert pool.take(match, 100).whole_from == 36


def test_other_namespaces_never_match() -> None:
    pool = RetentionPool(1 << 30, CHUNK)
    pool.put(NAMESPACE, ids_of(40), filled(40))
    assert pool.match(b"m" * 16, ids_of(60)) is None


def test_the_last_token_is_never_taken() -> None:
    pool = RetentionPool(1 << 30, CHUNK)
    pool.put(NAMESPACE, ids_of(40), filled(40))
    match = pool.match(NAMESPACE, ids_of(40))
    assert match is not None
    assert match.tokens == 39


def test_oldest_leave_but_never_unsaved_ones() -> None:
    kv = [filled(40, seed=i) for i in range(3)]
    pool = RetentionPool(kv[0].nbytes * 2, CHUNK)
    kv[0].pending_saves = 1
    for i, context in enumerate(kv):
        pool.put(NAMESPACE, ids_of(40, 1000 * i), context)
    assert pool.match(NAMESPACE, ids_of(41, 0)) is not None
    assert pool.match(NAMESPACE, ids_of(41, 1000)) is None
    assert pool.used_bytes <= kv[0].nbytes * 2
    kv[0].pending_saves = 0
    pool.capacity_bytes = 0
    pool.trim()
    assert (len(pool), pool.used_bytes) == (0, 0)


def test_common_prefix() -> None:
    assert common_prefix(ids_of(5), ids_of(9)) == 5
    assert common_prefix(ids_of(5), ids_of(5, 1)) == 0
    assert common_prefix(ids_of(0), ids_of(5)) == 0


def test_memory_is_used_again_but_never_while_held() -> None:
    buffers = Buffers(SHAPE, 1 << 20)
    kv = WorkingKv(buffers, 300)
    kv.begin(0, 0, 300)
    reader, address = kv.raw, kv.keys.data_ptr()
    del kv
    other = WorkingKv(buffers, 280)
    other.begin(0, 0, 280)
    assert other.keys.data_ptr() in (address, reader.keys.data_ptr()) or other.keys.shape[1] >= 280
    assert reader.keys.data_ptr() not in (other.keys.data_ptr(), other.raw.keys.data_ptr(), other.values.data_ptr())
    del other, reader
    assert 0 < buffers.spare_bytes <= 1 << 20


def test_spare_memory_is_bounded() -> None:
    buffers = Buffers(SHAPE, 100_000)
    held = [WorkingKv(buffers, 300) for _ in range(10)]
    del held
    assert buffers.spare_bytes <= 100_000


def test_warm_memory_is_for_one_context_and_gives_way() -> None:
    """A context finds all of its memory spare; what is spare is enough; where there is no room, none is made."""
    buffers = Buffers(SHAPE, 1 << 20, capacity_bytes=2 * context_bytes(SHAPE, 300))
    for _ in range(2):
        buffers.warm(300)
        assert (buffers.used_bytes, buffers.spare_bytes) == (0, context_bytes(SHAPE, 300))
    first = new_context(buffers, 300, 0)
    assert buffers.spare_bytes == 0
    second = new_context(buffers, 300, 0)
    buffers.warm(300)
    assert (buffers.used_bytes, buffers.spare_bytes) == (first.nbytes + second.nbytes, 0)


def test_memory_is_bounded_and_spare_memory_gives_way() -> None:
    one = context_bytes(SHAPE, 256)
    buffers = Buffers(SHAPE, 1 << 20, capacity_bytes=2 * one)
    held = [new_context(buffers, 256, 0) for _ in range(2)]
    assert buffers.used_bytes == 2 * one
    with pytest.raises(OutOfKv):
        new_context(buffers, 1, 0)
    held.clear()
    assert (buffers.used_bytes, buffers.spare_bytes) == (0, 2 * one)
    large = new_context(buffers, 512, 0)  # of none of the spare sizes
    assert large.capacity == 512
    assert buffers.used_bytes + buffers.spare_bytes <= 2 * one


def test_whoever_waits_is_told_of_memory_and_not_by_its_own_attempt() -> None:
    told = []
    buffers = Buffers(SHAPE, 0, capacity_bytes=context_bytes(SHAPE, 256))
    buffers.on_given = lambda: told.append(1)
    held = new_context(buffers, 256, 0)
    for _ in range(3):
        with pytest.raises(OutOfKv):
            new_context(buffers, 256, 0)
    assert not told
    del held
    assert told


def test_a_context_that_cannot_grow_stays_as_it_is() -> None:
    buffers = Buffers(SHAPE, 0, capacity_bytes=context_bytes(SHAPE, 512))
    kv = new_context(buffers, 256, 0)
    other = new_context(buffers, 256, 0)
    kv.keys.fill_(3)
    with pytest.raises(OutOfKv):
        kv.ensure(257)
    assert (kv.capacity, float(kv.keys.min())) == (256, 3.0)
    del other
    kv.ensure(257)
    assert kv.capacity >= 257
    assert float(kv.keys[:, :256].min()) == 3.0


def test_no_context_grows_beyond_the_longest() -> None:
    buffers = Buffers(SHAPE, 0, longest_tokens=800)
    kv = new_context(buffers, 700, 0)
    kv.ensure(790)
    assert kv.capacity == 1024  # the size above 800, and not the one above 1,152


@given(st.integers(1, 5000), st.integers(0, 5000), st.sampled_from([(), (300, None), (1, 2000)]))
def test_the_bytes_of_a_context_are_those_that_it_takes(
    tokens: int, raw_base: int, windows: tuple[int | None, ...]
) -> None:
    shape = dataclasses.replace(SHAPE, windows=windows)
    buffers = Buffers(shape, 0)
    raw_base = min(raw_base, tokens - 1)
    kv = new_context(buffers, tokens, raw_base)
    assert buffers.used_bytes == kv.nbytes == context_bytes(shape, tokens, raw_base)
    pages = Pages(shape, 32, context_bytes(SHAPE, tokens) * 2)
    paged = new_context(pages, tokens, raw_base)
    assert pages.used_bytes == paged.nbytes == context_pages(shape, 32, tokens, raw_base) * pages.page_bytes


def test_what_was_let_go_meanwhile_is_not_taken() -> None:
    pool = RetentionPool(1 << 30, CHUNK)
    pool.put(NAMESPACE, ids_of(40), filled(40))
    match = pool.match(NAMESPACE, ids_of(60))
    assert match is not None
    assert pool.let_go()
    assert not pool.let_go()
    assert pool.take(match, 100) is None


def test_what_cannot_be_taken_for_want_of_memory_stays_and_is_the_last_to_go() -> None:
    buffers = Buffers(SHAPE, 0, capacity_bytes=context_bytes(SHAPE, 512))
    pool = RetentionPool(1 << 30, CHUNK)
    for i in range(2):
        kv = new_context(buffers, 256, 0)
        kv.length = 40
        pool.put(NAMESPACE, ids_of(40, 1000 * i), kv)
        del kv
    match = pool.match(NAMESPACE, ids_of(60))
    assert match is not None
    with pytest.raises(OutOfKv):
        pool.take(match, 5000)
    assert pool.let_go()
    assert pool.match(NAMESPACE, ids_of(60)) == match
