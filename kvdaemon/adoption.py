"""How a daemon comes by its arena: adopts what an earlier one left, or makes a new one.

Slots describe themselves. What a dead daemon left is judged slot by slot: READY counts only if every layer has its
checksum; LOADING is free, for the worker that filled it is gone too; RESERVED stays as it is, for its owner may live
and write into it at this moment; WIPING is wiped again, from its beginning, and free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvdaemon.failpoints import reach
from kvdaemon.store import intact
from monitoring.logs import get_logger
from protocol.arena import PAGE_BYTES, Arena, Geometry, SlotState
from protocol.errors import PeerProtocolError
from protocol.ids import ROOT

log = get_logger(__name__)


@dataclass(frozen=True)
class Findings:
    """What lies in an arena. occupied: slots that are not free, by state; damaged slots are free, and counted."""

    occupied: Mapping[int, SlotState]
    ready: tuple[int, ...]
    damaged: int


def open_left_behind(path: Path, dram_bytes: int) -> Arena | None:
    """The arena at `path`, if it is whole and has the size that dram_bytes gives.

    None: there is none, or one of another size, which is left alone until a client opens the store.
    Raises PeerProtocolError: a file that is no arena, or a damaged one.
    """
    try:
        arena = Arena.open(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PeerProtocolError(f"{path} cannot be mapped: {error.strerror}") from error
    if fits(arena, dram_bytes):
        return arena
    log.warning("the arena has another size than configured", arena_bytes=arena.size_bytes, dram_bytes=dram_bytes)
    arena.close()
    return None


def fits(arena: Arena, dram_bytes: int) -> bool:
    """Whether Arena.create would make an arena of this many slots out of dram_bytes."""
    per_slot = arena.geometry.slot_bytes + arena.geometry.entry_bytes
    return arena.slots == max(0, dram_bytes - 2 * PAGE_BYTES) // per_slot


def survey(arena: Arena) -> Findings:
    """Look at every slot, verify every READY one, wipe every WIPING one. Changes nothing else.

    Reads the whole arena: call it in a thread.
    """
    reach("adopt.before")
    occupied: dict[int, SlotState] = {}
    ready: list[int] = []
    damaged = 0
    for slot in range(arena.slots):
        try:
            state = arena.state(slot)
        except PeerProtocolError:
            damaged += 1
            continue
        if state is SlotState.WIPING:
            arena.wipe(slot)
        elif state is SlotState.RESERVED:
            occupied[slot] = state
        elif state is SlotState.READY:
            is_whole = arena.ready_layers(slot) == arena.geometry.layers and arena.chunk_id(slot) != ROOT
            if is_whole and intact(arena, slot):
                occupied[slot] = state
                ready.append(slot)
            else:
                damaged += 1
    reach("adopt.after")
    return Findings(occupied, tuple(ready), damaged)


def make(path: Path, geometry: Geometry, dram_bytes: int) -> Arena:
    """A new arena in place of whatever is at `path`. Slow: call it in a thread.

    Raises CapacityError: not one chunk fits, or the tmpfs has no room.
    """
    arena = Arena.create(path, geometry, dram_bytes)
    for _ in arena.populate():
        pass
    return arena
