"""The real daemon with its real worker and RocksDB, as processes, seen by clients over its socket."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import pytest
import zmq

from protocol.arena import Arena, ClientLock, Geometry, SlotState
from protocol.errors import CachedAttentionError, CapacityError, InvalidRequest, PeerProtocolError
from protocol.ids import ROOT, new_id, pack_tokens
from protocol.messages import (
    Ack,
    AttachArena,
    Commit,
    Committed,
    Manifest,
    OpenStore,
    Quarantine,
    QueueOrder,
    Release,
    ReservedSlot,
    RunTurn,
    Sampling,
    SsdRead,
    SsdReadChunk,
    SsdReadDone,
    SsdWrite,
    SsdWritten,
    StoreOpened,
    Unreserve,
)
from protocol.rpc import RpcClient
from tests.kvdaemon.client import (
    SMALL,
    DaemonProcess,
    StoreClient,
    eventually,
    make_chain,
    metric,
    running_daemon,
    scrape,
    written_behind,
)

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path) as process:
        yield process


def test_save_evict_and_load_back_bit_equal(daemon: DaemonProcess) -> None:
    """A context that larger ones pushed out of DRAM comes back from SSD, layer by layer, every byte the same."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 5, seed=1, partial_tokens=7)
        await client.save(context)
        assert await client.load(context) == ["dram"] * 6
        for seed in range(2, 10):
            await client.save(make_chain(SMALL, 20, seed))
        assert await client.load(context) == ["ssd"] * 6
        # The last layer is there before the daemon knows that all of them are.
        await eventually(
            lambda: metric(daemon.metrics(), "cachedattention_load_seconds_count") >= 1, "the end of a load"
        )
        assert await client.load(context) == ["dram"] * 6
        status = await client.status()
        assert (status.state, status.leases, status.reserved_slots) == ("ok", 0, 0)
        assert status.dram.used_bytes <= status.dram.capacity_bytes <= 2 * 1024 * 1024
        await written_behind(daemon)
        text = daemon.metrics()
        assert metric(text, 'cachedattention_chunks{tier="ssd"}') == 166
        assert metric(text, 'cachedattention_evictions_total{reason="save",tier="dram"}') > 0
        assert (
            metric(text, 'cachedattention_written_bytes_total{tier="ssd"}')
            == sum(kv.tokens * SMALL.token_bytes for kv in context) + 160 * 32 * SMALL.token_bytes
        )
        assert metric(text, 'cachedattention_rpc_seconds_count{method="Acquire"}') == 3
        assert metric(text, "cachedattention_corrupt_total") == 0
        await client.stop()

    run(main())
    assert daemon.terminate() == 0
    left = sorted(path.name for path in daemon.run_dir.iterdir())
    assert left == ["arena", "clients"]  # no socket, no lock


def test_manifests(daemon: DaemonProcess) -> None:
    """Saved, read back, replaced; a miss is an answer; and they outlive an orderly restart without the arena."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        chain = make_chain(SMALL, 2, seed=1)
        saved = await client.save_manifest(b"1" * 16, chain)
        assert (await client.get_manifest(b"1" * 16)).manifest == saved
        reply = await client.get_manifest(b"2" * 16)
        assert (reply.manifest, reply.reason) == (None, "manifest_lost")
        newer = await client.save_manifest(b"1" * 16, chain[:1])
        assert daemon.terminate() == 0
        (daemon.run_dir / "arena").unlink()
        daemon.start()
        reply = await eventually(lambda: client.get_manifest(b"1" * 16), "an answer")
        assert reply.manifest == newer
        await client.stop()

    run(main())


def test_a_commit_takes_along_what_else_is_to_be_said(daemon: DaemonProcess) -> None:
    """The context, saved only if all its chunks are accepted; slots; and leases, of which ended ones do no harm."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        chain = make_chain(SMALL, 2, seed=1)
        ids = tuple(kv.chunk_id for kv in chain)
        context = Manifest(b"k" * 16, client.namespace, pack_tokens([1]), "text", ids, 2 * SMALL.chunk_tokens)

        async def commit(slots: Sequence[ReservedSlot], released: tuple[bytes, ...] = ()) -> Committed:
            chunks = tuple(client.committed(slot, kv) for slot, kv in zip(slots, chain, strict=False))
            return await client.rpc.request(Commit(chunks, "", context, 3, released), Committed, 5.0)

        slots = await client.reserve(2)
        client.fill(slots[0].slot, chain[0])
        reply = await commit(slots)
        assert reply.accepted == (True, False)  # nothing was written into the second slot
        assert len(reply.slots) == 3
        assert (await client.get_manifest(b"k" * 16)).manifest is None
        leases = [(await client.acquire(ids[:1])).lease_id for _ in range(2)]
        await client.release(leases[0])
        assert (await client.status()).leases == 1
        client.fill(reply.slots[0].slot, chain[0])
        client.fill(reply.slots[1].slot, chain[1])
        reply = await commit(reply.slots, (leases[0], b"?" * 16, leases[1]))
        assert reply.accepted == (True, True)
        assert (await client.get_manifest(b"k" * 16)).manifest == context
        status = await client.status()
        assert (status.leases, status.reserved_slots) == (0, 4)  # of the three at first, one was not used
        lease = (await client.acquire(ids)).lease_id
        assert len((await client.acquire(ids, released=(lease,))).chunks) == 2
        assert (await client.status()).leases == 1
        await client.stop()

    run(main())


