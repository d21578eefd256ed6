"""Several inference processes on one daemon: the same chunks at the same time, and contexts that pass between them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from protocol.errors import CapacityError, PeerUnavailable
from protocol.messages import Commit, Committed, GetManifest, ManifestReply, OpenStore, StoreOpened
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

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(bounded())


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path) as process:
        yield process


async def commit_filled(client: StoreClient, chain: list[Kv]) -> Commit:
    """Slots reserved and filled with these chunks, as a commit that was not sent."""
    slots = await client.reserve(len(chain))
    assert len(slots) == len(chain)
    for slot, kv in zip(slots, chain, strict=True):
        client.fill(slot.slot, kv)
    return Commit(tuple(client.committed(slot, kv) for slot, kv in zip(slots, chain, strict=True)))


async def accepted(client: StoreClient, commit: Commit) -> tuple[bool, ...]:
    return (await client.rpc.request(commit, Committed, 5.0)).accepted


def test_two_workers_commit_the_same_chunks_at_the_same_time(daemon: DaemonProcess) -> None:
    """Both are told that it is saved, it is there once, and the other copy's slots are free again."""

    async def main() -> None:
        one = await StoreClient(daemon.run_dir).start()
        two = await StoreClient(daemon.run_dir).start()
        kept = 0
        for seed in range(8):
            chain = make_chain(SMALL, 5, seed, partial_tokens=7)
            commits = [await commit_filled(client, chain) for client in (one, two)]
            answers = await asyncio.gather(*map(accepted, (one, two), commits))
            assert answers == [(True,) * 6] * 2
            kept += len(chain)
            assert await one.load(chain) == await two.load(chain) == ["dram"] * 6
        status = await one.status()
        assert (status.dram.chunks, status.reserved_slots, status.leases) == (kept, 0, 0)
        slot_bytes = status.dram.used_bytes // status.dram.chunks
        assert status.dram.used_bytes == kept * slot_bytes
        await one.stop()
        await two.stop()

    run(main())


def test_a_chunk_is_saved_again_while_it_comes_from_ssd(daemon: DaemonProcess) -> None:
    """One worker computed what another one has just asked for from SSD: both have it, whole.

    Two connections: now and then what was sent second is read first. Not five times in a row.
    """

    async def main() -> None:
        one = await StoreClient(daemon.run_dir).start()
        two = await StoreClient(daemon.run_dir).start()
        chains, sources = [make_chain(SMALL, 20, seed) for seed in range(1, 6)], []
        for chain in chains:
            await one.save(chain)
        for seed in range(6, 14):  # pushed out of DRAM
            await one.save(make_chain(SMALL, 20, seed))
        await written_behind(daemon)  # what is not on SSD yet keeps its slot
        for chain in chains:
            commit = await commit_filled(two, chain)
            loaded, answer = await asyncio.gather(one.load(chain), accepted(two, commit))
            assert answer == (True,) * 20
            assert len({*loaded}) == 1
            sources.append(loaded[0])
            assert await two.load(chain) == ["dram"] * 20
        assert "ssd" in sources
        assert (await one.status()).reserved_slots == 0
        assert metric(daemon.metrics(), "cachedattention_corrupt_total") == 0
        await one.stop()
        await two.stop()

    run(main())


def test_a_worker_waits_for_the_context_that_another_one_is_saving(daemon: DaemonProcess) -> None:
    """The lookup is answered when the save comes, and by its own deadline where none does."""

    async def main() -> None:
        one = await StoreClient(daemon.run_dir).start()
        two = await StoreClient(daemon.run_dir).start()
        key, never = b"k" * 16, b"n" * 16

        def look(turn_key: bytes, wait_ms: int) -> Coroutine[Any, Any, ManifestReply]:
            return two.rpc.request(GetManifest(turn_key, wait_ms), ManifestReply, 20.0)

        assert (await look(key, 0)).manifest is None
        waiting = [asyncio.ensure_future(look(key, 10_000)) for _ in range(2)]
        await one.status()  # told after the lookups
        assert not any(lookup.done() for lookup in waiting)
        saved = await one.save_manifest(key, make_chain(SMALL, 2, seed=1))
        assert [(await lookup).manifest for lookup in waiting] == [saved] * 2
        started_s = time.monotonic()
        reply = await look(never, 300)
        assert (reply.manifest, reply.reason) == (None, "manifest_lost")
        assert time.monotonic() - started_s >= 0.3
        await one.stop()
        await two.stop()

    run(main())


def test_a_dead_worker_takes_nothing_from_the_others(daemon: DaemonProcess) -> None:
    """Its leases and half filled slots end with it; theirs go on, also over a restart of the daemon."""

    async def main() -> None:
        one = await StoreClient(daemon.run_dir).start()
        two = await StoreClient(daemon.run_dir).start()
        chain = make_chain(SMALL, 4, seed=1)
        await one.save(chain)
        ids = [kv.chunk_id for kv in chain]
        await one.acquire(ids)
        mine = await two.acquire(ids)
        await one.reserve(3)
        commit = await commit_filled(two, make_chain(SMALL, 2, seed=2))
        await one.stop()

        async def only_two_left() -> bool:
            status = await two.status()
            return (status.leases, status.reserved_slots) == (1, 2)

        await eventually(only_two_left, "what the dead one held is free")
        assert await two.read(mine.chunks[0]) is not None
        assert await accepted(two, commit) == (True, True)
        three = await StoreClient(daemon.run_dir).start()
        daemon.kill()
        daemon.start()
        for client in (two, three):
            await eventually(lambda client=client: client.opened == 2, "open again")
            assert await client.load(chain) == ["dram"] * 4
        await two.stop()
        await three.stop()

    run(main())


def test_workers_of_one_geometry_share_the_arena_and_another_is_refused(daemon: DaemonProcess) -> None:
    async def main() -> None:
        one = await StoreClient(daemon.run_dir).start()
        two = await StoreClient(daemon.run_dir).start()
        assert one.arena is not None
        assert two.arena is not None
        assert one.arena.arena_id == two.arena.arena_id
        other = dataclasses.replace(SMALL, layers=SMALL.layers + 1)
        with pytest.raises(CapacityError, match="another KV geometry"):
            await one.rpc.request(OpenStore(other.to_message(), b"n" * 16), StoreOpened, 5.0)
        stranger = StoreClient(daemon.run_dir, other)
        with pytest.raises(PeerUnavailable, match="another KV geometry"):
            await stranger.start(1.0)
        for client in (stranger, one, two):
            await client.stop()

    run(main())
