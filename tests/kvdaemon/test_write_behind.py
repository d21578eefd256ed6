"""When chunks are written behind: a few wait for others, many do not, and none is left behind at a stop."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest

from kvdaemon.config import KvDaemonConfig
from kvdaemon.service import KvDaemon
from protocol.messages import Ack, Unreserve
from tests.kvdaemon.client import SMALL, StoreClient, eventually, make_chain

_SLOTS = 64  # four chunks are as many as wait for others


def test_a_few_chunks_wait_for_others_and_a_stop_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wait has no end, three chunks stay in DRAM and four are written; a stop writes the one behind them."""
    monkeypatch.setattr("kvdaemon.write_behind._GATHER_S", 1e6)

    def make(run_dir: Path) -> KvDaemon:
        dram_bytes = _SLOTS * (SMALL.slot_bytes + SMALL.entry_bytes) + 2 * 4096
        endpoint = f"ipc://{run_dir}/kvdaemon.sock"
        return KvDaemon(KvDaemonConfig(run_dir, tmp_path, endpoint, dram_bytes, 64 * 2**20, metrics_port=0))

    async def main(run_dir: Path) -> None:
        chunks = [make_chain(SMALL, 1, seed) for seed in range(6)]
        daemon = make(run_dir)
        await daemon.start()
        try:
            client = await StoreClient(run_dir).start()
            index = daemon.store.index
            for chain in chunks[:3]:
                await client.save(chain)
            # A manifest is behind them in the worker's line, and waits for nobody.
            await client.save_manifest(b"k" * 16, chunks[0])
            await eventually(lambda: not daemon.manifests.waiting, "it is on SSD")
            assert (index.dirty_chunks, index.ssd_chunks) == (3, 0)
            await client.save(chunks[3])
            await eventually(lambda: (index.dirty_chunks, index.ssd_chunks) == (0, 4), "four chunks are on SSD")
            await client.save(chunks[4])
            assert (index.dirty_chunks, index.ssd_chunks) == (1, 4)
            # Who is refused slots waits for what holds them.
            slots = await client.reserve(_SLOTS)
            assert len(slots) < _SLOTS
            await eventually(lambda: (index.dirty_chunks, index.ssd_chunks) == (0, 5), "the fifth one is on SSD")
            await client.rpc.request(Unreserve(tuple(slots)), Ack, 5.0)
            await client.save(chunks[5])
            await client.stop()
        finally:
            await daemon.stop()
        (run_dir / "arena").unlink()
        daemon = make(run_dir)
        await daemon.start()
        try:
            client = await StoreClient(run_dir).start()
            assert [await client.load(chain) for chain in chunks] == [["ssd"]] * 6
            await client.stop()
        finally:
            await daemon.stop()

    with tempfile.TemporaryDirectory(dir="/dev/shm") as run_dir:
        asyncio.run(main(Path(run_dir)))
