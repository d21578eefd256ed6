"""Killed at any moment, the daemon and its worker come back with what they had, and never with wrong bytes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import CachedAttentionError
from protocol.messages import Commit, Committed
from tests.kvdaemon.client import (
    SMALL,
    DaemonProcess,
    Kv,
    StoreClient,
    eventually,
    make_chain,
    metric,
    running_daemon,
    written_behind,
)

FLUSHED_S = 3.0  # the worker flushes every 2 s


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path) as process:
        yield process


async def hits(client: StoreClient, chain: list[Kv], tier: str) -> bool:
    return await client.load(chain) == [tier] * len(chain)


def test_front_killed_dram_survives(daemon: DaemonProcess) -> None:
    """kill -9 of the front: the worker ends too, the next front adopts the arena, and the same clients hit DRAM."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 6, seed=1, partial_tokens=9)
        await client.save(context)
        manifest = await client.save_manifest(b"k" * 16, context)
        worker = daemon.worker_pid()
        assert worker is not None
        daemon.kill()
        await eventually(lambda: not Path(f"/proc/{worker}").exists(), "the worker's end")
        daemon.start()
        await eventually(lambda: client.opened == 2, "the client opens the store again")
        assert await client.load(context) == ["dram"] * 7
        assert (await client.get_manifest(b"k" * 16)).manifest == manifest
        await written_behind(daemon)  # chunks that were only in the arena go to SSD now
        assert (await client.status()).ssd.chunks == 7
        assert metric(daemon.metrics(), "cachedattention_corrupt_total") == 0
        await client.stop()

    asyncio.run(main())


def test_reservations_outlive_a_front_until_their_owner_lets_go(daemon: DaemonProcess) -> None:
    """After a restart a slot stays its owner's, who may be writing into it, until it opens the store again or dies."""

    async def main() -> None:
        writer, mute, witness = [await StoreClient(daemon.run_dir).start() for _ in range(3)]
        (slot,) = await writer.reserve(1)
        await mute.reserve(2)
        await mute.rpc.stop()  # alive, but it does not come back
        daemon.kill()
        daemon.start()
        await eventually(lambda: writer.opened == 2 and witness.opened == 2, "clients are back")
        assert (await witness.status()).reserved_slots == 2  # the mute one's
        kv = make_chain(SMALL, 1, seed=1)[0]
        writer.fill(slot.slot, kv)
        reply = await writer.rpc.request(Commit((writer.committed(slot, kv),)), Committed, 5.0)
        assert reply.accepted == (False,)  # it was told by the new epoch that it has no slots
        assert await writer.load([kv]) == []
        mute.lock.close()

        async def freed() -> bool:
            return (await witness.status()).reserved_slots == 0

        await eventually(freed, "the dead client's slots")
        await writer.stop()
        await witness.stop()

    asyncio.run(main())


def test_worker_killed_dram_goes_on(daemon: DaemonProcess) -> None:
    """kill -9 of the worker: saves and loads go on, health says degraded, and the SSD tier comes back by itself."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        cold = make_chain(SMALL, 6, seed=1)
        await client.save(cold)
        for seed in range(2, 8):
            await client.save(make_chain(SMALL, 20, seed))
        await written_behind(daemon)
        await asyncio.sleep(FLUSHED_S)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)  # deaf first, so that its death does not come before the next lines
        os.kill(worker, signal.SIGKILL)
        await eventually(lambda: '"degraded"' in daemon.health(), "degraded health", 5.0)
        warm = make_chain(SMALL, 6, seed=100)
        await client.save(warm)
        assert await client.load(warm) == ["dram"] * 6
        await eventually(lambda: '"ok"' in daemon.health(), "recovery")
        assert daemon.worker_pid() != worker
        assert await client.load(cold) == ["ssd"] * 6
        await written_behind(daemon)
        await client.stop()

    asyncio.run(main())


def test_worker_killed_while_it_reads(daemon: DaemonProcess) -> None:
    """Chunks on their way when the worker dies: readers notice by the generation, and ask again with success."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        cold = make_chain(SMALL, 10, seed=1)
        await client.save(cold)
        for seed in range(2, 8):
            await client.save(make_chain(SMALL, 20, seed))
        await written_behind(daemon)
        await asyncio.sleep(FLUSHED_S)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)
        acquired = await client.acquire([kv.chunk_id for kv in cold])
        assert [ref.tier for ref in acquired.chunks] == ["ssd"] * 10
        os.kill(worker, signal.SIGKILL)
        for ref in acquired.chunks:
            assert await client.read(ref) is None
        await client.release(acquired.lease_id)
        await eventually(lambda: hits(client, cold, "ssd"), "a second try")
        status = await client.status()
        assert (status.leases, status.reserved_slots) == (0, 0)
        await client.stop()

    asyncio.run(main())


