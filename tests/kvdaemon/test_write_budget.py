"""The SSD's write budget, through the daemon: what is written, what is declined, and that nothing else breaks."""

from __future__ import annotations

import asyncio
from pathlib import Path

from protocol.arena import Geometry
from protocol.messages import ChunkPlaces, LocateChunks
from tests.kvdaemon.client import DaemonProcess, Kv, StoreClient, eventually, make_chain, metric, running_daemon

_MIB = 1024 * 1024
_GEOMETRY = Geometry(layers=4, key_bytes=2048, value_bytes=2048, chunk_tokens=32)  # 512 KiB a chunk
_CHUNK = _GEOMETRY.slot_bytes
_HOUR = 16 * _CHUNK  # what may be written in a burst


async def settled(daemon: DaemonProcess) -> None:
    await eventually(lambda: "cachedattention_write_behind_queue 0.0" in daemon.metrics(), "all written or declined")


def test_first_uses_stop_at_half_and_second_uses_go_on(tmp_path: Path) -> None:
    """Forty chunks are saved: the SSD takes what the budget allows, the others stay in DRAM and hit there; those that
    are used again are written then; those that nobody uses are evicted, counted, and a miss."""
    chunks = [make_chain(_GEOMETRY, 1, seed) for seed in range(40)]

    async def on_ssd(client: StoreClient) -> int:
        return (await client.status()).ssd.chunks

    async def evict(client: StoreClient, chain: list[Kv]) -> None:
        """Save others until this one is not in DRAM any more. Asks without using it."""
        for seed in range(1000, 1400):
            question = LocateChunks((chain[0].chunk_id,))
            (place,) = (await client.rpc.request(question, ChunkPlaces, 5.0)).places
            if place.dram_bytes == 0:
                return
            await client.save(make_chain(_GEOMETRY, 1, seed))
        raise AssertionError("it is never evicted")

    async def main() -> None:
        client = await StoreClient(daemon.run_dir, _GEOMETRY).start()
        for chain in chunks:
            await client.save(chain)
        await settled(daemon)
        first = await on_ssd(client)
        assert 4 <= first <= 9  # half of 16, less what the disk counts beside them
        text = daemon.metrics()
        assert metric(text, "cachedattention_declined_bytes_total") == (40 - first) * _CHUNK
        assert metric(text, "cachedattention_ssd_write_budget_bytes") <= _HOUR / 2
        assert '"ok"' in daemon.health()
        assert [await client.load(chain) for chain in chunks[-3:]] == [["dram"]] * 3
        await settled(daemon)
        assert await on_ssd(client) == first + 3
        await evict(client, chunks[20])  # never used again
        await evict(client, chunks[-1])
        text = daemon.metrics()
        assert metric(text, 'cachedattention_evictions_total{reason="declined",tier="dram"}') > 0
        assert metric(text, 'cachedattention_evictions_total{reason="unsaved",tier="dram"}') == 0
        assert (await client.acquire([chunks[20][0].chunk_id])).miss_reason == "evicted"
        assert [await client.load(chain) for chain in chunks[-3:]] == [["ssd"]] * 3

        def counted() -> str:
            text = daemon.metrics()
            written = metric(text, "cachedattention_ssd_disk_written_bytes_total")
            return text if written >= (first + 3) * _CHUNK else ""

        text = await eventually(counted, "flushed and counted")
        written = metric(text, "cachedattention_ssd_disk_written_bytes_total")
        # At most the burst, the chunk that overdrew it, and what RocksDB writes for itself before it is counted.
        assert written <= _HOUR + _CHUNK + _MIB
        assert metric(text, 'cachedattention_reused_bytes_total{tier="ssd"}') >= 3 * _CHUNK
        ratio = metric(text, "cachedattention_ssd_written_bytes_per_reused_byte")
        assert ratio == written / metric(text, 'cachedattention_reused_bytes_total{tier="ssd"}')
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=48 * _MIB, ssd_write_budget_bytes=24 * _HOUR) as daemon:
        asyncio.run(main())


def test_without_a_budget_everything_is_written(tmp_path: Path) -> None:
    async def main() -> None:
        client = await StoreClient(daemon.run_dir, _GEOMETRY).start()
        for seed in range(40):
            await client.save(make_chain(_GEOMETRY, 1, seed))
        await settled(daemon)
        assert (await client.status()).ssd.chunks == 40
        assert metric(daemon.metrics(), "cachedattention_declined_bytes_total") == 0
        assert "cachedattention_ssd_write_budget_bytes +Inf" in daemon.metrics()
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=48 * _MIB) as daemon:
        asyncio.run(main())
