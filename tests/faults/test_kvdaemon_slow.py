"""A disk that is slow, stuck or refuses: nobody waits who need not, health says so, and it comes back by itself."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvdaemon import failpoints
from protocol.arena import Geometry
from protocol.messages import Ack, QueueOrder
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
from tests.kvdaemon.contexts import make_turn, save_turn, tokens

_MIB = 1024 * 1024
_LARGE = Geometry(layers=4, key_bytes=2048, value_bytes=2048, chunk_tokens=32)  # 512 KiB a chunk


@contextmanager
def faulty_daemon(base: Path, **fields: int) -> Iterator[tuple[DaemonProcess, Path]]:
    """A daemon whose fail points are armed by the file returned."""
    with running_daemon(base, **fields) as daemon:
        daemon.kill()
        control = daemon.run_dir / "failpoint"
        daemon.environment[failpoints.VARIABLE] = str(control)
        daemon.start()
        try:
            yield daemon, control
        finally:
            control.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["stuck", "stopped"])
def test_a_lease_grant_never_waits_for_the_ssd(tmp_path: Path, how: str) -> None:
    """Write-behind, a prefetch and a load are under way in a worker that is stuck: chunks in DRAM are leased and read,
    slots are made free by eviction and reserved, chunks committed, and chunks that only the SSD has leased at once."""
    cold = make_turn(tokens(32 * 8 + 1, 1))
    colder = make_turn(tokens(32 * 8 + 1, 2))
    warm = make_chain(SMALL, 8, seed=3)

    async def main(daemon: DaemonProcess, control: Path) -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, colder)
        await save_turn(client, cold)
        for seed in range(10, 18):
            await client.save(make_chain(SMALL, 20, seed))
        await client.save(warm)
        await written_behind(daemon, 60.0)
        worker = daemon.worker_pid()
        assert worker is not None
        if how == "stuck":
            control.write_text("put.before hold\n")
        else:
            os.kill(worker, signal.SIGSTOP)
        await client.save(make_chain(SMALL, 1, seed=50))  # write-behind is stuck with it
        if how == "stuck":  # before it reads anything
            await eventually(control.with_name("failpoint.reached").exists, "a write that is held")
        await client.rpc.request(QueueOrder((cold.key,)), Ack, 5.0)
        await eventually(
            lambda: metric(daemon.metrics(), 'cachedattention_prefetch_total{outcome="started"}') > 0, "a prefetch"
        )
        # Each of these answers within its own deadline, 5 s, whatever the worker does.
        assert await client.load(warm) == ["dram"] * 8
        acquired = await client.acquire([kv.chunk_id for kv in colder.chain])
        assert [ref.tier for ref in acquired.chunks] == ["ssd"] * 8
        slots = await client.reserve(20)
        assert len(slots) == 20  # by eviction
        assert metric(daemon.metrics(), 'cachedattention_evictions_total{reason="save",tier="dram"}') > 0
        fresh = make_chain(SMALL, 1, seed=51)
        await client.save(fresh)
        assert await client.load(fresh) == ["dram"]
        assert await client.load(warm) == ["dram"] * 8
        if how == "stuck":
            assert client.arena is not None
            assert [client.arena.ready_layers(ref.slot) for ref in acquired.chunks] == [0] * 8  # it is still stuck
            assert daemon.worker_pid() == worker
            assert metric(daemon.metrics(), "cachedattention_write_behind_queue") == 2
            control.unlink()
        else:
            os.kill(worker, signal.SIGCONT)
        await client.release(acquired.lease_id)
        await written_behind(daemon, 60.0)
        await eventually(lambda: '"ok"' in daemon.health(), "recovery", 40.0)
        assert await client.load(colder.chain) in (["ssd"] * 8, ["dram"] * 8)
        await client.stop()

    with faulty_daemon(tmp_path) as (daemon, control):
        asyncio.run(main(daemon, control))


def test_a_slow_disk(tmp_path: Path) -> None:
    """A write takes longer than 5 s: degraded, with the reason; saves and loads go on in DRAM; once the disk is fast
    again, everything gets to SSD."""

    async def main(daemon: DaemonProcess, control: Path) -> None:
        client = await StoreClient(daemon.run_dir, _LARGE).start()
        await client.save(make_chain(_LARGE, 4, seed=0))
        await written_behind(daemon, 60.0)
        control.write_text("put.before sleep 8\n")
        for seed in range(1, 9):  # twice what fits into DRAM
            await client.save(make_chain(_LARGE, 8, seed))
        assert await client.load(make_chain(_LARGE, 8, 8)) == ["dram"] * 8
        assert metric(daemon.metrics(), 'cachedattention_evictions_total{reason="unsaved",tier="dram"}') > 0
        await eventually(lambda: '"degraded"' in daemon.health() and "too slow" in daemon.health(), "degraded")
        control.unlink()
        await eventually(lambda: '"ok"' in daemon.health(), "recovery", 40.0)
        await written_behind(daemon, 60.0)
        assert await client.load(make_chain(_LARGE, 4, seed=0)) == ["ssd"] * 4
        await client.stop()

    with faulty_daemon(tmp_path, dram_bytes=16 * _MIB) as (daemon, control):
        asyncio.run(main(daemon, control))


def test_writes_that_fail(tmp_path: Path) -> None:
    """The kernel refuses every write behind a file's first 256 KiB (EFBIG, a real error of a real file): degraded, DRAM
    goes on, nothing wrong is served, the database is not taken for damaged; once writes pass, all is on SSD."""

    def limit(daemon: DaemonProcess, size: int) -> None:
        for pid in (daemon.pid, daemon.worker_pid()):  # the next worker inherits it from the front
            if pid is not None:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    async def main(daemon: DaemonProcess) -> None:
        client = await StoreClient(daemon.run_dir, _LARGE).start()
        before = make_chain(_LARGE, 4, seed=0)
        await client.save(before)
        await written_behind(daemon, 60.0)
        await asyncio.sleep(2.5)  # flushed
        limit(daemon, 256 * 1024)
        kept = make_chain(_LARGE, 8, seed=1)
        await client.save(kept)
        await eventually(lambda: '"degraded"' in daemon.health(), "degraded", 40.0)
        for seed in range(2, 6):
            chain = make_chain(_LARGE, 8, seed)
            await client.save(chain)
            assert await client.load(chain) == ["dram"] * 8
        starts = metric(daemon.metrics(), "cachedattention_ssd_worker_starts_total")
        await eventually(
            lambda: metric(daemon.metrics(), "cachedattention_ssd_worker_starts_total") > starts, "a fresh worker", 60.0
        )
        assert '"ready": true' in daemon.health()
        limit(daemon, resource.RLIM_INFINITY)
        last = make_chain(_LARGE, 8, seed=100)
        await client.save(last)
        await eventually(lambda: '"ok"' in daemon.health(), "recovery", 60.0)
        await written_behind(daemon, 60.0)
        assert len(await client.load(before)) == 4
        assert await client.load(last) == ["dram"] * 8
        assert metric(daemon.metrics(), "cachedattention_corrupt_total") == 0
        assert list(daemon.data_dir.glob("ssd.damaged-*")) == []
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=24 * _MIB) as daemon:
        asyncio.run(main(daemon))
