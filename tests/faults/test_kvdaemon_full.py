"""Full file systems: the store says so, goes on with what it has, and recovers by itself."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol.arena import Geometry
from tests.kvdaemon.client import (
    SMALL,
    DaemonProcess,
    StoreClient,
    eventually,
    make_chain,
    metric,
    running_daemon,
    written_behind,
)

_MIB = 1024 * 1024


@contextmanager
def small_disk(path: Path, size_mib: int) -> Iterator[Path]:
    """A tmpfs of its own at `path`. Skips the test where this may not be mounted."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk(tmp_path: Path) -> None:
    """No room for RocksDB: saves and loads go on in DRAM, degraded; with room again everything gets to SSD."""
    geometry = Geometry(layers=4, key_bytes=2048, value_bytes=2048, chunk_tokens=32)  # 512 KiB a chunk

    async def main(base: Path) -> None:
        with running_daemon(base, dram_bytes=32 * _MIB) as daemon:
            filler = daemon.data_dir / "filler"
            client = await StoreClient(daemon.run_dir, geometry).start()
            await client.save(make_chain(geometry, 4, seed=0))
            await written_behind(daemon)
            free = os.statvfs(daemon.data_dir)
            filler.write_bytes(bytes(free.f_bavail * free.f_bsize - 8 * _MIB))
            for seed in range(1, 15):  # twice what fits into DRAM
                await client.save(make_chain(geometry, 8, seed))
            assert await client.load(make_chain(geometry, 8, 14)) == ["dram"] * 8
            assert '"degraded"' in daemon.health()
            assert "disk" in daemon.health()
            assert '"ready": true' in daemon.health()
            assert metric(daemon.metrics(), 'cachedattention_evictions_total{reason="unsaved",tier="dram"}') > 0
            manifest = await client.save_manifest(b"k" * 16, [])
            assert (await client.get_manifest(b"k" * 16)).manifest == manifest
            filler.unlink()
            await eventually(lambda: '"ok"' in daemon.health(), "recovery", 40.0)
            await written_behind(daemon)
            await eventually(lambda: "cachedattention_manifest_queue 0.0" in daemon.metrics(), "the manifest too")
            assert await client.load(make_chain(geometry, 4, seed=0)) == ["ssd"] * 4
            await client.stop()

    with small_disk(tmp_path / "disk", 192) as base:
        asyncio.run(main(base))


def test_full_tmpfs(tmp_path: Path) -> None:
    """No room for the arena: the client gets the reason, health is degraded, and it works once there is room."""

    async def main(base: Path) -> None:
        run_dir, data_dir = base / "run", tmp_path / "data"
        data_dir.mkdir()
        filler = base / "filler"
        filler.write_bytes(bytes(12 * _MIB))
        daemon = DaemonProcess(run_dir, data_dir, dram_bytes=8 * _MIB).start()
        try:
            await eventually(lambda: (run_dir / "kvdaemon.sock").exists(), "the daemon")
            client = StoreClient(run_dir, SMALL)
            await client.rpc.start()
            await eventually(lambda: "has no room for an arena" in client.rpc.last_error, "the reason")
            assert '"degraded"' in daemon.health()
            assert not (run_dir / "arena").exists()
            filler.unlink()
            await client.rpc.wait_connected(20.0)
            await client.save(make_chain(SMALL, 2, seed=1))
            assert await client.load(make_chain(SMALL, 2, seed=1)) == ["dram"] * 2
            assert '"ok"' in daemon.health()
            await client.stop()
        finally:
            daemon.close()

    with small_disk(tmp_path / "shm", 16) as base:
        asyncio.run(main(base))