def test_two_clients_share_chunks(daemon: DaemonProcess) -> None:
    """What one process saved the other reads; another geometry is refused while they live, then formats anew."""

    async def main() -> None:
        one, two = await StoreClient(daemon.run_dir).start(), await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 4, seed=1)
        await one.save(context)
        assert await two.load(context) == ["dram"] * 4
        other_shape = dataclasses.replace(SMALL, layers=SMALL.layers + 1)
        stranger = StoreClient(daemon.run_dir, other_shape)
        await stranger.rpc.start()
        await eventually(lambda: "another KV geometry" in stranger.rpc.last_error, "refusal")
        await written_behind(daemon)
        await one.stop()
        await two.stop()
        await stranger.rpc.wait_connected(20.0)
        other = make_chain(other_shape, 3, seed=5)
        await stranger.save(other)
        assert await stranger.load(other) == ["dram"] * 3
        await stranger.stop()
        again = await StoreClient(daemon.run_dir).start()
        assert await again.load(context) == ["ssd"] * 4  # their first geometry's chunks are still on SSD
        await again.stop()

    run(main())


def test_dead_clients_leave_nothing_behind(daemon: DaemonProcess) -> None:
    """A client that dies with leases and reservations: both come back, and nobody waits for the lease's time."""

    async def main() -> None:
        survivor, victim = await StoreClient(daemon.run_dir).start(), await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 3, seed=1)
        await survivor.save(context)
        await victim.reserve(4)
        await victim.acquire([kv.chunk_id for kv in context], lease_ms=100_000)
        status = await survivor.status()
        assert (status.leases, status.reserved_slots) == (1, 4)
        await victim.rpc.stop()  # silent, but its process lives: its slots may still be written
        await asyncio.sleep(1.5)
        assert (await survivor.status()).reserved_slots == 4
        victim.lock.close()

        async def clean() -> bool:
            now = await survivor.status()
            return (now.leases, now.reserved_slots) == (0, 0)

        await eventually(clean, "leases and slots back")
        assert metric(daemon.metrics(), "cachedattention_lease_revoked_total") == 1
        await survivor.stop()

    run(main())


def test_leases_expire(daemon: DaemonProcess) -> None:
    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await client.save(make_chain(SMALL, 1, seed=1))
        acquired = await client.acquire([make_chain(SMALL, 1, seed=1)[0].chunk_id], lease_ms=200)

        async def gone() -> bool:
            return (await client.status()).leases == 0

        await eventually(gone, "expiry")
        with pytest.raises(InvalidRequest):
            await client.release(acquired.lease_id)
        await client.stop()

    run(main())


