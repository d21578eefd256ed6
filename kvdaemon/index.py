"""The index: what is known of every chunk in the store, and how recently each was used in each tier.

A chunk is in DRAM (LOADING or READY in a slot), on SSD, or both; an entry in neither leaves the index.

    in DRAM:  ABSENT ──place──▶ LOADING ──arrived──▶ READY ──leave_dram──▶ ABSENT
                 └────place────────────────────────▶ READY
    on SSD:   no ──on_ssd──▶ yes ──leave_ssd──▶ no
    dirty:    a chunk whose bytes are in DRAM only and shall be written behind. A chunk that the SSD tier let go of for
              room is *not* dirty again: it would be written and evicted in a circle. One that it declined is when used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from protocol.errors import InternalError


class Residence(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"


@dataclass(slots=True, eq=False)
class Chunk:
    """One chunk. Changed by ChunkIndex and LeaseBook only; `writing` by who writes it behind, `reused` by the store."""

    chunk_id: bytes
    parent_id: bytes
    namespace: bytes
    tokens: int
    residence: Residence = Residence.ABSENT
    slot: int = -1
    generation: int = 0
    ssd_bytes: int = 0  # 0: not on SSD
    dirty: bool = False
    writing: bool = False
    prefetched: bool = False  # fetched on a hint, and not asked for since
    reused: bool = False  # asked for since it was saved
    declined: bool = False  # not admitted to the SSD; clean, though its bytes are in DRAM only
    leases: int = 0

    @property
    def on_ssd(self) -> bool:
        return self.ssd_bytes > 0


class ChunkIndex:
    """Entries by chunk id, and per tier in order of last use. One loop owns it."""

    def __init__(self) -> None:
        self._chunks: dict[bytes, Chunk] = {}
        # Coldest first. OrderedDict moves an entry to its end in constant time.
        self._dram: OrderedDict[bytes, Chunk] = OrderedDict()
        self._ssd: OrderedDict[bytes, Chunk] = OrderedDict()
        self._dirty: OrderedDict[bytes, Chunk] = OrderedDict()  # in the order they were committed
        self.ssd_bytes = 0

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, chunk_id: bytes) -> Chunk | None:
        return self._chunks.get(chunk_id)

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks, in no particular order."""
        return iter(self._chunks.values())

    def resident(self) -> Iterator[Chunk]:
        """Chunks in DRAM, LOADING ones too, coldest first."""
        return iter(self._dram.values())

    def stored(self) -> Iterator[Chunk]:
        """Chunks on SSD, coldest first."""
        return iter(self._ssd.values())

    def dirty(self) -> Iterator[Chunk]:
        """Chunks to be written behind, oldest first."""
        return iter(self._dirty.values())

    @property
    def dram_chunks(self) -> int:
        return len(self._dram)

    @property
    def ssd_chunks(self) -> int:
        return len(self._ssd)

    @property
    def dirty_chunks(self) -> int:
        return len(self._dirty)

    def add(self, chunk_id: bytes, parent_id: bytes, namespace: bytes, tokens: int) -> Chunk:
        """The entry of this chunk, made where there is none. It must be placed or stored next."""
        chunk = self._chunks.get(chunk_id)
        if chunk is None:
            chunk = self._chunks[chunk_id] = Chunk(chunk_id, parent_id, namespace, tokens)
        return chunk

    def touch(self, chunk: Chunk) -> None:
        """Note a use: the chunk becomes the warmest of its tiers."""
        for order in (self._dram, self._ssd):
            if chunk.chunk_id in order:
                order.move_to_end(chunk.chunk_id)

    def place(self, chunk: Chunk, slot: int, generation: int, residence: Residence) -> None:
        """The chunk now has a slot, LOADING or READY."""
        if chunk.residence is not Residence.ABSENT or residence is Residence.ABSENT:
            raise InternalError(f"a chunk that is {chunk.residence.value} cannot be placed")
        chunk.slot, chunk.generation, chunk.residence = slot, generation, residence
        self._dram[chunk.chunk_id] = chunk

    def arrived(self, chunk: Chunk) -> None:
        """A LOADING chunk is whole."""
        if chunk.residence is not Residence.LOADING:
            raise InternalError(f"a chunk that is {chunk.residence.value} cannot arrive")
        chunk.residence = Residence.READY

    def leave_dram(self, chunk: Chunk) -> None:
        if chunk.residence is Residence.ABSENT:
            raise InternalError("a chunk that is absent cannot leave DRAM")
        del self._dram[chunk.chunk_id]
        self.mark_clean(chunk)
        chunk.slot, chunk.generation, chunk.residence = -1, 0, Residence.ABSENT
        chunk.prefetched = chunk.declined = False
        self._forget_if_gone(chunk)

    def mark_dirty(self, chunk: Chunk) -> None:
        chunk.dirty, chunk.declined = True, False
        self._dirty[chunk.chunk_id] = chunk

    def mark_clean(self, chunk: Chunk) -> None:
        chunk.dirty = False
        self._dirty.pop(chunk.chunk_id, None)

    def decline(self, chunk: Chunk) -> None:
        """The SSD tier does not take a dirty chunk."""
        self.mark_clean(chunk)
        chunk.declined = True

    def on_ssd(self, chunk: Chunk, stored_bytes: int) -> None:
        """The SSD tier holds the chunk; where DRAM does too, it is clean."""
        self.ssd_bytes += stored_bytes - chunk.ssd_bytes
        chunk.ssd_bytes = stored_bytes
        self._ssd[chunk.chunk_id] = chunk
        self.mark_clean(chunk)

    def leave_ssd(self, chunk: Chunk) -> None:
        if not chunk.on_ssd:
            raise InternalError("a chunk that is not on SSD cannot leave it")
        del self._ssd[chunk.chunk_id]
        self.ssd_bytes -= chunk.ssd_bytes
        chunk.ssd_bytes = 0
        self._forget_if_gone(chunk)

    def _forget_if_gone(self, chunk: Chunk) -> None:
        if chunk.residence is Residence.ABSENT and not chunk.on_ssd:
            del self._chunks[chunk.chunk_id]
