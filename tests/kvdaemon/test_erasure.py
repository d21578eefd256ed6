"""Erasing: nothing of it is left anywhere, nothing else is touched, and nothing under way brings it back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvdaemon.ssd.tables import Tables
from protocol.errors import InvalidRequest, PeerUnavailable
from protocol.ids import new_id
from protocol.lineage import Truncation
from protocol.messages import (
    Ack,
    ChunkPlace,
    ChunkPlaces,
    Commit,
    Committed,
    Erase,
    ErasureReceipt,
    FindTurns,
    FoundTurns,
    ListManifests,
    LocateChunks,
    ManifestEntry,
    ManifestPage,
    QueueOrder,
    SaveManifest,
)
from tests.kvdaemon.client import (
    SMALL,
    DaemonProcess,
    StoreClient,
    eventually,
    metric,
    running_daemon,
    stored_files,
    written_behind,
)
from tests.kvdaemon.contexts import Turn, make_turn, markers, save_turn, tokens


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path) as process:
        yield process


async def erase(client: StoreClient, turn_key: bytes) -> ErasureReceipt:
    return await client.rpc.request(Erase(turn_key), ErasureReceipt, 120.0)


async def listed(client: StoreClient) -> list[ManifestEntry]:
    """All contexts, by the smallest pages there are."""
    entries: list[ManifestEntry] = []
    more = True
    while more:
        after = entries[-1].turn_key if entries else b""
        page = await client.rpc.request(ListManifests(after, 1), ManifestPage, 5.0)
        entries += page.entries
        more = page.more
    return entries


async def places(client: StoreClient, chunk_ids: Sequence[bytes]) -> tuple[ChunkPlace, ...]:
    return (await client.rpc.request(LocateChunks(tuple(chunk_ids)), ChunkPlaces, 5.0)).places


def traces(daemon: DaemonProcess, turns: Sequence[Turn], kept: Sequence[Turn] = ()) -> list[str]:
    """Where KV or text of the turns can still be read, that of `kept` apart: the arena, the database's files."""
    ours = {kv.chunk_id for turn in kept for kv in turn.chain}
    searched = [marker for turn in turns for kv in turn.chain if kv.chunk_id not in ours for marker in markers(kv)]
    searched += [turn.manifest.text.encode() for turn in turns]
    searched += [turn.manifest.token_ids[-64:] for turn in turns]
    found = []
    for path in [daemon.run_dir / "arena", *stored_files(daemon.data_dir)]:
        content = path.read_bytes()
        found += [path.name for marker in searched if marker in content]
    return found


def in_tables(daemon: DaemonProcess, turns: Sequence[Turn]) -> list[bytes]:
    """Which of the chunks and manifests a stopped daemon's database holds."""
    tables = Tables(daemon.data_dir / "ssd")
    ids = [kv.chunk_id for turn in turns for kv in turn.chain]
    found = [chunk_id for chunk_id in ids if tables.record(chunk_id) is not None]
    found += [turn.key for turn in turns if tables.manifest(turn.key) is not None]
    tables.close()
    return found


def test_truncated_conversations(daemon: DaemonProcess) -> None:
    """What they dropped goes with them; what others need stays."""
    shared, mine = tokens(97, 1), tokens(130, 2)
    cousin = make_turn(shared + tokens(40, 9))
    before = make_turn(shared + mine[:70])
    after = make_turn(shared + mine, truncations=(Truncation(166, 0, 128),))
    lone = make_turn(tokens(200, 3), truncations=(Truncation(170, 32, 96),))
    dropped = make_turn(tokens(200, 3)[:97]).chain[1:]  # saved once, of a turn that is forgotten

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        for turn in (cousin, before, after, lone):
            await save_turn(client, turn)
        await client.save(dropped)
        await written_behind(daemon)
        assert after.chain[0].chunk_id == before.chain[4].chunk_id
        receipt = await erase(client, lone.key)
        assert {kv.chunk_id for kv in (*lone.chain, *dropped)} == set(receipt.dram_chunks) == set(receipt.ssd_chunks)
        assert await client.load(after.chain) == ["dram"] * len(after.chain)
        receipt = await erase(client, after.key)
        assert set(receipt.turn_keys) == {before.key, after.key}
        assert traces(daemon, [before, after], kept=[cousin]) == []
        assert await client.load(cousin.chain) == ["dram"] * len(cousin.chain)
        await client.stop()

    asyncio.run(main())


