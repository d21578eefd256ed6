"""The scrub finds what changed where it lay, though nobody loads it, and puts it aside."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvdaemon.dram import DramTier
from kvdaemon.placement.lru import LeastRecentlyUsed
from kvdaemon.scrub import Scrubber
from kvdaemon.store import Store
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.registry import new_registry
from protocol.arena import Arena, SlotState
from protocol.ids import ROOT
from protocol.messages import ScrubProgress, ScrubReport, ScrubStore
from tests.kvdaemon.client import SMALL, StoreClient, eventually, make_chain, metric, running_daemon, stored_files
from tests.kvdaemon.contexts import make_turn, save_turn, tokens


async def scrub(client: StoreClient) -> tuple[ScrubReport, list[ScrubProgress]]:
    parts = [part async for part in client.rpc.stream(ScrubStore(), 60.0, 30.0)]
    report = parts.pop()
    assert isinstance(report, ScrubReport)
    return report, parts  # type: ignore[return-value]


async def on_ssd(client: StoreClient, chunks: int) -> None:
    async def all_there() -> bool:
        return (await client.status()).ssd.chunks == chunks

    await eventually(all_there, "all chunks on SSD")


@pytest.mark.parametrize("damage", ["key", "value", "checksum", "tokens", "chunk id", "ready layers"])
def test_a_damaged_chunk_that_nobody_loads_is_found(tmp_path: Path, damage: str) -> None:
    """In the data or in the table: counted, quarantined, then served from SSD; its neighbours are untouched."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        chain = make_chain(SMALL, 5, seed=1)
        await client.save(chain)
        await on_ssd(client, 5)
        arena = client.arena
        assert arena is not None
        (slot,) = [slot for slot in range(arena.slots) if arena.chunk_id(slot) == chain[2].chunk_id]
        match damage:
            case "key":
                arena.layer(slot, 1, 32)[0][100] ^= 4
            case "value":
                arena.layer(slot, 2, 32)[1][-1] ^= 128
            case "checksum":
                arena._checksums[slot, 0] ^= 1
            case "tokens":
                arena._tokens[slot] = 31
            case "chunk id":
                arena._set_id("chunk_id", slot, b"x" * 16)
            case "ready layers":
                arena._ready[slot] = 1
        await eventually(lambda: metric(daemon.metrics(), 'cachedattention_corrupt_total{where="dram"}') == 1, "found")
        assert await client.load(chain) == ["dram", "dram", "ssd", "dram", "dram"]
        assert metric(daemon.metrics(), 'cachedattention_scrubbed_bytes_total{tier="dram"}') > 0
        await client.stop()

    with running_daemon(tmp_path) as daemon:
        asyncio.run(main())


def test_verify_reads_everything_and_finds_all_damage(tmp_path: Path) -> None:
    """With the background scrub off: both tiers and the manifests are read once, and each damage is named."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        turns = [make_turn(tokens(32 * 3 + 10, seed)) for seed in range(20)]
        for turn in turns:
            await save_turn(client, turn)
        await on_ssd(client, 80)
        report, progress = await scrub(client)
        assert (report.dram_chunks, report.ssd_chunks, report.manifests) == (80, 80, 20)
        assert report.dram_bytes == report.ssd_bytes == 20 * (32 * 3 + 9) * SMALL.token_bytes
        assert (report.dram_damaged, report.ssd_damaged, report.manifests_damaged, report.problem) == ((), (), (), "")
        assert {part.tier for part in progress} == {"dram", "ssd", "manifests"}
        await client.stop()
        assert daemon.terminate() == 0
        (daemon.run_dir / "arena").unlink()
        victim = turns[7].chain[1]
        (path,) = [path for path in stored_files(daemon.data_dir) if victim.layers[1][0].tobytes() in path.read_bytes()]
        raw = bytearray(path.read_bytes())
        raw[raw.index(victim.layers[1][0].tobytes()) + 20] ^= 1
        path.write_bytes(raw)
        daemon.start()
        client = await StoreClient(daemon.run_dir).start()
        report, _ = await scrub(client)
        assert report.ssd_damaged == (victim.chunk_id,)
        assert metric(daemon.metrics(), 'cachedattention_corrupt_total{where="ssd"}') == 1
        assert (await client.status()).ssd.chunks == 79
        assert await client.load(turns[7].chain) == ["ssd"]
        again, _ = await scrub(client)
        assert not again.ssd_damaged
        assert again.ssd_chunks == 79
        await client.stop()

    with running_daemon(tmp_path, scrub_bytes_per_s=0) as daemon:
        asyncio.run(main())


def test_a_slot_that_changed_hands_meanwhile_is_no_damage(tmp_path: Path) -> None:
    """The thread has begun to read when the chunk is evicted and its slot taken for another: nothing is quarantined,
    and the event loop was free all the time."""

    class Ssd:
        can_read = can_write = False

    async def main() -> None:
        store = Store(LeastRecentlyUsed(), Ssd(), KvDaemonMetrics(new_registry()), "sample")
        arena = Arena.create(tmp_path / "arena", SMALL, 3 * SMALL.slot_bytes)
        dram = DramTier(arena)
        slot = dram.reserve(b"c" * 16)
        for layer in range(SMALL.layers):
            arena.set_layer_ready(slot, layer, 0)
        dram.commit(slot, b"1" * 16, ROOT, ROOT, 32)
        assert arena.state(slot) is SlotState.READY
        store.bind(dram, [slot])
        reading, go_on = threading.Event(), threading.Event()
        verify_layer: Callable[[int, int, int], bool] = arena.verify_layer

        def verify_slowly(slot: int, layer: int, tokens: int) -> bool:
            reading.set()
            assert go_on.wait(10)
            return verify_layer(slot, layer, tokens)  # false: zeros do not have the checksum 0

        arena.verify_layer = verify_slowly  # type: ignore[method-assign]
        scrubber = Scrubber(store, None, KvDaemonMetrics(new_registry()), asyncio.Lock(), 0)

        async def nowhere(part: ScrubProgress) -> None:
            pass

        report = asyncio.ensure_future(scrubber.everything(nowhere))
        await asyncio.to_thread(reading.wait, 10)
        (chunk,) = store.index.resident()
        dram.drop(slot)
        store.index.leave_dram(chunk)
        assert dram.reserve(b"d" * 16) == slot
        go_on.set()
        assert (await report).dram_damaged == ()
        assert dram.state(slot) is SlotState.RESERVED
        # And without anybody in between it is damage.
        dram.commit(slot, b"2" * 16, ROOT, ROOT, 32)
        for layer in range(SMALL.layers):
            arena.set_layer_ready(slot, layer, 0)
        other = store.index.add(b"2" * 16, ROOT, ROOT, 32)
        store.index.place(other, slot, dram.generation(slot), type(chunk.residence).READY)
        assert (await scrubber.everything(nowhere)).dram_damaged == (b"2" * 16,)
        assert store.index.get(b"2" * 16) is None
        arena.close()

    asyncio.run(main())
