"""When chunks are written behind: a few wait for others for a while, many do not, and none is left behind at a stop."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest

from kvdaemon.config import KvDaemonConfig
from kvdaemon.service import KvDaemon
from protocol.messages import Ack, Unreserve
from tests.kvdaemon.client import SMALL, StoreClient, eventually, make_chain

_SLOTS = 64  # eight chunks are as many as wait for others


def make(run_dir: Path, data_dir: Path) -> KvDaemon:
    dram_bytes = _SLOTS * (SMALL.slot_bytes + SMALL.entry_bytes) + 2 * 4096
    endpoint = f"ipc://{run_dir}/kvdaemon.sock"
    return KvDaemon(KvDaemonConfig(run_dir, data_dir, endpoint, dram_bytes, 64 * 2**20, metrics_port=0))


@pytest.mark.parametrize("bounds", [(0.1, 1e6), (1e6, 0.1)], ids=["none comes", "others keep coming"])
def test_chunks_wait_for_others_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: tuple[float, float]
) -> None:
    """They are written when no other has come for a while; and when one has waited long, though others might come."""
    monkeypatch.setattr("kvdaemon.write_behind._QUIET_S", bounds[0])
    monkeypatch.setattr("kvdaemon.write_behind._GATHER_S", bounds[1])

    async def main(run_dir: Path) -> None:
        daemon = make(run_dir, tmp_path)
        await daemon.start()
        try:
            client = await StoreClient(run_dir).start()
            index = daemon.store.index
            for seed in range(3):
                await client.save(make_chain(SMALL, 1, seed))
            await eventually(lambda: (index.dirty_chunks, index.ssd_chunks) == (0, 3), "they are on SSD")
            await client.stop()
        finally:
            await daemon.stop()

    with tempfile.TemporaryDirectory(dir="/dev/shm") as run_dir:
        asyncio.run(main(Path(run_dir)))


def test_a_few_chunks_wait_for_others_and_a_stop_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wait has no end, seven chunks stay in DRAM and eight are written; a stop writes the one behind them."""
    monkeypatch.setattr("kvdaemon.write_behind._QUIET_S", 1e6)
    monkeypatch.setattr("kvdaemon.write_behind._GATHER_S", 1e6)

    async def main(run_dir: Path) -> None:
        chunks = [make_chain(SMALL, 1, seed) for seed in range(10)]
        daemon = make(run_dir, tmp_path)
        await daemon.start()
        try:
            client = await StoreClient(run_dir).start()
            index = daemon.store.index
            for chain in chunks[:7]:
                await client.save(chain)
            # A manifest is behind them in the worker's line, and waits for nobody.
            await client.save_manifest(b"k" * 16, chunks[0])
            await eventually(lambda: not daemon.manifests.waiting, "it is on SSD")
            assert (index.dirty_chunks, index.ssd_chunks) == (7, 0)
            await client.save(chunks[7])
            await eventually(lambda: (index.dirty_chunks, index.ssd_chunks) == (0, 8), "eight chunks are on SSD")
            await client.save(chunks[8])
            assert (index.dirty_chunks, index.ssd_chunks) == (1, 8)
            # Who is refused slots waits for what holds them.
            slots = await client.reserve(_SLOTS)
            assert len(slots) < _SLOTS
            await eventually(lambda: (index.dirty_chunks, index.ssd_chunks) == (0, 9), "the ninth one is on SSD")
            await client.rpc.request(Unreserve(tuple(slots)), Ack, 5.0)
            await client.save(chunks[9])
            await client.stop()
        finally:
            await daemon.stop()
        (run_dir / "arena").unlink()
        daemon = make(run_dir, tmp_path)
        await daemon.start()
        try:
            client = await StoreClient(run_dir).start()
            assert [await client.load(chain) for chain in chunks] == [["ssd"]] * 10
            await client.stop()
        finally:
            await daemon.stop()

    with tempfile.TemporaryDirectory(dir="/dev/shm") as run_dir:
        asyncio.run(main(Path(run_dir)))