def test_reopening_forgets_reservations(daemon: DaemonProcess) -> None:
    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        (slot,) = await client.reserve(1)
        await client.rpc.request(OpenStore(SMALL.to_message(), new_id()), StoreOpened, 5.0)
        kv = make_chain(SMALL, 1, seed=1)[0]
        reply = await client.rpc.request(Commit((client.committed(slot, kv),)), Committed, 5.0)
        assert reply.accepted == (False,)
        await client.stop()

    run(main())


def test_prefetch_on_the_queues_hint(daemon: DaemonProcess) -> None:
    """Chunks of a waiting job are in DRAM before it asks, and count as used when it does."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 10, seed=1)
        await client.save(context)
        await client.save_manifest(b"k" * 16, context)
        for seed in range(2, 10):
            await client.save(make_chain(SMALL, 20, seed))
        await written_behind(daemon)
        await client.rpc.request(QueueOrder((b"x" * 16, b"k" * 16)), Ack, 5.0)
        await eventually(
            lambda: metric(daemon.metrics(), 'cachedattention_prefetch_total{outcome="started"}') == 10, "prefetch"
        )

        async def all_resident() -> bool:
            acquired = await client.acquire([kv.chunk_id for kv in context])
            await client.release(acquired.lease_id)
            return {ref.tier for ref in acquired.chunks} == {"dram"}

        await eventually(all_resident, "arrival")
        assert await client.load(context) == ["dram"] * 10
        assert metric(daemon.metrics(), 'cachedattention_prefetch_total{outcome="used"}') == 10
        await client.stop()

    run(main())


def test_quarantine_is_checked(daemon: DaemonProcess) -> None:
    """A reader that reports a bad chunk is believed only if it is bad; a bad one is never handed out again."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        good, bad = make_chain(SMALL, 1, seed=1), make_chain(SMALL, 1, seed=2)
        await client.save([*good, *bad])
        await written_behind(daemon)
        assert client.arena is not None
        (ref,) = (await client.acquire([bad[0].chunk_id])).chunks
        client.arena.layer(ref.slot, 1, 1)[0][0] ^= 1
        assert await client.read(ref) is None  # finds out and reports
        assert await client.load(bad) == ["ssd"]  # the copy on SSD is good
        (ref,) = (await client.acquire([good[0].chunk_id])).chunks
        await client.rpc.request(Quarantine(ref.slot, ref.generation, ref.chunk_id), Ack, 5.0)
        assert await client.load(good) == ["dram"]
        assert metric(daemon.metrics(), 'cachedattention_corrupt_total{where="dram"}') == 1
        await client.stop()

    run(main())


def test_ssd_cap_is_kept(tmp_path: Path) -> None:
    """Ten times the cap is saved: the SSD tier stays under it, on the disk too, and the newest are the ones kept."""
    cap = 32 * 1024 * 1024
    geometry = Geometry(layers=4, key_bytes=2048, value_bytes=2048, chunk_tokens=32)  # 512 KiB a chunk

    async def main(daemon: DaemonProcess) -> None:
        client = await StoreClient(daemon.run_dir, geometry).start()
        for seed in range(40):
            await client.save(make_chain(geometry, 8, seed))
        newest = make_chain(geometry, 8, 39)

        async def under_cap() -> bool:
            status = await client.status()
            files = sum(p.stat().st_blocks * 512 for p in (daemon.data_dir / "ssd").iterdir())
            return status.ssd.used_bytes < cap and files <= 1.02 * cap

        await eventually(under_cap, "the cap", 30.0)
        assert len(await client.load(newest)) == 8
        assert await client.load(make_chain(geometry, 8, 0)) == []
        assert (await client.acquire([make_chain(geometry, 8, 0)[0].chunk_id])).miss_reason == "evicted"
        assert (await client.status()).state == "ok"
        await client.stop()

    with running_daemon(tmp_path, ssd_bytes=cap, dram_bytes=8 * 1024 * 1024) as daemon:
        run(main(daemon))