def test_erasing_a_sibling_leaves_what_a_truncated_context_needs(daemon: DaemonProcess) -> None:
    """The parent of its first chunk is nobody's any more, and goes; the chunk itself is no orphan."""
    said = tokens(225, 1)
    sibling = make_turn(said[:129] + tokens(10, 2))
    truncated = make_turn(said, truncations=(Truncation(200, 0, 128),))

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        for turn in (sibling, truncated):
            await save_turn(client, turn)
        await written_behind(daemon)
        receipt = await erase(client, sibling.key)
        assert {kv.chunk_id for kv in sibling.chain} == set(receipt.dram_chunks)
        assert await client.load(truncated.chain) == ["dram"] * len(truncated.chain)
        await client.stop()

    asyncio.run(main())


def test_an_earlier_turn_that_is_kept_stays(daemon: DaemonProcess) -> None:
    """Nothing in the store continues it but the erased one; somebody says that it is needed."""
    said = tokens(100, 1)
    first, second = make_turn(said[:64]), make_turn(said)

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        for turn in (first, second):
            await save_turn(client, turn)
        receipt = await client.rpc.request(Erase(second.key, (first.key,)), ErasureReceipt, 60.0)
        assert (receipt.turn_keys, receipt.shared_chunks) == ((second.key,), 1)
        assert (await client.get_manifest(first.key)).manifest == first.manifest
        assert await client.load(first.chain) == ["dram"] * 2
        await client.stop()

    asyncio.run(main())


def test_nothing_of_an_erased_conversation_is_left(daemon: DaemonProcess) -> None:
    """Three turns in DRAM and on SSD, among others: not in the index, the tables, nor one byte of it in arena or files.

    A conversation that shares its beginning hits as before, and the receipt names what went.
    """
    shared, mine, other = tokens(70, 1), tokens(200, 2), tokens(150, 3)
    first, second, third = (make_turn(shared + mine[:length]) for length in (30, 100, 200))
    cousin = make_turn(shared + other)
    strangers = [make_turn(tokens(100, seed)) for seed in range(10, 20)]

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        for turn in (*strangers[:5], first, cousin, second, third, *strangers[5:]):
            await save_turn(client, turn)
        await written_behind(daemon)
        assert set(traces(daemon, [third], kept=[cousin])) >= {"arena"}
        common = [kv.chunk_id for kv in third.chain if kv.chunk_id in {c.chunk_id for c in cousin.chain}]
        assert len(common) == 2
        gone = {kv.chunk_id for turn in (first, second, third) for kv in turn.chain} - set(common)
        receipt = await erase(client, second.key)  # one in the middle names all of them
        assert set(receipt.turn_keys) == {first.key, second.key, third.key}
        assert set(receipt.dram_chunks) == set(receipt.ssd_chunks) == gone
        assert receipt.shared_chunks == 2
        tokens_gone = sum(
            {kv.chunk_id: kv.tokens for turn in (first, second, third) for kv in turn.chain}[c] for c in gone
        )
        assert receipt.dram_bytes == receipt.ssd_bytes == tokens_gone * SMALL.token_bytes
        assert receipt.wiped_bytes >= len(gone) * SMALL.slot_bytes
        assert receipt.ssd_manifests == 3
        assert receipt.ssd_physical_after < receipt.ssd_physical_before
        assert (receipt.left, receipt.deferred_slots) == ((), 0)
        assert traces(daemon, [first, second, third], kept=[cousin]) == []
        assert set(await places(client, sorted(gone))) == {ChunkPlace()}
        assert {entry.turn_key for entry in await listed(client)} == {cousin.key, *(turn.key for turn in strangers)}
        for turn in (first, second, third):
            reply = await client.get_manifest(turn.key)
            assert (reply.manifest, reply.reason) == (None, "manifest_lost")
        acquired = await client.acquire([kv.chunk_id for kv in third.chain])
        assert [ref.chunk_id for ref in acquired.chunks] == common
        assert acquired.miss_reason == "unknown"
        await client.release(acquired.lease_id)
        for turn in (cousin, *strangers):
            assert await client.load(turn.chain) == ["dram"] * len(turn.chain)
            assert (await client.get_manifest(turn.key)).manifest == turn.manifest
        with pytest.raises(InvalidRequest, match="no turn"):
            await erase(client, second.key)
        await client.stop()

    asyncio.run(main())
    assert daemon.terminate() == 0
    assert set(in_tables(daemon, [first, second, third])) == {kv.chunk_id for kv in cousin.chain[:2]}
    assert traces(daemon, [first, second, third], kept=[cousin]) == []


