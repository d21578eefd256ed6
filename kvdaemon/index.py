"""The index: what is known of every chunk in the store. It tells the placement what it has to know of that.

A chunk is in DRAM (LOADING or READY in a slot), on SSD, or both; an entry in neither leaves the index.

    in DRAM:  ABSENT ──place──▶ LOADING ──arrived──▶ READY ──leave_dram──▶ ABSENT
                 └────place────────────────────────▶ READY
    on SSD:   no ──on_ssd──▶ yes ──leave_ssd──▶ no
    dirty:    a chunk whose bytes are in DRAM only and shall be written behind. A chunk that the SSD tier let go of for
              room is *not* dirty again: it would be written and evicted in a circle. One that it declined is when used.
    held:     leased, loading or being written: it must stay where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Protocol, Self, TypeVar, cast

from kvdaemon.placement.placement import Placement
from kvdaemon.placement.runs import Node, Tier
from protocol.errors import InternalError
from protocol.messages import SsdRecord

V = TypeVar("V", bytes, int)


class Residence(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"


_STORED_AT_ONCE = 2048  # listed chunks told of without a pause: some milliseconds
_DIRTY, _WRITING, _PREFETCHED, _REUSED, _DECLINED = (1 << bit for bit in range(5))
_ASKED_FOR = _PREFETCHED | _REUSED | _DECLINED  # what changes when a chunk is asked for


class _Flag:
    """One bit of `Chunk.flags`, used like a field."""

    def __init__(self, bit: int) -> None:
        self._bit = bit

    def __get__(self, chunk: Chunk, owner: type) -> bool:
        return bool(chunk.flags & self._bit)

    def __set__(self, chunk: Chunk, value: bool) -> None:
        chunk.flags = chunk.flags | self._bit if value else chunk.flags & ~self._bit


class Chunk(Node):
    """One chunk. Changed by ChunkIndex and the placement only; `prefetched` by the store.

    A million of them are usual: what they say is kept in few fields, and equal values are one object.
    """

    __slots__ = (
        "chunk_id",
        "flags",
        "generation",
        "namespace",
        "parent_id",
        "residence",
        "slot",
        "ssd_bytes",
        "tokens",
    )

    dirty = _Flag(_DIRTY)
    writing = _Flag(_WRITING)
    prefetched = _Flag(_PREFETCHED)  # fetched on a hint, and not asked for since
    reused = _Flag(_REUSED)  # asked for since it was saved
    declined = _Flag(_DECLINED)  # not admitted to the SSD; clean, though its bytes are in DRAM only

    def __init__(self, chunk_id: bytes, parent_id: bytes, namespace: bytes, tokens: int) -> None:
        super().__init__()
        self.chunk_id = chunk_id
        self.parent_id = parent_id
        self.namespace = namespace
        self.tokens = tokens
        self.residence = Residence.ABSENT
        self.slot = -1
        self.generation = 0
        self.ssd_bytes = 0  # 0: not on SSD
        self.flags = 0

    @property
    def on_ssd(self) -> bool:
        return self.ssd_bytes > 0

    @property
    def leases(self) -> int:
        """Open leases on the chunk."""
        return self.holds - self.writing - (self.residence is Residence.LOADING)


class ChunkIndex:
    """Entries by chunk id: the placement's own, with more in them. One loop owns it.

    chunk_tokens: of a full chunk, once that is known; a smaller one is partial.
    """

    def __init__(self, placement: Placement, clock: Callable[[], float]) -> None:
        self.chunk_tokens = 0
        self.ssd_bytes = 0
        self._placement = placement
        self._clock = clock
        # Chunks are nodes of the placement's tree, where they are from their first tier to their last.
        self._chunks = cast(dict[bytes, Chunk], placement.tree.nodes)
        self._dirty: dict[bytes, Chunk] = {}  # in the order they were committed
        self._equal: dict[bytes | int, bytes | int] = {}  # values that many chunks have

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks, in no particular order."""
        return iter(self._chunks.values())

    def get(self, chunk_id: bytes) -> Chunk | None:
        return self._chunks.get(chunk_id)

    def leading(self, chunk_ids: Sequence[bytes], namespace: bytes) -> list[Chunk]:
        """The entries of these chunks, up to the first that is unknown or of another namespace."""
        found = []
        for chunk in map(self._chunks.get, chunk_ids):
            if chunk is None or chunk.namespace != namespace:
                break
            found.append(chunk)
        return found

    def new_listing(self) -> Listing:
        """An empty listing of what the SSD tier holds, to be filled page by page."""
        return Listing(self)

    def add(self, chunk_id: bytes, parent_id: bytes, namespace: bytes, tokens: int) -> Chunk:
        """The entry of this chunk; where there is none, a new one, which must be placed or stored next."""
        chunk = self._chunks.get(chunk_id)
        if chunk is None:
            parent = self._chunks.get(parent_id)
            parent_id = parent.chunk_id if parent is not None else parent_id
            chunk = Chunk(chunk_id, parent_id, self.one(namespace), tokens)
        return chunk

    def resident(self) -> Iterator[Chunk]:
        """Chunks in DRAM, LOADING ones too, in no particular order."""
        return (chunk for chunk in self._chunks.values() if chunk.residence is not Residence.ABSENT)

    def stored(self) -> Iterator[Chunk]:
        """Chunks on SSD, in no particular order."""
        return (chunk for chunk in self._chunks.values() if chunk.on_ssd)

    def dirty(self) -> Iterator[Chunk]:
        """Chunks to be written behind, oldest first."""
        return iter(self._dirty.values())

    @property
    def dram_chunks(self) -> int:
        return self._placement.tree.count("dram")

    @property
    def ssd_chunks(self) -> int:
        return self._placement.tree.count("ssd")

    @property
    def dirty_chunks(self) -> int:
        return len(self._dirty)

    def place(self, chunk: Chunk, slot: int, generation: int, residence: Residence) -> None:
        """The chunk now has a slot: LOADING, or READY and then dirty unless it is on SSD too."""
        if chunk.residence is not Residence.ABSENT or residence is Residence.ABSENT:
            raise InternalError(f"a chunk that is {chunk.residence.value} cannot be placed")
        chunk.slot, chunk.generation, chunk.residence = slot, generation, residence
        chunk.dirty = not chunk.on_ssd
        if chunk.dirty:
            self._dirty[chunk.chunk_id] = chunk
        self._tell_added("dram", chunk)
        if residence is Residence.LOADING:
            self.hold((chunk,))

    def arrived(self, chunk: Chunk) -> None:
        """A LOADING chunk is whole."""
        if chunk.residence is not Residence.LOADING:
            raise InternalError(f"a chunk that is {chunk.residence.value} cannot arrive")
        chunk.residence = Residence.READY
        self.release((chunk,))

    def leave_dram(self, chunk: Chunk) -> None:
        if chunk.residence is Residence.ABSENT:
            raise InternalError("a chunk that is absent cannot leave DRAM")
        if chunk.residence is Residence.LOADING:
            self.release((chunk,))
        self.mark_clean(chunk)
        chunk.slot, chunk.generation, chunk.residence = -1, 0, Residence.ABSENT
        chunk.prefetched = chunk.declined = False
        self._placement.removed("dram", chunk.chunk_id)

    def mark_dirty(self, chunk: Chunk) -> None:
        chunk.dirty, chunk.declined = True, False
        self._dirty[chunk.chunk_id] = chunk
        self._placement.unsaved(chunk.chunk_id)

    def mark_clean(self, chunk: Chunk) -> None:
        chunk.dirty = False
        self._dirty.pop(chunk.chunk_id, None)
        self._placement.saved(chunk.chunk_id)

    def decline(self, chunk: Chunk) -> None:
        """The SSD tier does not take a dirty chunk."""
        self.mark_clean(chunk)
        chunk.declined = True

    def store_on_ssd(self, chunk: Chunk, stored_bytes: int) -> None:
        """The SSD tier holds the chunk; where DRAM does too, it is clean."""
        was_stored = chunk.on_ssd
        self.ssd_bytes += stored_bytes - chunk.ssd_bytes
        chunk.ssd_bytes = self.one(stored_bytes)
        if not was_stored:
            self._tell_added("ssd", chunk)
        if chunk.dirty:
            self.mark_clean(chunk)

    def leave_ssd(self, chunk: Chunk) -> None:
        if not chunk.on_ssd:
            raise InternalError("a chunk that is not on SSD cannot leave it")
        self.ssd_bytes -= chunk.ssd_bytes
        chunk.ssd_bytes = 0
        self._placement.removed("ssd", chunk.chunk_id)

    def begin_write(self, chunk: Chunk) -> None:
        """Somebody writes the chunk to SSD until `end_write`."""
        chunk.writing = True
        self.hold((chunk,))

    def end_write(self, chunk: Chunk) -> None:
        chunk.writing = False
        self.release((chunk,))

    def use(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Somebody asks for these chunks. Returns those that were fetched on a hint, and not asked for since."""
        prefetched = []
        for chunk in chunks:
            if chunk.flags & _ASKED_FOR == _REUSED:
                continue  # most: it was asked for before, and there is nothing to note
            chunk.reused = True
            if chunk.declined:  # used again, it is worth more now
                self.mark_dirty(chunk)
            if chunk.prefetched:
                chunk.prefetched = False
                prefetched.append(chunk)
        return prefetched

    def hold(self, chunks: Iterable[Chunk]) -> None:
        """The chunks must stay where they are until `release` was said of each as often."""
        self._placement.hold_all(chunks)

    def release(self, chunks: Iterable[Chunk]) -> None:
        """A chunk that was taken away though held, and came back since, is another entry: it is not concerned."""
        self._placement.release_all(chunks)

    def _tell_added(self, tier: Tier, chunk: Chunk) -> None:
        is_partial = chunk.tokens < self.chunk_tokens
        self._placement.added(
            tier,
            chunk.chunk_id,
            chunk.parent_id,
            self._clock(),
            is_partial=is_partial,
            unsaved=chunk.dirty,
            node=chunk,
        )

    def one(self, value: V) -> V:
        """The first object equal to `value` that was seen."""
        return cast(V, self._equal.setdefault(value, value))


class Listing:
    """What the SSD tier says that it holds, in the form that the index keeps: a page is garbage once it is added."""

    def __init__(self, index: ChunkIndex) -> None:
        self._index = index
        self._chunks: dict[bytes, Chunk] = {}
        self._sizes: list[int] = []
        self.most_tokens = 0  # in a chunk

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self._chunks

    def add(self, records: Iterable[SsdRecord]) -> Self:
        """A page more."""
        for record in records:
            chunk = self._index.add(record.chunk_id, record.parent_id, record.namespace, record.tokens)
            self._chunks[chunk.chunk_id] = chunk
            self._sizes.append(self._index.one(record.bytes))
            self.most_tokens = max(self.most_tokens, record.tokens)
        return self

    def store(self) -> Iterator[None]:
        """Tell the index of all chunks, pausing often."""
        sizes = dict(zip(self._chunks, self._sizes, strict=True))
        for place, listed in enumerate(parents_first(self._chunks.values())):
            # Between the pages and now it may have come into DRAM, as another entry.
            self._index.store_on_ssd(self._index.get(listed.chunk_id) or listed, sizes[listed.chunk_id])
            if place % _STORED_AT_ONCE == 0:
                yield


class Described(Protocol):
    """Whatever tells of a chunk."""

    @property
    def chunk_id(self) -> bytes: ...
    @property
    def parent_id(self) -> bytes: ...


D = TypeVar("D", bound=Described)


def parents_first(items: Iterable[D]) -> Iterator[D]:
    """The same items, each after the one whose chunk comes before its own in the context."""
    waiting = {item.chunk_id: item for item in items}
    for first in list(waiting):
        path: list[D] = []
        at = waiting.pop(first, None)
        while at is not None:
            path.append(at)
            at = waiting.pop(at.parent_id, None)
        yield from reversed(path)
