"""Slots: the lifecycle, and what readers of an old generation see of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from kvdaemon.adoption import survey
from kvdaemon.dram import SLOT_LIFECYCLE, DramTier, SlotEvent
from protocol.arena import Arena, SlotState
from protocol.errors import InternalError
from tests.kvdaemon.client import NAMESPACE, SMALL

A, B = b"a" * 16, b"b" * 16


@pytest.fixture
def dram(tmp_path: Path) -> Iterator[DramTier]:
    arena = Arena.create(tmp_path / "arena", SMALL, 8 * SMALL.slot_bytes)
    yield DramTier(arena)
    arena.close()


def test_lifecycle_of_a_saved_chunk(dram: DramTier) -> None:
    """reserve, commit, evict; the generation moves when the slot changes hands, and the table says what we say."""
    arena = dram.arena
    slot = dram.reserve(A)
    first = dram.generation(slot)
    assert (arena.state(slot), arena.owner(slot), dram.reserved_by(A)) == (SlotState.RESERVED, A, {slot})
    dram.commit(slot, b"c" * 16, b"p" * 16, NAMESPACE, 5)
    assert arena.is_current(slot, first, b"c" * 16)
    assert (arena.state(slot), arena.tokens(slot), dram.reserved_slots) == (SlotState.READY, 5, 0)
    dram.drop(slot)
    assert not arena.is_current(slot, first, b"c" * 16)
    assert dram.generation(slot) == arena.generation(slot) > first
    assert dram.free_slots == dram.slots


def test_lifecycle_of_a_fetched_chunk(dram: DramTier) -> None:
    slot = dram.fetch(b"c" * 16, b"p" * 16, NAMESPACE, 5)
    assert dram.arena.state(slot) is SlotState.LOADING
    assert dram.arena.is_current(slot, dram.generation(slot), b"c" * 16)
    dram.loaded(slot)
    assert dram.state(slot) is SlotState.READY


def test_every_illegal_event_raises_and_changes_nothing(dram: DramTier) -> None:
    """Each state times each event that a method stands for: what the table does not allow is refused."""
    acts = {
        SlotEvent.COMMIT: lambda slot: dram.commit(slot, b"c" * 16, A, NAMESPACE, 1),
        SlotEvent.LOADED: dram.loaded,
        SlotEvent.EVICT: dram.drop,
    }
    slots = {SlotState.RESERVED: dram.reserve(A), SlotState.LOADING: dram.fetch(A, A, A, 1)}
    slots[SlotState.READY] = dram.fetch(B, A, A, 1)
    dram.loaded(slots[SlotState.READY])
    slots[SlotState.FREE] = next(s for s in range(dram.slots) if dram.state(s) is SlotState.FREE)
    for (state, slot), event in product(slots.items(), acts):
        droppable = event is SlotEvent.EVICT and state is not SlotState.FREE
        if (state, event) in SLOT_LIFECYCLE or droppable:
            continue
        before = (dram.free_slots, dram.reserved_slots, dram.generation(slot), bytes(dram.arena.chunk_id(slot)))
        with pytest.raises(InternalError):
            acts[event](slot)
        after = (dram.free_slots, dram.reserved_slots, dram.generation(slot), bytes(dram.arena.chunk_id(slot)))
        assert (before, dram.state(slot)) == (after, state)


def test_no_slot_left(dram: DramTier) -> None:
    for _ in range(dram.slots):
        dram.reserve(A)
    with pytest.raises(InternalError):
        dram.reserve(B)
    assert dram.owners() == {A}
    dram.drop_all(dram.reserved_by(A))
    assert (dram.free_slots, dram.owners()) == (dram.slots, frozenset())


def test_adopting_frees_what_is_not_named(dram: DramTier) -> None:
    """A later daemon over the same file: named slots keep their state and owner, all others are free and moved on."""
    kept, loading = dram.reserve(A), dram.fetch(b"c" * 16, A, A, 1)
    old = dram.generation(loading)
    later = DramTier(dram.arena, {kept: SlotState.RESERVED})
    assert later.reserved_by(A) == {kept}
    assert later.arena.state(loading) is SlotState.FREE
    assert not later.arena.is_current(loading, old, b"c" * 16)
    assert later.free_slots == later.slots - 1


def test_a_wiped_slot_holds_zeros_and_is_nobodys_meanwhile(dram: DramTier) -> None:
    """READY or FREE to WIPING: readers notice, it cannot be given away, and afterwards neither data nor table tell."""
    slot, arena = dram.reserve(A), dram.arena
    for layer in range(SMALL.layers):
        for view in arena.layer(slot, layer, SMALL.chunk_tokens):
            view[:] = 7
        arena.set_layer_ready(slot, layer, 99)
    dram.commit(slot, b"c" * 16, b"p" * 16, NAMESPACE, 5)
    generation = dram.generation(slot)
    dram.withdraw(slot)
    assert not arena.is_current(slot, generation, b"c" * 16)
    assert (arena.state(slot), dram.free_slots) == (SlotState.WIPING, dram.slots - 1)
    with pytest.raises(InternalError):
        dram.drop(slot)
    arena.wipe(slot)
    assert not any(view.any() for layer in range(SMALL.layers) for view in arena.layer(slot, layer, SMALL.chunk_tokens))
    assert arena._table[slot].tobytes().count(0) > len(arena._table[slot].tobytes()) - 8  # generation and state remain
    dram.wiped(slot)
    assert (arena.state(slot), dram.free_slots) == (SlotState.FREE, dram.slots)
    everything = dram.withdraw_free(100)
    assert sorted(everything) == list(range(dram.slots))
    with pytest.raises(InternalError):
        dram.reserve(A)


def test_unused_bytes_of_a_slot_are_wiped_alone(dram: DramTier) -> None:
    slot, arena = dram.reserve(A), dram.arena
    for layer in range(SMALL.layers):
        for view in arena.layer(slot, layer, SMALL.chunk_tokens):
            view[:] = 7
    assert arena.wipe_unused(slot, 1, 5) == (SMALL.chunk_tokens - 5) * (SMALL.key_bytes + SMALL.value_bytes)
    for layer in range(SMALL.layers):
        for view, size in zip(arena.layer(slot, layer, SMALL.chunk_tokens), (64, 96), strict=True):
            assert (view[: 5 * size] == 7).all()
            assert (view[5 * size :] == (0 if layer == 1 else 7)).all()


def test_adopting_finishes_a_wipe(dram: DramTier) -> None:
    """A daemon that died while it wiped: the next one wipes the slot again, and it is free."""
    slot = dram.reserve(A)
    dram.arena.layer(slot, 0, 1)[0][:] = 7
    dram.drop(slot)
    dram.withdraw(slot)
    findings = survey(dram.arena)
    assert (findings.occupied, findings.damaged) == ({}, 0)
    assert not dram.arena.layer(slot, 0, 1)[0].any()
    assert DramTier(dram.arena, findings.occupied).free_slots == dram.slots