def test_without_an_ssd_tier(tmp_path: Path) -> None:
    """ssd_bytes=0: DRAM alone, the coldest chunks go, health is ok, and no worker runs."""

    async def main(daemon: DaemonProcess) -> None:
        client = await StoreClient(daemon.run_dir).start()
        for seed in range(10):
            await client.save(make_chain(SMALL, 20, seed))
        assert await client.load(make_chain(SMALL, 20, 9)) == ["dram"] * 20
        assert await client.load(make_chain(SMALL, 20, 0)) == []
        await client.save_manifest(b"k" * 16, [])
        assert (await client.get_manifest(b"k" * 16)).manifest is not None
        assert (await client.status()).state == "ok"
        assert daemon.worker_pid() is None
        await client.stop()

    with running_daemon(tmp_path, ssd_bytes=0) as daemon:
        run(main(daemon))


# -- bad input ------------------------------------------------------------------------------------------------


def test_wrong_requests_hurt_only_themselves(daemon: DaemonProcess) -> None:
    """Each is refused with a clear error, and the store is what it was."""

    async def main() -> None:
        client, other = await StoreClient(daemon.run_dir).start(), await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 2, seed=1)
        await client.save(context)
        (slot,) = await client.reserve(1)
        lease = await client.acquire([kv.chunk_id for kv in context])
        kv = make_chain(SMALL, 1, seed=9)[0]
        free = next(s for s in range(client.arena.slots) if client.arena.state(s) is SlotState.FREE)  # type: ignore[union-attr]
        wrong: list[tuple[StoreClient, Any, type, type[CachedAttentionError]]] = [
            (client, Release(b"?" * 16), Ack, InvalidRequest),
            (other, Release(lease.lease_id), Ack, InvalidRequest),
            (client, Commit((client.committed(ReservedSlot(10**9, 1), kv),)), Committed, InvalidRequest),
            (client, Commit((client.committed(ReservedSlot(free, 7), kv),)), Committed, InvalidRequest),
            (other, Commit((client.committed(slot, kv),)), Committed, InvalidRequest),
            (other, Unreserve((slot,)), Ack, InvalidRequest),
            (
                client,
                OpenStore(dataclasses.replace(SMALL.to_message(), layers=0), new_id()),
                StoreOpened,
                PeerProtocolError,
            ),
            (client, SsdRead(()), Ack, PeerProtocolError),
            (client, RunTurn(new_id(), (), new_id(), b"", Sampling()), Ack, PeerProtocolError),
        ]
        for who, message, expect, error in wrong:
            with pytest.raises(error):
                await who.rpc.request(message, expect, 5.0)
        await client.release(lease.lease_id)
        with pytest.raises(InvalidRequest):
            await client.release(lease.lease_id)
        status = await client.status()
        assert (status.leases, status.reserved_slots, status.dram.chunks) == (0, 1, 2)
        assert await other.load(context) == ["dram"] * 2
        await client.stop()
        await other.stop()

    run(main())


def test_a_client_must_open_and_prove_that_it_lives(daemon: DaemonProcess) -> None:
    async def main() -> None:
        gateway = RpcClient(f"ipc://{daemon.run_dir}/kvdaemon.sock", "gateway")
        await gateway.start()
        await gateway.wait_connected(20.0)
        with pytest.raises(InvalidRequest, match="open the store"):
            await gateway.request(Release(b"?" * 16), Ack, 5.0)
        with pytest.raises(InvalidRequest, match="ClientLock"):
            await gateway.request(OpenStore(SMALL.to_message(), new_id()), StoreOpened, 5.0)
        huge = Geometry(2**40, 2**40, 2**40, 256)
        lock = ClientLock(daemon.run_dir, gateway.client_id)
        with pytest.raises(CapacityError):
            await gateway.request(OpenStore(huge.to_message(), new_id()), StoreOpened, 5.0)
        lock.close()
        await gateway.stop()

    run(main())


_WRONG_HELLO = {"protocol_version": 99, "role": "x", "client_id": b"1" * 16}
_GARBAGE = [
    b"",
    b"\xc1",
    b"\x00" * 1000,
    os.urandom(5000),
    msgpack.packb([1, 2]),
    msgpack.packb({"k": "req", "i": 1, "t": "acquire", "b": {"job_id": "x"}}),
    msgpack.packb(
        {"k": "req", "i": 1, "t": "hello", "b": {"protocol_version": 99, "role": "x", "client_id": b"1" * 16}}
    ),
    b"\x00" * (33 * 1024 * 1024),
]


