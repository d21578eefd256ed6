"""kill -9 at named places and at random, under traffic: what comes back is what was saved, and the books are true.

A round: traffic; one process stops at a fail point, or anywhere; the front, the SSD worker, both, or both with their
memory are killed; the store is started again and compared with a record of what was saved, erased and acknowledged.
`make kills` plays 300 rounds; a failed one is repeated by KILLS_SEED, which is printed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, get_args

import pytest

from kvdaemon import failpoints
from kvdaemon.failpoints import FrontPoint, WorkerPoint
from kvdaemon.ssd.tables import ChunkRecord
from kvdaemon.ssd.worker import open_tier, stored_bytes
from protocol.arena import PAGE_BYTES, Geometry, SlotState
from protocol.errors import CachedAttentionError, InvalidRequest
from protocol.messages import (
    Ack,
    Commit,
    Committed,
    Erase,
    ErasureReceipt,
    QueueOrder,
    SaveManifest,
    ScrubReport,
    ScrubStore,
)
from tests.faults.expectation import Expectation, Fate
from tests.kvdaemon.client import (
    SMALL,
    DaemonProcess,
    Kv,
    StoreClient,
    assert_equal,
    eventually,
    metric,
    running_daemon,
    written_behind,
)
from tests.kvdaemon.contexts import Turn, make_turn

ROUNDS = int(os.environ.get("KILLS", "10"))
SEED = int(os.environ.get("KILLS_SEED", str(random.SystemRandom().randrange(2**32))))
_MIB = 1024 * 1024
_SLOTS = 42  # the traffic has some hundred chunks
_LARGE = Geometry(layers=3, key_bytes=1024, value_bytes=1024, chunk_tokens=32)  # the cap is near with fewer chunks
_CONVERSATIONS, _TURNS = 30, 6
_REACHED_S = 2.0  # a point that is not reached in this time: killed where it is
_WRITTEN_S = 2.0  # what was saved before is due after any kill
_CHECKED = 15  # conversations compared in a round

Victim = Literal["front", "worker", "everything", "machine"]  # machine: everything, and what was in memory
POINTS: tuple[str, ...] = (*get_args(FrontPoint), *get_args(WorkerPoint))
# Only where the SSD tier is over its cap: the tier's own deletions.
_CAP_POINTS = ("ssd_evict.before", "ssd_evict.after")
_START_POINTS = ("adopt.before", "adopt.after")


class Traffic:
    """Conversations that grow, are hinted at and erased, all at once, against a store that may die at any time."""

    def __init__(self, client: StoreClient, random_: random.Random) -> None:
        self.chunks: Expectation[bytes] = Expectation()
        self.manifests: Expectation[bytes] = Expectation()
        self.kv: dict[bytes, Kv] = {}
        self.conversations: list[list[Turn]] = []
        self.tokens_found = 0
        self._client = client
        self._random = random_
        self._busy: set[int] = set()  # conversations in somebody's hands, by identity

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop. Raises AssertionError: the store did what it must not."""

        async def repeat(work: Callable[[], Awaitable[None]], pause_s: float) -> None:
            while not stop.is_set():
                try:
                    await work()
                except CachedAttentionError:
                    await asyncio.sleep(0.02)  # its process died
                await asyncio.sleep(pause_s * self._random.random())

        await asyncio.gather(
            repeat(self._take_turn, 0.01),
            repeat(self._take_turn, 0.01),
            repeat(self._hint, 0.2),
            repeat(self._erase, 0.8),
        )

    async def _take_turn(self) -> None:
        """A new conversation, or the next turn of an old one: load its history, compute what is missing, save."""
        free = [turns for turns in self.conversations if id(turns) not in self._busy and len(turns) < _TURNS]
        is_new = not free or (len(self.conversations) < _CONVERSATIONS and self._random.random() < 0.4)
        turns: list[Turn] = [] if is_new else self._random.choice(free)
        if is_new:
            self.conversations.append(turns)
        self._busy.add(id(turns))
        try:
            before = list(memory_of(turns[-1])) if turns else []
            added = [self._random.randrange(50_000) for _ in range(self._random.randint(5, 100))]
            turn = make_turn(before + added, geometry=self._client.geometry)
            if turns:
                await self.load(turns[-1])
            else:
                turns.append(turn)  # whatever becomes of it: its chunks may be in the store from now on
            for kv in turn.chain:
                await self._save(kv)
            self.manifests.saving(turn.key)
            if turn not in turns:
                turns.append(turn)
            await self._client.rpc.request(SaveManifest(turn.manifest), Ack, 5.0)
            self.manifests.saved(turn.key)
        finally:
            self._busy.discard(id(turns))

    async def _save(self, kv: Kv) -> None:
        self.kv[kv.chunk_id] = kv
        self.chunks.saving(kv.chunk_id)
        deadline_s = time.monotonic() + 5.0
        while not (slots := await self._client.reserve(1)):
            if time.monotonic() > deadline_s:
                return  # a turn goes on without being saved
            await asyncio.sleep(0.01)
        self._client.fill(slots[0].slot, kv)
        reply = await self._client.rpc.request(Commit((self._client.committed(slots[0], kv),)), Committed, 5.0)
        if reply.accepted == (True,):  # else the slot was taken back: the daemon is a new one
            self.chunks.saved(kv.chunk_id)

    async def load(self, turn: Turn) -> int:
        """Load a turn's context and compare it. Returns how many of its chunks were there."""
        acquired = await self._client.acquire([kv.chunk_id for kv in turn.chain], lease_ms=20_000)
        found = 0
        try:
            for kv, ref in zip(turn.chain, acquired.chunks, strict=False):
                copy = await self._client.read(ref)
                if copy is None:
                    break
                assert_equal(kv, copy)
                self.chunks.found(kv.chunk_id)
                found += 1
                self.tokens_found += kv.tokens
        finally:
            await self._client.release(acquired.lease_id)
        return found

    async def _hint(self) -> None:
        some = self._random.sample(self.conversations, min(6, len(self.conversations)))
        await self._client.rpc.request(QueueOrder(tuple(turns[-1].key for turns in some if turns)), Ack, 5.0)

    async def _erase(self) -> None:
        free = [turns for turns in self.conversations if turns and id(turns) not in self._busy]
        if len(free) < 4:
            return
        turns = self._random.choice(free)
        self._busy.add(id(turns))
        try:
            ids = {kv.chunk_id for turn in turns for kv in turn.chain}
            keys = {turn.key for turn in turns}
            self.chunks.erasing(ids)
            self.manifests.erasing(keys)
            self.conversations.remove(turns)
            receipt = await self._client.rpc.request(Erase(turns[-1].key), ErasureReceipt, 60.0)
            if receipt.left == () and keys <= set(receipt.turn_keys):
                self.chunks.erased(ids)
                self.manifests.erased(keys)
        except InvalidRequest:
            pass  # its manifest was lost, or never saved
        finally:
            self._busy.discard(id(turns))