def test_an_evicted_conversation_is_erased_from_ssd_and_unused_memory(daemon: DaemonProcess) -> None:
    """Its chunks lie on SSD only, but the slots that they left still hold their bytes, partly under other chunks."""
    victim = make_turn(tokens(400, 1))
    fillers = [make_turn(tokens(20, seed)) for seed in range(100, 260)]  # partial chunks: most of each slot is old

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, victim)
        for turn in fillers:
            await save_turn(client, turn)
        await written_behind(daemon)
        assert all(place.dram_bytes == 0 < place.ssd_bytes for place in await places(client, victim.manifest.chunk_ids))
        assert "arena" in traces(daemon, [victim])
        receipt = await erase(client, victim.key)
        assert (receipt.dram_chunks, set(receipt.ssd_chunks)) == ((), set(victim.manifest.chunk_ids))
        assert receipt.wiped_bytes > 0
        assert traces(daemon, [victim]) == []
        for turn in fillers[-20:]:
            assert await client.load(turn.chain) == ["dram"]
        await client.stop()

    asyncio.run(main())


def test_slots_in_a_clients_hands_are_wiped_when_they_come_back(daemon: DaemonProcess) -> None:
    """The bytes of an evicted chunk lie in a slot that a client holds to fill: told, and wiped when it is back."""
    victim = make_turn(tokens(32 * 10 + 1, 1))

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, victim)
        await written_behind(daemon)
        slots = []
        for seed in range(200, 400):
            if not traces(daemon, [victim]):
                break
            if len(slots) < 100:
                slots += await client.reserve(4)
            await save_turn(client, make_turn(tokens(5, seed)))
            if all(place.dram_bytes == 0 for place in await places(client, victim.manifest.chunk_ids)):
                break
        assert "arena" in traces(daemon, [victim])
        receipt = await erase(client, victim.key)
        assert receipt.deferred_slots == len(slots)
        kv = make_turn(tokens(4, 9999)).chain[0]
        client.fill(slots[0].slot, kv)
        reply = await client.rpc.request(Commit((client.committed(slots[0], kv),)), Committed, 5.0)
        assert reply.accepted == (True,)
        await client.stop()  # gives the others back
        await eventually(lambda: not traces(daemon, [victim]), "wiped")

    asyncio.run(main())


def test_leases_on_erased_chunks_are_revoked(daemon: DaemonProcess) -> None:
    """Its reader notices by the generation and gets nothing; leases on other chunks go on."""
    victim, other = make_turn(tokens(100, 1)), make_turn(tokens(100, 2))

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, victim)
        await save_turn(client, other)
        await written_behind(daemon)
        ours = await client.acquire(victim.manifest.chunk_ids)
        theirs = await client.acquire(other.manifest.chunk_ids)
        assert await client.read(ours.chunks[0]) is not None
        receipt = await erase(client, victim.key)
        assert receipt.leases_revoked == 1
        assert [await client.read(ref) for ref in ours.chunks] == [None] * 4
        assert all([await client.read(ref) is not None for ref in theirs.chunks])
        with pytest.raises(InvalidRequest, match="revoked"):
            await client.release(ours.lease_id)
        await client.release(theirs.lease_id)
        assert metric(daemon.metrics(), "cachedattention_lease_revoked_total") == 1
        await client.stop()

    asyncio.run(main())


