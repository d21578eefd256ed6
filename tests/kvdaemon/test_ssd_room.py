"""Room in the SSD tier: who waits for it, who makes it, and what happens where nothing can be reclaimed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvdaemon.ssd.tables import ChunkRecord, Tables
from kvdaemon.ssd.worker import SsdWorker
from protocol.arena import Arena, Geometry, SlotState, layer_checksum
from protocol.errors import CapacityError
from protocol.messages import Ack, AttachArena, SsdDelete, SsdWrite, SsdWritten
from protocol.rpc import RpcClient

_MIB = 1024 * 1024
_GEOMETRY = Geometry(layers=2, key_bytes=4096, value_bytes=4096, chunk_tokens=32)  # 512 KiB a chunk


def chunk_id(n: int) -> bytes:
    return n.to_bytes(16, "little")


def arena_with_a_chunk(path: Path, geometry: Geometry = _GEOMETRY) -> Arena:
    arena = Arena.create(path, geometry, 2 * geometry.slot_bytes)
    arena.take(0, SlotState.RESERVED, b"c" * 16)
    for layer in range(geometry.layers):
        arena.set_layer_ready(0, layer, layer_checksum(*arena.layer(0, layer, 32)))
    arena.set_identity(0, b"new chunk new ch", bytes(16), bytes(16), 32)
    arena.seal(0)
    arena.set_state(0, SlotState.READY)
    return arena


def test_a_full_tier_without_garbage_says_so(tmp_path: Path) -> None:
    """Live chunks up to the limit: a write is answered "full" instead of waiting for ever; when the front has let some
    of them go, their space is reclaimed and the same write succeeds."""
    capacity = 32 * _MIB
    tables = Tables(tmp_path / "ssd", capacity)
    count = 0
    while tables.used_bytes() < 0.95 * capacity:
        record = ChunkRecord(
            chunk_id(count), bytes(16), bytes(16), _GEOMETRY.digest(), 32, 512 * 1024, 100.0 + count, (1, 2)
        )
        tables.put_chunk(record, [os.urandom(256 * 1024)] * 2)
        tables.flush()
        count += 1

    async def main(client: RpcClient, write: SsdWrite) -> None:
        assert await client.request(write, SsdWritten, 30.0) == SsdWritten(0, "full")
        await client.request(SsdDelete(tuple(map(chunk_id, range(count // 4)))), Ack, 10.0)
        assert await client.request(write, SsdWritten, 30.0) == SsdWritten(_GEOMETRY.slot_bytes, "ok")
        assert tables.physical_bytes() < 0.95 * capacity

    asyncio.run(with_worker(tables, capacity, arena_with_a_chunk(tmp_path / "arena"), main))


def test_a_chunk_larger_than_the_tier(tmp_path: Path) -> None:
    """Room that can never be: an error that says so, and degrades the store, instead of a wait."""
    geometry = Geometry(layers=2, key_bytes=256 * 1024, value_bytes=256 * 1024, chunk_tokens=32)  # 32 MiB

    async def main(client: RpcClient, write: SsdWrite) -> None:
        with pytest.raises(CapacityError, match="too small for chunks of 33554432 bytes"):
            await client.request(write, SsdWritten, 30.0)

    tables = Tables(tmp_path / "ssd", 32 * _MIB)
    arena = arena_with_a_chunk(tmp_path / "arena", geometry)
    asyncio.run(with_worker(tables, 32 * _MIB, arena, main))


async def with_worker(
    tables: Tables, capacity: int, arena: Arena, test: Callable[[RpcClient, SsdWrite], Awaitable[None]]
) -> None:
    """Run a test against a worker of these tables that maps this arena; what it writes is the chunk in slot 0."""
    endpoint = f"ipc://{tables.path.parent}/ssd.sock"
    worker = SsdWorker(endpoint, tables, capacity)
    await worker.start()
    client = RpcClient(endpoint, "kvdaemon")
    await client.start()
    try:
        await client.wait_connected(10.0)
        await client.request(AttachArena(str(arena.path), arena.arena_id), Ack, 10.0)
        await test(client, SsdWrite(0, arena.generation(0)))
    finally:
        await client.stop()
        await worker.stop()
        arena.close()
