"""Bytes that changed where they lay are never served: found by checksum, counted, put aside."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.arena import Arena, SlotState
from protocol.messages import Commit, Committed
from tests.kvdaemon.client import (
    SMALL,
    DaemonProcess,
    StoreClient,
    eventually,
    make_chain,
    metric,
    running_daemon,
    stored_files,
    written_behind,
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, verify="always") as process:
        yield process


def test_flipped_bytes_in_the_arena_while_the_daemon_is_down(daemon: DaemonProcess) -> None:
    """In data, checksums, token counts or ready layers: adoption frees such slots, counts them, and SSD serves them."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        chains = [make_chain(SMALL, 1, seed) for seed in range(8)]
        for chain in chains:
            await client.save(chain)
        await written_behind(daemon)
        await client.stop()
        assert daemon.terminate() == 0
        arena = Arena.open(daemon.run_dir / "arena")
        slots = {arena.chunk_id(s): s for s in range(arena.slots) if arena.state(s) is SlotState.READY}
        damaged = [slots[chain[0].chunk_id] for chain in chains[:6]]
        arena.layer(damaged[0], 0, 1)[0][0] ^= 1
        arena.layer(damaged[1], SMALL.layers - 1, 32)[1][-1] ^= 0x80
        arena._checksums[damaged[2], 1] ^= 1
        arena._tokens[damaged[3]] = 31
        arena._ready[damaged[4]] = SMALL.layers - 1
        arena._state[damaged[5]] = 77
        arena.close()
        daemon.start()
        client = await StoreClient(daemon.run_dir).start()
        assert metric(daemon.metrics(), 'cachedattention_corrupt_total{where="adoption"}') == 6
        for n, chain in enumerate(chains):
            assert await client.load(chain) == ["ssd" if n < 6 else "dram"]
        await client.stop()

    asyncio.run(main())


def test_flipped_bytes_under_a_running_daemon(daemon: DaemonProcess) -> None:
    """Before it is written behind: the worker finds it, and it is never on SSD, nor handed out again."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        kv = make_chain(SMALL, 1, seed=1)[0]
        (slot,) = await client.reserve(1)
        client.fill(slot.slot, kv)
        assert client.arena is not None
        client.arena.layer(slot.slot, 1, 1)[1][0] ^= 1  # after the checksum was noted, before the commit
        reply = await client.rpc.request(Commit((client.committed(slot, kv),)), Committed, 5.0)
        assert reply.accepted == (True,)
        await eventually(
            lambda: metric(daemon.metrics(), 'cachedattention_corrupt_total{where="dram"}') == 1, "found and counted"
        )
        acquired = await client.acquire([kv.chunk_id])
        assert (acquired.chunks, acquired.miss_reason) == ((), "corrupt")
        assert (await client.status()).ssd.chunks == 0
        await client.stop()

    asyncio.run(main())


@pytest.mark.parametrize("where", ["anywhere", "chunks"])
@pytest.mark.parametrize("seed", range(2))
def test_flipped_bytes_on_ssd(daemon: DaemonProcess, seed: int, where: str) -> None:
    """Bytes changed in the tier's files: each chunk comes back bit-equal or not at all, and new chunks are taken.

    Anywhere: RocksDB may not open at all any more. In the chunk files: only the chunks hit are lost.
    """
    random_ = random.Random(seed)

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        chains = [make_chain(SMALL, 1, n) for n in range(60)]
        for chain in chains:
            await client.save(chain)
        await written_behind(daemon)
        await client.stop()
        assert daemon.terminate() == 0
        (daemon.run_dir / "arena").unlink()
        for path in stored_files(daemon.data_dir):
            if path.parent.name != "chunks" and (where == "chunks" or path.suffix != ".sst"):
                continue
            raw = bytearray(path.read_bytes())
            for _ in range(20 if where == "anywhere" else 5):
                raw[random_.randrange(len(raw))] ^= 1 << random_.randrange(8)
            path.write_bytes(raw)
        daemon.start()
        client = await StoreClient(daemon.run_dir).start()
        served = 0
        for chain in chains:
            served += len(await client.load(chain))  # compares every byte
        if where == "chunks":
            assert 60 - 5 <= served < 60
            assert metric(daemon.metrics(), 'cachedattention_corrupt_total{where="ssd"}') == 60 - served
        assert served < 60
        await eventually(lambda: metric(daemon.metrics(), "cachedattention_corrupt_total{") > 0, "counted")
        fresh = make_chain(SMALL, 3, seed=1000)
        await client.save(fresh)
        assert await client.load(fresh) == ["dram"] * 3
        await client.stop()

    asyncio.run(main())


def test_a_destroyed_database_is_moved_aside(daemon: DaemonProcess) -> None:
    """No byte of it can be trusted: kept beside, counted, and an empty one takes its place."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 3, seed=1)
        await client.save(context)
        await written_behind(daemon)
        await client.stop()
        assert daemon.terminate() == 0
        for path in stored_files(daemon.data_dir):
            path.write_bytes(b"nonsense" * 10)
        daemon.start()
        client = await StoreClient(daemon.run_dir).start()
        assert await client.load(context) == ["dram"] * 3
        await eventually(
            lambda: metric(daemon.metrics(), 'cachedattention_corrupt_total{where="ssd_database"}') == 1, "counted"
        )
        assert len(list(daemon.data_dir.glob("ssd.damaged-*"))) == 1
        await written_behind(daemon)  # the adopted chunks are in the new database
        assert (await client.status()).ssd.chunks == 3
        await client.stop()

    asyncio.run(main())