def test_forks_keep_what_they_share(daemon: DaemonProcess) -> None:
    """Of two answers to one question one is erased: the question's turn stays, for the other continues it."""
    base = tokens(50, 1)
    root = make_turn(base)
    left, right = make_turn(base + tokens(60, 2)), make_turn(base + tokens(60, 3))

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        for turn in (root, left, right):
            await save_turn(client, turn)
        assert (await erase(client, left.key)).turn_keys == (left.key,)
        assert traces(daemon, [left], kept=[root, right]) == []
        for turn in (root, right):
            assert await client.load(turn.chain) == ["dram"] * len(turn.chain)
        assert set((await erase(client, root.key)).turn_keys) == {root.key, right.key}
        assert traces(daemon, [left, root, right]) == []
        assert (await client.status()).dram.chunks == 0
        await client.stop()

    asyncio.run(main())


def test_a_twin_with_the_same_kv_keeps_it(daemon: DaemonProcess) -> None:
    """Two answers of one token, which has no KV yet: all chunks are shared, and stay with the one that stays."""
    base = tokens(40, 1)
    one, two = make_turn([*base, 7]), make_turn([*base, 8])

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, one)
        await save_turn(client, two)
        receipt = await erase(client, one.key)
        assert (receipt.turn_keys, receipt.dram_chunks, receipt.shared_chunks) == ((one.key,), (), 2)
        assert await client.load(two.chain) == ["dram", "dram"]
        await client.stop()

    asyncio.run(main())


def test_what_a_cancelled_turn_left_is_erased_too(daemon: DaemonProcess) -> None:
    """Chunks that continue the conversation, committed as they filled; their turn never ended, no context has them."""
    base = tokens(64, 1)
    saved, cancelled = make_turn([*base, 5]), make_turn(base + tokens(100, 2))

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, saved)
        await client.save(cancelled.chain[2:])
        receipt = await erase(client, saved.key)
        assert set(receipt.dram_chunks) == {kv.chunk_id for kv in cancelled.chain}
        assert traces(daemon, [saved, cancelled]) == []
        await client.stop()

    asyncio.run(main())


@pytest.mark.parametrize("race", ["prefetch", "load", "write-behind", "manifest"])
def test_nothing_under_way_brings_it_back(daemon: DaemonProcess, race: str) -> None:
    """The worker is stopped in the middle of a fetch, a write or a manifest's way to the SSD; the erasure begins; the
    worker goes on. Whatever order they end in, nothing is left and nothing comes back."""
    victim = make_turn(tokens(600, 1))
    fillers = [make_turn(tokens(32 * 12 + 1, seed)) for seed in range(100, 114)]

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        worker = daemon.worker_pid()
        assert worker is not None
        if race == "write-behind":
            for kv in victim.chain[:-4]:
                await client.save([kv])
            await client.rpc.request(SaveManifest(victim.manifest), Ack, 5.0)
            await written_behind(daemon)
            os.kill(worker, signal.SIGSTOP)
            await client.save(victim.chain[-4:])
            await asyncio.sleep(0.3)  # the writes are asked for
        elif race == "manifest":
            await client.save(victim.chain)
            await written_behind(daemon)
            os.kill(worker, signal.SIGSTOP)
            await client.rpc.request(SaveManifest(victim.manifest), Ack, 5.0)
        else:
            await save_turn(client, victim)
            for turn in fillers:
                await save_turn(client, turn)
            await written_behind(daemon)
            os.kill(worker, signal.SIGSTOP)
            if race == "load":
                await client.acquire(victim.manifest.chunk_ids)
            else:
                await client.rpc.request(QueueOrder((victim.key,)), Ack, 5.0)
                await eventually(lambda: metric(daemon.metrics(), "cachedattention_prefetch_total") > 0, "a prefetch")
        erasing = asyncio.ensure_future(erase(client, victim.key))
        await asyncio.sleep(0.5)
        assert not erasing.done()
        os.kill(worker, signal.SIGCONT)
        receipt = await erasing
        assert receipt.left == ()
        assert set(receipt.dram_chunks) | set(receipt.ssd_chunks) == set(victim.manifest.chunk_ids)
        await client.rpc.request(QueueOrder((victim.key,)), Ack, 5.0)
        await written_behind(daemon)
        assert set(await places(client, victim.manifest.chunk_ids)) == {ChunkPlace()}
        assert (await client.get_manifest(victim.key)).manifest is None
        assert traces(daemon, [victim]) == []
        assert daemon.worker_pid() == worker
        await client.stop()

    asyncio.run(main())
    assert daemon.terminate() == 0
    assert in_tables(daemon, [victim]) == []