@pytest.mark.parametrize("socket_name", ["kvdaemon.sock", "ssd.sock"])
def test_garbage_on_the_sockets(daemon: DaemonProcess, socket_name: str) -> None:
    """Garbage, half messages, a wrong version and an oversized frame on both sockets; the service goes on."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 4, seed=1)
        await client.save(context)
        worker = daemon.worker_pid()
        with zmq.Context() as zmq_context:
            for data in _GARBAGE:
                with zmq_context.socket(zmq.DEALER) as vandal:
                    vandal.linger = 0
                    vandal.connect(f"ipc://{daemon.run_dir}/{socket_name}")
                    vandal.send(data)
                    vandal.send_multipart([b"a", b"b", b"c"])
                    if data == _GARBAGE[6]:
                        assert await asyncio.to_thread(vandal.poll, 5000)
                        assert b"protocol version" in vandal.recv()
                    await asyncio.sleep(0.05)
        for seed in range(2, 8):
            await client.save(make_chain(SMALL, 20, seed))
        assert await client.load(context) == ["ssd"] * 4
        assert daemon.worker_pid() == worker
        await client.stop()

    run(main())


def test_the_worker_refuses_nonsense(daemon: DaemonProcess) -> None:
    """Wrong arena, slots out of range, stale generations: refused or "stale"; nothing is written anywhere."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        (kv,) = make_chain(SMALL, 1, seed=1)
        await client.save([kv])
        direct = RpcClient(f"ipc://{daemon.run_dir}/ssd.sock", "test")
        await direct.start()
        await direct.wait_connected(20.0)
        with pytest.raises(InvalidRequest):
            await direct.request(AttachArena(str(daemon.run_dir / "arena"), b"?" * 16), Ack, 5.0)
        assert client.arena is not None
        await direct.request(AttachArena(str(daemon.run_dir / "arena"), client.arena.arena_id), Ack, 5.0)
        with pytest.raises(InvalidRequest):
            await direct.request(SsdWrite(10**9, 1), SsdWritten, 5.0)
        with pytest.raises(InvalidRequest):
            await direct.request(SsdRead((SsdReadChunk(kv.chunk_id, 10**9, 1),)), SsdReadDone, 5.0)
        (ref,) = (await client.acquire([kv.chunk_id])).chunks
        stale = await direct.request(SsdWrite(ref.slot, ref.generation - 1), SsdWritten, 5.0)
        assert stale.outcome == "stale"

        async def on_ssd() -> bool:
            return (await client.status()).ssd.chunks == 1

        await eventually(on_ssd, "write-behind")
        # A slot that is READY, not LOADING, is nobody's to fill: the worker must not touch it.
        read = SsdRead((SsdReadChunk(kv.chunk_id, ref.slot, ref.generation), SsdReadChunk(b"?" * 16, ref.slot, 1)))
        assert (await direct.request(read, SsdReadDone, 5.0)).outcomes == ("missing", "missing")
        await direct.stop()
        copy = await client.read(ref)
        assert copy is not None
        await client.stop()

    run(main())


# -- start and stop -------------------------------------------------------------------------------------------


def test_health_and_ready(daemon: DaemonProcess) -> None:
    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        assert '"state": "ok"' in daemon.health()
        assert '"ready": true' in scrape(daemon.metrics_port(), "ready")
        await client.stop()

    run(main())


