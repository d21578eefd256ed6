"""Between a slot of the arena and a place in the chunk files: a few layers at a time, every one verified on its way.

A full chunk goes straight from one to the other. Of a partial one, keys and values lie apart in the arena and together
in the file; it goes through a buffer.

All of it blocks, and is for threads that may wait for the disk.
"""

from __future__ import annotations

import mmap
import threading

import numpy as np
import xxhash

from kvdaemon.failpoints import reach
from kvdaemon.ssd.chunk_files import ChunkFiles
from kvdaemon.ssd.tables import ChunkRecord
from protocol.arena import PAGE_BYTES, Arena, Bytes
from protocol.errors import PeerError

_local = threading.local()


def write_layers(files: ChunkFiles, record: ChunkRecord, arena: Arena, slot: int, layers: range) -> bool:
    """Write layers of the chunk in a slot to the record's place. False: they do not have the record's checksums.

    Raises CapacityError: the disk is full; PeerError: it says no.
    """
    if record.tokens == arena.geometry.chunk_tokens:
        data = arena.layers(slot, layers)
        if not _are_intact(data, record, layers):
            return False
        files.write(record.place, layers.start * record.layer_stride, data.data)
        return True
    buffer = _buffer(_whole_pages(record.layer_bytes))
    buffer[record.layer_bytes :] = 0
    for layer in layers:
        key, value = arena.layer(slot, layer, record.tokens)
        np.concatenate((key, value), out=buffer[: record.layer_bytes])
        if not _are_intact(buffer, record, range(layer, layer + 1)):
            return False
        files.write(record.place, layer * record.layer_stride, buffer.data)
    return True


def read_layers(files: ChunkFiles, record: ChunkRecord, arena: Arena, slot: int, layers: range) -> bool:
    """Read layers from the record's place into a slot. False: what is there is not what was written."""
    reach("layer.before")
    is_intact = _read_layers(files, record, arena, slot, layers)
    reach("layer.read")
    return is_intact


def _read_layers(files: ChunkFiles, record: ChunkRecord, arena: Arena, slot: int, layers: range) -> bool:
    if record.tokens == arena.geometry.chunk_tokens:
        return _read(files, record, layers, arena.layers(slot, layers))
    buffer = _buffer(_whole_pages(record.layer_bytes))
    for layer in layers:
        if not _read(files, record, range(layer, layer + 1), buffer):
            return False
        key, value = arena.layer(slot, layer, record.tokens)
        np.copyto(key, buffer[: len(key)])
        np.copyto(value, buffer[len(key) : len(key) + len(value)])
    return True


def check_layers(files: ChunkFiles, record: ChunkRecord, layers: range) -> bool:
    """Whether what is at the record's place is what was written."""
    buffer = _buffer(_whole_pages(record.layer_bytes))
    return all(_read(files, record, range(layer, layer + 1), buffer) for layer in layers)


def _read(files: ChunkFiles, record: ChunkRecord, layers: range, into: Bytes) -> bool:
    try:
        files.read(record.place, layers.start * record.layer_stride, into.data)
    except PeerError:  # cut short, or the disk cannot read it
        return False
    return _are_intact(into, record, layers)


def _are_intact(data: Bytes, record: ChunkRecord, layers: range) -> bool:
    """data: the layers, one behind the other."""
    starts = range(0, len(layers) * record.layer_stride, record.layer_stride)
    return all(
        xxhash.xxh3_64_intdigest(data[start : start + record.layer_bytes].data) == record.checksums[layer]
        for start, layer in zip(starts, layers, strict=True)
    )


def _buffer(size: int) -> Bytes:
    """Page-aligned memory of this thread, until it asks again. # [size] uint8"""
    memory: Bytes | None = getattr(_local, "memory", None)
    if memory is None or len(memory) < size:
        memory = _local.memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    return memory[:size]


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES
