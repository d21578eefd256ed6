"""The caps are on physical bytes, and hold at every moment: what files take on the disk, the arena in memory.

`make churn` saves CHURN times the cap, at larger caps too.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from protocol.arena import Geometry
from tests.kvdaemon.client import (
    DaemonProcess,
    StoreClient,
    eventually,
    make_chain,
    metric,
    running_daemon,
    written_behind,
)
from tests.kvdaemon.contexts import make_turn, save_turn, tokens

_MIB = 1024 * 1024
_CHURN = int(os.environ.get("CHURN", "3"))  # times the cap
_CAPS_MIB = (32, 128, 512) if "CHURN" in os.environ else (32,)
_GEOMETRY = Geometry(layers=4, key_bytes=1024, value_bytes=1024, chunk_tokens=32)  # 256 KiB a chunk
_CHUNK = _GEOMETRY.slot_bytes


@dataclass
class Watch:
    """The most that was ever seen, by looking without pause."""

    disk_bytes: int = 0
    memory_bytes: int = 0
    looks: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def run(self, daemon: DaemonProcess) -> None:
        while not self.done.wait(0.002):
            self.disk_bytes = max(self.disk_bytes, _physical_bytes(daemon.data_dir))
            self.memory_bytes = max(self.memory_bytes, _physical_bytes(daemon.run_dir))
            self.looks += 1


def _physical_bytes(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # deleted as we look
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total


@contextmanager
def watching(daemon: DaemonProcess) -> Iterator[Watch]:
    watch = Watch()
    thread = threading.Thread(target=watch.run, args=(daemon,))
    thread.start()
    try:
        yield watch
    finally:
        watch.done.set()
        thread.join()


async def another_worker(daemon: DaemonProcess) -> None:
    """Kill the SSD worker, and wait for the next one."""
    worker = daemon.worker_pid()
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    await eventually(lambda: daemon.worker_pid() not in (None, worker) and '"ok"' in daemon.health(), "a worker")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cap_mib", _CAPS_MIB)
def test_churn(tmp_path: Path, cap_mib: int) -> None:
    """Chunks of several times the cap are saved, some used again so that those that go lie everywhere, and the worker
    is killed on the way: neither tier ever takes more than its cap and 2 %; the newest are there, and none was dropped
    for want of room on the disk."""
    cap, dram_bytes = cap_mib * _MIB, 8 * _MIB
    random_ = random.Random(cap_mib)

    async def main(daemon: DaemonProcess) -> None:
        client = await StoreClient(daemon.run_dir, _GEOMETRY).start()
        rounds = _CHURN * cap // (8 * _CHUNK)
        with watching(daemon) as watch:
            for n in range(rounds):
                await client.save(make_chain(_GEOMETRY, 8, n), timeout_s=60.0)
                if n > 20:  # an old one becomes the warmest, and stays among younger ones that go
                    await client.load(make_chain(_GEOMETRY, 8, n - random_.randrange(3, 20)))
                if n == rounds // 2:
                    await another_worker(daemon)
            await written_behind(daemon, 60.0)
            await asyncio.sleep(3.0)  # the last flush and what it leads to
        status = await client.status()
        written = metric(daemon.metrics(), "cachedattention_ssd_disk_written_bytes_total")
        logical = metric(daemon.metrics(), 'cachedattention_written_bytes_total{tier="ssd"}')
        print(f"{cap_mib} MiB: at most {watch.disk_bytes / cap:.3f} of the cap on disk, in {watch.looks} looks;")
        print(f"{watch.memory_bytes / dram_bytes:.3f} of the cap in memory; {logical / cap:.1f} times the cap saved,")
        print(f"{written / logical:.2f} bytes written for each")
        assert watch.disk_bytes <= 1.02 * cap
        assert watch.memory_bytes <= 1.02 * dram_bytes
        assert watch.disk_bytes >= 0.9 * cap  # it was full
        assert status.state == "ok"
        assert status.ssd.used_bytes >= 0.9 * cap
        assert metric(daemon.metrics(), 'cachedattention_evictions_total{reason="capacity",tier="ssd"}') > 0
        assert len(await client.load(make_chain(_GEOMETRY, 8, rounds - 1))) == 8
        own = psutil.Process(daemon.pid)
        for process in (own, *own.children()):
            memory = process.memory_full_info()
            print(f"private memory of {process.pid}: {memory.uss / _MIB:.0f} MiB")
        await client.stop()

    with running_daemon(tmp_path, ssd_bytes=cap, dram_bytes=dram_bytes) as daemon:
        asyncio.run(main(daemon))


def test_manifests_count(tmp_path: Path) -> None:
    """Thousands of saved contexts with long texts: they stay within their share, the oldest go first, the cap holds."""
    cap = 32 * _MIB

    async def main(daemon: DaemonProcess) -> None:
        client = await StoreClient(daemon.run_dir, _GEOMETRY).start()
        turns = []
        with watching(daemon) as watch:
            for seed in range(250):
                text = random.Random(seed).randbytes(5_000).hex()  # 2.5 MB in all, twice the share
                turns.append(make_turn(tokens(20, seed), text=text, geometry=_GEOMETRY))
                await save_turn(client, turns[-1])
            await eventually(lambda: "cachedattention_manifest_queue 0.0" in daemon.metrics(), "all on SSD")
            await asyncio.sleep(5.0)
        assert watch.disk_bytes <= 1.02 * cap
        await client.stop()
        daemon.terminate()
        daemon.start()  # with an empty memory
        client = await StoreClient(daemon.run_dir, _GEOMETRY).start()
        there = [(await client.get_manifest(turn.key)).manifest is not None for turn in turns]
        assert there[-1]
        assert not there[0]
        assert there == sorted(there)
        await client.stop()

    with running_daemon(tmp_path, ssd_bytes=cap, dram_bytes=8 * _MIB) as daemon:
        asyncio.run(main(daemon))