def test_a_worker_that_hangs_is_replaced(daemon: DaemonProcess) -> None:
    """SIGSTOP: deaf but alive, it could still write into slots. It is killed before anybody gets them."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 4, seed=1)
        await client.save(context)
        await written_behind(daemon)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)
        assert await client.load(context) == ["dram"] * 4
        await eventually(lambda: daemon.worker_pid() not in (None, worker), "a new worker", 40.0)
        assert not Path(f"/proc/{worker}").exists()
        assert await client.load(context) == ["dram"] * 4
        await client.stop()

    asyncio.run(main())


def test_everything_killed_and_the_arena_gone(daemon: DaemonProcess) -> None:
    """As after a reboot: what was flushed to SSD hits again, with its manifest."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 6, seed=1, partial_tokens=5)
        await client.save(context)
        manifest = await client.save_manifest(b"k" * 16, context)
        await written_behind(daemon)
        await asyncio.sleep(FLUSHED_S)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        daemon.kill()
        (daemon.run_dir / "arena").unlink()
        daemon.start()
        await eventually(lambda: client.opened == 2, "the client opens the store again")
        assert await client.load(context) == ["ssd"] * 7
        assert (await client.get_manifest(b"k" * 16)).manifest == manifest
        await client.stop()

    asyncio.run(main())


def test_worker_ends_in_order_on_sigterm(daemon: DaemonProcess) -> None:
    """SIGTERM to the worker alone: it flushes what was just written, and the next worker has it."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 6, seed=1)
        await client.save(context)
        await written_behind(daemon)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGTERM)
        await eventually(lambda: daemon.worker_pid() not in (None, worker), "a new worker")
        await eventually(lambda: '"ok"' in daemon.health(), "recovery")
        text = daemon.metrics()
        assert metric(text, 'cachedattention_chunks{tier="ssd"}') == 6
        assert metric(text, 'cachedattention_written_bytes_total{tier="ssd"}') == 6 * 32 * SMALL.token_bytes
        await client.stop()

    asyncio.run(main())


@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills_never_yield_wrong_bytes(daemon: DaemonProcess, seed: int) -> None:
    """Save and load while front and worker are killed at random: every byte that is read is the one saved.

    A lost chunk is a miss. At the end nothing is leased or reserved, and all of DRAM's slots are accounted for.
    """
    random_ = random.Random(seed)

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        contexts = [make_chain(SMALL, 12, n) for n in range(12)]
        found = 0

        async def traffic(stop: asyncio.Event) -> None:
            nonlocal found
            while not stop.is_set():
                context = random_.choice(contexts)
                try:
                    tiers = await client.load(context)  # compares every byte
                    found += len(tiers)
                    await client.save(context[len(tiers) :], timeout_s=2.0)
                except (CachedAttentionError, AssertionError) as error:
                    if isinstance(error, AssertionError) and "no slot" not in str(error):
                        raise
                    await asyncio.sleep(0.05)

        for _ in range(5):
            stop = asyncio.Event()
            work = asyncio.ensure_future(traffic(stop))
            await asyncio.sleep(random_.uniform(0.3, 1.5))
            worker = daemon.worker_pid()
            if random_.random() < 0.5 and worker is not None:
                os.kill(worker, signal.SIGKILL)
            else:
                daemon.kill()
                daemon.start()
            await asyncio.sleep(random_.uniform(0.3, 1.0))
            stop.set()
            await asyncio.wait_for(work, 30.0)
        await eventually(lambda: client.rpc.is_connected and '"ok"' in daemon.health(), "recovery")
        assert found > 0

        async def quiet() -> bool:
            status = await client.status()
            return (status.leases, status.reserved_slots) == (0, 0)

        await eventually(quiet, "leases of broken-off loads expire", 40.0)
        await client.stop()

    asyncio.run(main())
