"""The DRAM tier's slots: who has which, and the only code that moves one from state to state.

    FREE ──reserve──▶ RESERVED ──commit──▶ READY ──evict──▶ FREE
      │                  └──give back──▶ FREE
      └────fetch────▶ LOADING ──loaded──▶ READY
                         └──fail──▶ FREE
    FREE or READY ──wipe──▶ WIPING ──wiped──▶ FREE

The front's own books decide. The arena's table repeats them for readers and for the next daemon, but every client
maps that table for writing, so nothing here is ever read back from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import Enum

from kvdaemon.failpoints import reach
from protocol.arena import Arena, SlotState
from protocol.errors import InternalError
from protocol.ids import ROOT


class SlotEvent(Enum):
    RESERVE = "reserve"
    COMMIT = "commit"
    GIVE_BACK = "give back"
    FETCH = "fetch"
    LOADED = "loaded"
    FAIL = "fail"
    EVICT = "evict"
    WIPE = "wipe"
    WIPED = "wiped"


SLOT_LIFECYCLE: Mapping[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.FREE, SlotEvent.RESERVE): SlotState.RESERVED,
    (SlotState.RESERVED, SlotEvent.COMMIT): SlotState.READY,
    (SlotState.RESERVED, SlotEvent.GIVE_BACK): SlotState.FREE,
    (SlotState.FREE, SlotEvent.FETCH): SlotState.LOADING,
    (SlotState.LOADING, SlotEvent.LOADED): SlotState.READY,
    (SlotState.LOADING, SlotEvent.FAIL): SlotState.FREE,
    (SlotState.READY, SlotEvent.EVICT): SlotState.FREE,
    (SlotState.READY, SlotEvent.WIPE): SlotState.WIPING,
    (SlotState.FREE, SlotEvent.WIPE): SlotState.WIPING,
    (SlotState.WIPING, SlotEvent.WIPED): SlotState.FREE,
}

_DROPS = {
    SlotState.RESERVED: SlotEvent.GIVE_BACK,
    SlotState.LOADING: SlotEvent.FAIL,
    SlotState.READY: SlotEvent.EVICT,
}


class DramTier:
    """The slots of one arena. One loop owns it; nothing here is safe from another thread."""

    def __init__(self, arena: Arena, occupied: Mapping[int, SlotState] | None = None) -> None:
        """occupied: what adoption found in use. Every other slot is taken as free and is marked so."""
        occupied = occupied or {}
        self.arena = arena
        self._states = [occupied.get(slot, SlotState.FREE) for slot in range(arena.slots)]
        self._generations = [arena.generation(slot) for slot in range(arena.slots)]
        self._free = [slot for slot in reversed(range(arena.slots)) if slot not in occupied]
        self._reserved: defaultdict[bytes, set[int]] = defaultdict(set)
        for slot, state in occupied.items():
            if state is SlotState.RESERVED:
                self._reserved[arena.owner(slot)].add(slot)
        for slot in self._free:
            if arena.generation(slot) and arena.chunk_id(slot) != ROOT:
                arena.free(slot)
                self._generations[slot] = arena.generation(slot)
            else:
                arena.set_state(slot, SlotState.FREE)

    @property
    def slots(self) -> int:
        return len(self._states)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def reserved_slots(self) -> int:
        return sum(map(len, self._reserved.values()))

    def state(self, slot: int) -> SlotState:
        return self._states[slot]

    def generation(self, slot: int) -> int:
        return self._generations[slot]

    def reserved_by(self, client: bytes) -> frozenset[int]:
        return frozenset(self._reserved.get(client, ()))

    def owners(self) -> frozenset[bytes]:
        """Clients that hold reserved slots."""
        return frozenset(client for client, slots in self._reserved.items() if slots)

    def reserve(self, client: bytes) -> int:
        """Give a free slot to a client to fill. Raises InternalError: there is none."""
        reach("reserve.before")
        slot = self._take(SlotEvent.RESERVE, client)
        self._reserved[client].add(slot)
        reach("reserve.after")
        return slot

    def fetch(self, chunk_id: bytes, parent_id: bytes, namespace: bytes, tokens: int) -> int:
        """Give a free slot to the SSD worker, named for what will arrive. Raises InternalError: there is none."""
        reach("fetch.before")
        slot = self._take(SlotEvent.FETCH, ROOT)
        reach("fetch.taken")
        self.arena.set_identity(slot, chunk_id, parent_id, namespace, tokens)
        reach("fetch.after")
        return slot

    def commit(self, slot: int, chunk_id: bytes, parent_id: bytes, namespace: bytes, tokens: int) -> None:
        """The client filled its slot: the slot says what it holds, then becomes READY."""
        reach("commit.before")
        state = self._next(slot, SlotEvent.COMMIT)
        self._disown(slot)
        self.arena.set_identity(slot, chunk_id, parent_id, namespace, tokens)
        self.arena.seal(slot)
        reach("commit.named")
        self._set(slot, state)
        reach("commit.after")

    def loaded(self, slot: int) -> None:
        reach("loaded.before")
        state = self._next(slot, SlotEvent.LOADED)
        self.arena.seal(slot)
        self._set(slot, state)
        reach("loaded.after")

    def drop(self, slot: int) -> None:
        """Make a slot in use free. Readers of the old generation notice. Raises InternalError: it is free already."""
        event = _DROPS.get(self._states[slot])
        if event is None:
            raise InternalError(f"slot {slot} is free already")
        state = self._next(slot, event)
        if event is SlotEvent.GIVE_BACK:
            self._disown(slot)
        if event is SlotEvent.EVICT:
            reach("evict.before")
        self.arena.free(slot)
        if event is SlotEvent.EVICT:
            reach("evict.after")
        self._states[slot] = state
        self._generations[slot] = self.arena.generation(slot)
        self._free.append(slot)

    def withdraw(self, slot: int) -> None:
        """Take a READY or FREE slot out of use, to be wiped. Readers of its generation notice."""
        state = self._next(slot, SlotEvent.WIPE)
        if self._states[slot] is SlotState.FREE:
            self._free.remove(slot)
        reach("withdraw.before")
        self._generations[slot] = self.arena.take(slot, state, ROOT)
        reach("withdraw.after")
        self._states[slot] = state

    def withdraw_free(self, limit: int) -> list[int]:
        """Take the `limit` slots out of use that have been free for longest, to be wiped."""
        slots = self._free[:limit]
        for slot in slots:
            self.withdraw(slot)
        return slots

    def wiped(self, slot: int) -> None:
        """Give back a slot that was withdrawn. Its table entry says nothing of what lay there."""
        reach("wiped.before")
        self._set(slot, self._next(slot, SlotEvent.WIPED))
        reach("wiped.after")
        self._free.append(slot)

    def drop_all(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self.drop(slot)

    def _take(self, event: SlotEvent, owner: bytes) -> int:
        if not self._free:
            raise InternalError("no slot is free")
        slot = self._free.pop()
        state = self._next(slot, event)
        self._generations[slot] = self.arena.take(slot, state, owner)
        self._states[slot] = state
        return slot

    def _next(self, slot: int, event: SlotEvent) -> SlotState:
        state = self._states[slot]
        following = SLOT_LIFECYCLE.get((state, event))
        if following is None:
            raise InternalError(f"slot {slot} is {state.name}: {event.value} is impossible")
        return following

    def _set(self, slot: int, state: SlotState) -> None:
        self._states[slot] = state
        self.arena.set_state(slot, state)

    def _disown(self, slot: int) -> None:
        for client, slots in list(self._reserved.items()):
            slots.discard(slot)
            if not slots:
                del self._reserved[client]