def memory_of(turn: Turn) -> list[int]:
    packed = turn.manifest.token_ids
    return [int.from_bytes(packed[i : i + 4], "little") for i in range(0, len(packed), 4)]


class Hits:
    """How much of what was saved for longer than a flush interval was found again, by who was killed."""

    def __init__(self) -> None:
        self.due: Counter[str] = Counter()
        self.found: Counter[str] = Counter()

    def note(self, victim: str, *, found: bool) -> None:
        self.due[victim] += 1
        self.found[victim] += found

    def share(self, victim: str) -> float:
        return self.found[victim] / self.due[victim] if self.due[victim] else 1.0


class Kills:
    """One store, and everything that is done to it."""

    def __init__(self, daemon: DaemonProcess, geometry: Geometry, control: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.daemon = daemon
        self.control = control
        self.client = StoreClient(daemon.run_dir, geometry)
        self.traffic = Traffic(self.client, self.random)
        self.hits = Hits()
        self.reached: Counter[str] = Counter()
        self.killed: Counter[str] = Counter()

    async def round(self, victim: Victim, point: str) -> None:
        """point: "" for a kill at no particular place."""
        stop = asyncio.Event()
        work = asyncio.ensure_future(self.traffic.run(stop))
        await asyncio.sleep(self.random.uniform(0.2, 2.5))
        if point and point not in _START_POINTS:
            await self._reach(point)
        worker = self.daemon.worker_pid()
        killed_s = time.monotonic()
        self._kill(victim, worker)
        stop.set()
        if victim != "worker":
            if point in _START_POINTS:
                self._arm(point)
            self.daemon.start()
            if point in _START_POINTS and await self._reach(point, armed=True):
                self.daemon.kill()
                self.daemon.start()
        await asyncio.wait_for(work, 60.0)
        await self._recovered(worker)
        due_s = killed_s - _WRITTEN_S
        self.traffic.chunks.killed(due_s)
        self.traffic.manifests.killed(due_s)
        await self._compare(victim, due_s)
        await self._balance()

    # -- killing ------------------------------------------------------------------------------------------

    def _arm(self, point: str) -> None:
        fresh = self.control.with_name("arming")
        fresh.write_text(f"{point} stop\n")
        fresh.rename(self.control)

    async def _reach(self, point: str, *, armed: bool = False) -> bool:
        """Wait until a process stopped at the point; no longer than _REACHED_S, for traffic may not lead there now."""
        if not armed:
            self._arm(point)
        mark = self.control.with_name(f"{self.control.name}.reached")
        deadline_s = time.monotonic() + (10.0 if armed else _REACHED_S)
        while not mark.exists() and time.monotonic() < deadline_s:  # noqa: ASYNC110  a file of another process
            await asyncio.sleep(0.002)
        self.control.unlink(missing_ok=True)
        if not mark.exists():
            return False
        mark.unlink()

        def stopped() -> bool:
            pids = (self.daemon.pid, self.daemon.worker_pid())
            return any(pid is not None and _state(pid) == "T" for pid in pids)

        await eventually(stopped, f"a process that stopped at {point}", 10.0)
        self.reached[point] += 1
        return True

    def _kill(self, victim: Victim, worker: int | None) -> None:
        both = victim in ("everything", "machine")
        if both:  # at once: neither sees the other die
            _signal(worker, signal.SIGSTOP)
            _signal(self.daemon.pid, signal.SIGSTOP)
        if victim != "front":
            _signal(worker, signal.SIGKILL)
        if victim != "worker":
            self.daemon.kill()
        if victim == "machine":
            (self.daemon.run_dir / "arena").unlink(missing_ok=True)
        _signal(worker, signal.SIGCONT)
        _signal(self.daemon.pid, signal.SIGCONT)
        self.killed[victim] += 1

    async def _recovered(self, worker: int | None) -> None:
        async def is_well() -> bool:
            if self.daemon.worker_pid() in (None, worker) or not self.client.rpc.is_connected:
                return False
            return (await self.client.status()).state == "ok"

        await eventually(is_well, "recovery", 60.0)
        await self.client.rpc.request(QueueOrder(()), Ack, 5.0)
        await written_behind(self.daemon, 60.0)

    # -- comparing ----------------------------------------------------------------------------------------

    async def _compare(self, victim: Victim, due_s: float) -> None:
        """Ask for what was saved, compare its bytes, count what was saved by due_s and is not there any more."""
        traffic = self.traffic
        some = self.random.sample(traffic.conversations, min(_CHECKED, len(traffic.conversations)))
        for turns in some:
            found: set[bytes] = set()
            asked: set[bytes] = set()
            for turn in turns:
                ids = [kv.chunk_id for kv in turn.chain]
                asked |= set(ids)
                found |= set(ids[: await traffic.load(turn)])
                manifest = (await self.client.get_manifest(turn.key)).manifest
                if manifest is not None:
                    traffic.manifests.found(turn.key)
                    assert manifest == turn.manifest
                if traffic.manifests.is_due(turn.key, due_s):
                    self.hits.note(f"{victim}, manifests", found=manifest is not None)
                if manifest is None:
                    traffic.manifests.missed(turn.key)
            for chunk_id in asked:
                if traffic.chunks.is_due(chunk_id, due_s):
                    self.hits.note(victim, found=chunk_id in found)
                if chunk_id not in found:
                    traffic.chunks.missed(chunk_id)
        for chunk_id in self._some(traffic.chunks.with_fate(Fate.ERASED)):
            acquired = await self.client.acquire([chunk_id])
            await self.client.release(acquired.lease_id)
            assert acquired.chunks == (), "an erased chunk is back"
        for turn_key in self._some(traffic.manifests.with_fate(Fate.ERASED)):
            assert (await self.client.get_manifest(turn_key)).manifest is None, "an erased manifest is back"

    def _some(self, keys: list[bytes]) -> list[bytes]:
        return self.random.sample(keys, min(100, len(keys)))

    async def _balance(self) -> None:
        """Nothing is leased, reserved or on its way, and the daemon's sums are those of a full scan of both tiers."""
        arena = self.client.arena
        assert arena is not None

        async def at_rest() -> bool:
            status = await self.client.status()
            states = {arena.state(slot) for slot in range(arena.slots)}
            return (status.leases, status.reserved_slots) == (0, 0) and states <= {SlotState.FREE, SlotState.READY}

        await eventually(at_rest, "no lease, no slot in anybody's hands", 30.0)

        async def sums() -> bool:
            before = await self.client.status()
            report = [part async for part in self.client.rpc.stream(ScrubStore(), 60.0, 30.0)][-1]
            if await self.client.status() != before:
                return False  # the SSD tier is letting chunks go
            assert isinstance(report, ScrubReport)
            assert (report.problem, report.skipped) == ("", 0)
            assert report.dram_damaged == report.ssd_damaged == report.manifests_damaged == ()
            ready = [slot for slot in range(arena.slots) if arena.state(slot) is SlotState.READY]
            assert len(ready) == before.dram.chunks == report.dram_chunks
            assert len(ready) * arena.geometry.slot_bytes == before.dram.used_bytes
            held = {arena.chunk_id(slot) for slot in ready}
            assert len(held) == len(ready), "a chunk in two slots"
            for chunk_id in held:
                self.traffic.chunks.found(chunk_id)
            assert (report.ssd_chunks, report.ssd_bytes) == (before.ssd.chunks, before.ssd.used_bytes)
            return True

        await eventually(sums, "the daemon at rest", 120.0)  # each look is a full scan
        assert metric(self.daemon.metrics(), "cachedattention_corrupt_total") == 0

    def summary(self, points: int) -> str:
        lines = [
            f"{self.killed.total()} kills: {dict(self.killed)}",
            f"{len(self.reached)} of {points} points reached: {dict(self.reached)}",
        ]
        for what, due in sorted(self.hits.due.items()):
            lines.append(f"hits after {what}: {self.hits.found[what]} of {due} ({self.hits.share(what):.2%})")
        return "\n".join(lines)

    async def end(self) -> None:
        """Stop the daemon, and go through its files: the records, and of chunks nothing but what they speak of."""
        status = await self.client.status()
        await self.client.stop()
        assert self.daemon.terminate() == 0
        tables, files, moved_aside = open_tier(self.daemon.data_dir / "ssd", 1024 * _MIB)
        found = list(tables.records(b"", 1_000_000))
        there = sum(data_bytes(path) for path in files.directory.iterdir())
        files.close()
        tables.close()
        records = [record for record in found if isinstance(record, ChunkRecord)]
        assert moved_aside == ""
        assert len(records) == len(found) == status.ssd.chunks == len({record.place for record in records})
        assert sum(record.size_bytes for record in records) == status.ssd.used_bytes
        assert sum(stored_bytes(self.client.geometry, record.tokens) for record in records) == there


def data_bytes(path: Path) -> int:
    """What is in a file that is no hole. Blocks that it takes are more: the file system's own notes are among them."""
    total = at = 0
    with open(path, "rb") as file:
        while True:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but holes from here on
                return total
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            total += at - start


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def _signal(pid: int | None, number: signal.Signals) -> None:
    if pid is not None and _state(pid) != "gone":
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def victims(random_: random.Random) -> Victim:
    return random_.choice(("front", "front", "worker", "worker", "everything", "machine"))


@pytest.mark.parametrize("ssd", ["large", "small"])
@pytest.mark.timeout(300 + 30 * ROUNDS)
def test_kills(tmp_path: Path, ssd: str) -> None:
    """Never wrong KV, no leaked slot or lease, sums as by a full scan; at least 95 % of what was saved more than a
    flush interval before hits again.

    large: nothing leaves the SSD but by erasure. small: the SSD tier is over its cap all the time and deletes; what
    hits then is a matter of placement, so it is compared and not counted.
    """
    rounds = ROUNDS if ssd == "large" else max(2, ROUNDS // 6)
    print(f"KILLS={ROUNDS} KILLS_SEED={SEED}")

    async def main(kills: Kills) -> None:
        await kills.client.start()
        pool = (
            [p for p in POINTS if p not in _CAP_POINTS]
            if ssd == "large"
            else [*_CAP_POINTS, "delete.before", "delete.after", "destroy.before", "destroy.after"]
        )
        try:
            for n in range(rounds):
                # Every third kill is at no particular place; the others where there were fewest.
                victim = victims(kills.random)
                point = "" if n % 3 == 2 else min(pool, key=lambda p: (kills.reached[p], kills.random.random()))
                if point in _START_POINTS and victim == "worker":
                    victim = "front"
                if point == "adopt.before" and victim == "machine":
                    victim = "everything"  # there is an arena to adopt
                print(f"round {n}: {victim} at {point or 'random'}")
                await kills.round(victim, point)
            await kills.end()
        finally:
            print(kills.summary(len(pool)))
        if ssd == "large":
            for victim_ in kills.hits.due:
                assert kills.hits.share(victim_) >= 0.95
        if rounds >= 4 * len(pool):
            assert set(pool) <= set(kills.reached), "points that traffic never leads to"

    geometry, ssd_bytes = (SMALL, 1024 * _MIB) if ssd == "large" else (_LARGE, 32 * _MIB)
    dram_bytes = _SLOTS * (geometry.slot_bytes + geometry.entry_bytes) + 2 * PAGE_BYTES
    with running_daemon(tmp_path, dram_bytes=dram_bytes, ssd_bytes=ssd_bytes) as daemon:
        control = daemon.run_dir / "failpoint"
        daemon.kill()
        daemon.environment[failpoints.VARIABLE] = str(control)
        daemon.start()
        asyncio.run(main(Kills(daemon, geometry, control, SEED)))