def test_a_turn_saved_during_the_erasure_is_erased_too(daemon: DaemonProcess) -> None:
    """The next turn of the conversation ends while the worker compacts: it would hold everything again, so it goes."""
    base = tokens(100, 1)
    victim, following, stranger = make_turn(base), make_turn(base + tokens(80, 2)), make_turn(tokens(90, 3))

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, victim)
        await written_behind(daemon)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)
        erasing = asyncio.ensure_future(erase(client, victim.key))
        await asyncio.sleep(0.2)
        await save_turn(client, following)
        await save_turn(client, stranger)
        os.kill(worker, signal.SIGCONT)
        receipt = await erasing
        assert set(receipt.turn_keys) == {victim.key, following.key}
        assert receipt.left == ()
        assert traces(daemon, [victim, following]) == []
        assert await client.load(stranger.chain) == ["dram"] * 3
        assert (await client.get_manifest(stranger.key)).manifest == stranger.manifest
        await client.stop()

    asyncio.run(main())


def test_without_its_ssd_tier_nothing_is_erased_and_it_is_said(daemon: DaemonProcess) -> None:
    """What refers to what is not known then. Afterwards the same request works."""
    victim = make_turn(tokens(100, 1))

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, victim)
        await written_behind(daemon)
        worker = daemon.worker_pid()
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        await eventually(lambda: daemon.worker_pid() != worker, "the worker is gone")
        with pytest.raises(PeerUnavailable):
            await erase(client, victim.key)

        async def works() -> ErasureReceipt:
            return await erase(client, victim.key)

        receipt = await eventually(works, "erased")
        assert set(receipt.dram_chunks) == set(victim.manifest.chunk_ids)
        assert traces(daemon, [victim]) == []
        await client.stop()

    asyncio.run(main())


def test_without_an_ssd_tier_at_all(tmp_path: Path) -> None:
    victim, other = make_turn(tokens(100, 1)), make_turn(tokens(100, 2))

    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        await save_turn(client, victim)
        await save_turn(client, other)
        found = await client.rpc.request(FindTurns(victim.key.hex()[:9]), FoundTurns, 5.0)
        assert found.turn_keys == (victim.key,)
        assert {entry.turn_key for entry in await listed(client)} == {victim.key, other.key}
        receipt = await erase(client, victim.key)
        assert (set(receipt.dram_chunks), receipt.ssd_chunks) == (set(victim.manifest.chunk_ids), ())
        assert [entry.turn_key for entry in await listed(client)] == [other.key]
        arena = (daemon.run_dir / "arena").read_bytes()
        assert not any(marker in arena for kv in victim.chain for marker in markers(kv))
        await client.stop()

    with running_daemon(tmp_path, ssd_bytes=0) as daemon:
        asyncio.run(main())


def test_an_unknown_turn(daemon: DaemonProcess) -> None:
    async def main() -> None:
        client = await StoreClient(daemon.run_dir).start()
        with pytest.raises(InvalidRequest, match="no turn"):
            await erase(client, new_id())
        with pytest.raises(InvalidRequest, match="beginning of a turn key"):
            await client.rpc.request(FindTurns("xyz"), FoundTurns, 5.0)
        await client.stop()

    asyncio.run(main())