@pytest.mark.parametrize("shared", ["data_dir", "run_dir"])
def test_two_daemons_on_one_directory(daemon: DaemonProcess, tmp_path: Path, shared: str) -> None:
    """The second one refuses to start and says why; the first one is not disturbed."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        (tmp_path / "other").mkdir()
        other_run = Path(f"{daemon.run_dir}-2")
        run_dir = daemon.run_dir if shared == "run_dir" else other_run
        data_dir = daemon.data_dir if shared == "data_dir" else tmp_path / "other" / "data"
        data_dir.mkdir(exist_ok=True)
        second = DaemonProcess(run_dir, data_dir)
        second.log_path = tmp_path / "second.log"
        second.start()
        assert second.process is not None
        assert await asyncio.to_thread(second.process.wait, 20) == 2
        assert "config_error: another kvdaemon is using" in second.log_text()
        newcomer = await StoreClient(daemon.run_dir).start()  # the first one's socket is still there
        await newcomer.stop()
        if other_run.exists():
            other_run.rmdir()
        await client.save(make_chain(SMALL, 2, seed=1))
        assert await client.load(make_chain(SMALL, 2, seed=1)) == ["dram"] * 2
        await client.stop()

    run(main())


def test_a_port_in_use_stops_the_start(daemon: DaemonProcess, tmp_path: Path) -> None:
    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        with_port = {"metrics_port": daemon.metrics_port()}
        other_run = Path(f"{daemon.run_dir}-2")
        (tmp_path / "other").mkdir()
        second = DaemonProcess(other_run, tmp_path / "other" / "data", **with_port).start()
        assert second.process is not None
        assert await asyncio.to_thread(second.process.wait, 20) == 2
        assert "cannot listen" in second.log_text()
        other_run.rmdir()
        await client.stop()

    run(main())


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text"])
def test_a_tampered_arena_is_replaced(tmp_path: Path, damage: str) -> None:
    """Logged, counted, deleted; the store starts empty and the SSD tier still has its chunks."""

    async def main(daemon: DaemonProcess) -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 3, seed=1)
        await client.save(context)
        await client.stop()
        assert daemon.terminate() == 0
        path = daemon.run_dir / "arena"
        raw = bytearray(path.read_bytes())
        if damage == "header":
            raw[20] ^= 0xFF
        path.write_bytes({"truncated": raw[:-4096], "empty": b"", "text": b"hello" * 100}.get(damage, raw))
        daemon.start()
        client = await StoreClient(daemon.run_dir).start()
        assert await client.load(context) == ["ssd"] * 3
        assert metric(daemon.metrics(), 'cachedattention_corrupt_total{where="arena"}') == 1
        assert "damaged" in daemon.log_text()
        await client.stop()

    with running_daemon(tmp_path) as daemon:
        run(main(daemon))


def test_another_dram_size_makes_a_new_arena(tmp_path: Path) -> None:
    async def main(daemon: DaemonProcess) -> None:
        client = await StoreClient(daemon.run_dir).start()
        await client.save(make_chain(SMALL, 3, seed=1))
        slots = client.arena.slots if client.arena is not None else 0
        await client.stop()
        assert daemon.terminate() == 0
        daemon.fields["dram_bytes"] //= 2
        daemon.start()
        client = await StoreClient(daemon.run_dir).start()
        assert client.arena is not None
        assert client.arena.slots <= slots // 2
        assert await client.load(make_chain(SMALL, 3, seed=1)) == ["ssd"] * 3
        await client.stop()

    with running_daemon(tmp_path) as daemon:
        run(main(daemon))


def test_dram_for_no_chunk_at_all(tmp_path: Path) -> None:
    """A clear error to the client, degraded health, and nothing crashes."""

    async def main(daemon: DaemonProcess) -> None:
        client = StoreClient(daemon.run_dir)
        await client.rpc.start()
        await eventually(lambda: "raise --dram" in client.rpc.last_error, "refusal")
        assert '"state": "degraded"' in daemon.health()
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=10_000) as daemon:
        run(main(daemon))


def test_arena_identity_is_not_needed_by_readers_alone(daemon: DaemonProcess) -> None:
    """A client that opens the store finds in the slot table what it was told over the socket."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        context = make_chain(SMALL, 2, seed=1)
        await client.save(context)
        acquired = await client.acquire([kv.chunk_id for kv in context])
        seen = Arena.open(daemon.run_dir / "arena")
        for kv, ref in zip(context, acquired.chunks, strict=True):
            assert seen.is_current(ref.slot, ref.generation, kv.chunk_id)
            assert (seen.parent_id(ref.slot), seen.tokens(ref.slot)) == (kv.parent_id, kv.tokens)
        assert seen.parent_id(acquired.chunks[0].slot) == ROOT
        seen.close()
        await client.stop()

    run(main())
