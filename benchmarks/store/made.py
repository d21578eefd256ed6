"""Many made chunks: their records, as the worker lists them, and an arena that holds them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from protocol.arena import PAGE_BYTES, Arena, Geometry, SlotState, layer_checksum
from protocol.codec import Frame, decode, encode
from protocol.ids import ID_BYTES, ROOT, digest
from protocol.messages import SsdPage, SsdRecord

TINY = Geometry(layers=1, key_bytes=1, value_bytes=1, chunk_tokens=1)  # a slot is one page
NAMESPACE = digest("benchmark", b"index")
_PAGE_RECORDS = 4096
_PER_CONVERSATION = 16  # chunks; after them the next lineage begins


def records(chunks: int) -> Iterator[SsdRecord]:
    """Records of conversations of 16 chunks, the older ones written first."""
    ids = np.random.default_rng(1).bytes(chunks * ID_BYTES)
    parent = ROOT
    for i in range(chunks):
        chunk_id = ids[i * ID_BYTES : (i + 1) * ID_BYTES]
        yield SsdRecord(chunk_id, parent, NAMESPACE, 256, 6 * 2**20, 1.7e9 + i * 1e-3)
        parent = ROOT if i % _PER_CONVERSATION == _PER_CONVERSATION - 1 else chunk_id


def listing(chunks: int) -> list[SsdRecord]:
    """The same records as they come from the worker."""
    return list(itertools.chain.from_iterable(pages(chunks)))


def pages(chunks: int) -> Iterator[list[SsdRecord]]:
    """The same, page by page through the codec."""
    coming = records(chunks)
    while page := list(itertools.islice(coming, _PAGE_RECORDS)):
        yield _sent(page)


def _sent(page: list[SsdRecord]) -> list[SsdRecord]:
    body = decode(encode(Frame("end", 1, SsdPage(page, more=True)))).body
    assert isinstance(body, SsdPage)
    return list(body.records)


def arena_bytes(chunks: int) -> int:
    """The --dram that gives an arena of `chunks` slots."""
    return chunks * (TINY.slot_bytes + TINY.entry_bytes) + 2 * PAGE_BYTES


def filled_arena(path: Path, chunks: int) -> Arena:
    """An arena of `chunks` one-page slots, each READY with the chunk of the same place in `records`."""
    arena = Arena.create(path, TINY, arena_bytes(chunks))
    assert arena.slots == chunks
    checksum = layer_checksum(*arena.layer(0, 0, 1))
    for slot, record in enumerate(records(chunks)):
        arena.take(slot, SlotState.READY, ROOT)
        arena.set_layer_ready(slot, 0, checksum)
        arena.set_identity(slot, record.chunk_id, record.parent_id, record.namespace, 1)
        arena.seal(slot)
    return arena
