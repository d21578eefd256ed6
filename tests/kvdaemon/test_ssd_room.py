"""Room in the SSD tier: who takes it, and what happens where there is none."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdaemon.ssd.chunk_files import ChunkFiles
from kvdaemon.ssd.tables import ChunkRecord, Tables
from kvdaemon.ssd.transfer import check_layers
from kvdaemon.ssd.worker import SsdWorker, open_tier, stored_bytes
from protocol.arena import Arena, Geometry, SlotState, layer_checksum
from protocol.errors import CapacityError
from protocol.messages import Ack, AttachArena, SsdDelete, SsdWrite, SsdWritten
from protocol.rpc import RpcClient

_MIB = 1024 * 1024
_NOTES = 64 * 1024  # blocks in which the file system notes where a file's others are
_GEOMETRY = Geometry(layers=2, key_bytes=4096, value_bytes=4096, chunk_tokens=32)  # 512 KiB a chunk


def chunk_id(n: int) -> bytes:
    return n.to_bytes(16, "little")


def arena_with_a_chunk(path: Path, geometry: Geometry = _GEOMETRY, tokens: int = 32) -> Arena:
    """Its KV says "mine", what an earlier one left in the slot "STALE"."""
    arena = Arena.create(path, geometry, 2 * geometry.slot_bytes)
    arena.take(0, SlotState.RESERVED, b"c" * 16)
    for layer in range(geometry.layers):
        for count, text in ((32, b"STALE"), (tokens, b"mine")):
            for view in arena.layer(0, layer, count):
                view[:] = np.resize(np.frombuffer(text, np.uint8), len(view))
        arena.set_layer_ready(0, layer, layer_checksum(*arena.layer(0, layer, tokens)))
    arena.set_identity(0, b"new chunk new ch", bytes(16), bytes(16), tokens)
    arena.seal(0)
    arena.set_state(0, SlotState.READY)
    return arena


def test_a_full_tier_says_so(tmp_path: Path) -> None:
    """Chunks up to the limit: a write is answered "full"; when the front has let some of them go, the same write
    succeeds. What no record speaks of is freed at the start."""
    capacity = 32 * _MIB
    tables, files, _ = open_tier(tmp_path / "ssd", capacity)
    count = 0
    noise = memoryview(mmap.mmap(-1, _GEOMETRY.slot_bytes))
    noise[:] = os.urandom(_GEOMETRY.slot_bytes)
    while files.physical_bytes() < 0.93 * capacity:
        place = files.take(_GEOMETRY.slot_bytes)
        files.write(place, 0, noise)
        size = _GEOMETRY.slot_bytes
        tables.put_chunk(
            ChunkRecord(chunk_id(count), bytes(16), bytes(16), _GEOMETRY.digest(), 32, size, place, 1.0, (1, 2))
        )
        count += 1
    full = files.physical_bytes()
    files.write(files.take(_GEOMETRY.slot_bytes), 0, noise)  # its record never came

    async def main(client: RpcClient, write: SsdWrite) -> None:
        assert await client.request(write, SsdWritten, 30.0) == SsdWritten(0, "full")
        assert files.physical_bytes() == pytest.approx(full, abs=_NOTES)
        await client.request(SsdDelete(tuple(map(chunk_id, range(count // 4)))), Ack, 10.0)
        assert files.physical_bytes() == pytest.approx(full - (count // 4) * _GEOMETRY.slot_bytes, abs=_NOTES)
        assert await client.request(write, SsdWritten, 30.0) == SsdWritten(_GEOMETRY.slot_bytes, "ok")

    asyncio.run(with_worker(tables, files, capacity, arena_with_a_chunk(tmp_path / "arena"), main))


def test_a_chunk_larger_than_the_tier(tmp_path: Path) -> None:
    """Room that can never be: an error that says so, and degrades the store, instead of a wait."""
    geometry = Geometry(layers=2, key_bytes=256 * 1024, value_bytes=256 * 1024, chunk_tokens=32)  # 32 MiB

    async def main(client: RpcClient, write: SsdWrite) -> None:
        with pytest.raises(CapacityError, match="too small for chunks of 33554432 bytes"):
            await client.request(write, SsdWritten, 30.0)

    tables, files, _ = open_tier(tmp_path / "ssd", 32 * _MIB)
    arena = arena_with_a_chunk(tmp_path / "arena", geometry)
    asyncio.run(with_worker(tables, files, 32 * _MIB, arena, main))


def test_a_partial_chunk_takes_its_pages(tmp_path: Path) -> None:
    """And no byte that an earlier chunk left in the slot gets to the disk."""

    async def main(client: RpcClient, write: SsdWrite) -> None:
        assert await client.request(write, SsdWritten, 30.0) == SsdWritten(5 * _GEOMETRY.token_bytes, "ok")
        assert files.physical_bytes() == stored_bytes(_GEOMETRY, 5) == 2 * 40960
        content = (tmp_path / "ssd" / "chunks" / str(_GEOMETRY.slot_bytes)).read_bytes()
        assert b"mine" * 16 in content
        assert b"STALE" not in content

    tables, files, _ = open_tier(tmp_path / "ssd", 32 * _MIB)
    arena = arena_with_a_chunk(tmp_path / "arena", tokens=5)
    asyncio.run(with_worker(tables, files, 32 * _MIB, arena, main))


@pytest.mark.parametrize("work", ["write", "delete"])
def test_a_worker_that_stops_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """A record is put, or deleted, just as the worker is told to end: what a record speaks of is there, and what none
    speaks of is not."""
    tables, files, _ = open_tier(tmp_path / "ssd", 32 * _MIB)
    arena = arena_with_a_chunk(tmp_path / "arena")
    put_chunk, delete_chunks = tables.put_chunk, tables.delete_chunks
    reached = threading.Event()

    def slowly(done: Any) -> Any:
        reached.set()
        time.sleep(0.5)
        return done

    async def main(client: RpcClient, write: SsdWrite) -> None:
        delete = SsdDelete((b"new chunk new ch",))
        if work == "write":
            monkeypatch.setattr(tables, "put_chunk", lambda record: slowly(put_chunk(record)))
            request = client.request(write, SsdWritten, 10.0)
        else:
            assert (await client.request(write, SsdWritten, 10.0)).outcome == "ok"
            monkeypatch.setattr(tables, "delete_chunks", lambda ids: slowly(delete_chunks(ids)))
            request = client.request(delete, Ack, 10.0)  # type: ignore[assignment]
        asking = asyncio.ensure_future(request)
        assert await asyncio.to_thread(reached.wait, 10.0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(with_worker(tables, files, 32 * _MIB, arena, main))
    tables, files, _ = open_tier(tmp_path / "ssd", 32 * _MIB)
    found = list(tables.records(b"", 10))
    assert len(found) == (work == "write")
    for record in found:
        assert isinstance(record, ChunkRecord)
        assert check_layers(files, record, range(record.layers))
    assert files.physical_bytes() == len(found) * _GEOMETRY.slot_bytes
    files.close()
    tables.close()


async def with_worker(
    tables: Tables,
    files: ChunkFiles,
    capacity: int,
    arena: Arena,
    test: Callable[[RpcClient, SsdWrite], Awaitable[None]],
) -> None:
    """Run a test against a worker of these tables that maps this arena; what it writes is the chunk in slot 0."""
    endpoint = f"ipc://{tables.path.parent}/ssd.sock"
    worker = SsdWorker(endpoint, tables, files, capacity)
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
