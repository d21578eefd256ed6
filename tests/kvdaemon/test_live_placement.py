"""The simulator and the live daemon decide the same: a trace goes through both, and every decision is compared.

The daemon is all there: sockets, arena, SSD worker and its database. Only its clock is the trace's, its disk is as
fast as it takes, and write-behind waits until the simulator's disk has written.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.simulator.replay import Machine, Schedule, Tally, replay
from benchmarks.simulator.tiers import Tiers
from benchmarks.simulator.traces import Request, Trace
from kvdaemon.config import KvDaemonConfig, PolicyName
from kvdaemon.index import Residence
from kvdaemon.placement.policies import POLICIES
from kvdaemon.service import KvDaemon
from protocol.ids import ROOT, digest, pack_tokens
from protocol.messages import Ack, Commit, Committed, Manifest, QueueOrder, SaveManifest
from tests.kvdaemon.client import NAMESPACE, SMALL, Kv, StoreClient, eventually, make_chain

DRAM, SSD = 24, 60  # chunks
SIZE = SMALL.chunk_tokens
MACHINE = Machine(
    places=1, prefill_rate=20.0 * SIZE, decode_rate=1.0, ssd_read_rate=float("inf"), ssd_write_rate=2.0 * SIZE
)

Decision = tuple[str, bytes]


def make_trace(seed: int) -> Trace:
    """Conversations that grow by a chunk per turn, of persons and of tools; some turns are answered anew."""
    random = Random(seed)
    conversations = []
    now_s = 0.0
    for number in range(26):
        now_s += random.expovariate(1 / 6)
        chains: list[tuple[bytes, ...]] = [()]
        requests = []
        for turn in range(random.choice((1, 2, 4, 7))):
            goes_on_with = random.choice(chains) if random.random() < 0.15 else chains[-1]
            left = (*goes_on_with, digest("chunk", bytes([number, turn])))
            speaker = random.choice(("person", "tool"))
            gap_s = random.expovariate(1 / 30 if speaker == "person" else 1 / 3)
            whole = len(left)
            requests.append(
                Request(
                    *(goes_on_with, len(goes_on_with) * SIZE, left, whole * SIZE, whole, len(goes_on_with) * SIZE + 1),
                    *(random.randint(1, 4), speaker, turn, None if turn else now_s, gap_s),
                )
            )
            chains.append(left)
        conversations.append(requests)
    return Trace(SIZE, conversations)


@dataclass
class Step:
    """What happens in the trace, and what the simulator decided then."""

    what: str
    now_s: float
    ticket: int = -1
    request: Request | None = None
    chunks: int = 0  # written
    decisions: list[Decision] = field(default_factory=list)


class Recorded(Tiers):
    def __init__(self, steps: list[Step], policy: PolicyName, tally: Tally, at: Schedule) -> None:
        self.steps = steps
        super().__init__(POLICIES[policy](), DRAM, SSD, SIZE, MACHINE, tally, at, self._note)

    def _note(self, what: str, chunk_id: bytes) -> None:
        self.steps[-1].decisions.append((what, chunk_id))

    def wait(self, ticket: int, request: Request, now_s: float) -> None:
        self.steps.append(Step("wait", now_s, ticket, request))
        super().wait(ticket, request, now_s)

    def begin(self, ticket: int, request: Request, now_s: float) -> tuple[int, int]:
        self.steps.append(Step("begin", now_s, ticket, request))
        return super().begin(ticket, request, now_s)

    def end(self, ticket: int, request: Request, now_s: float) -> None:
        self.steps.append(Step("end", now_s, ticket, request))
        super().end(ticket, request, now_s)

    def _written(self, chunk_ids: list[bytes], now_s: float) -> None:
        chunks = sum(self.placement.tree.holds("dram", chunk_id) for chunk_id in chunk_ids)
        self.steps.append(Step("written", now_s, chunks=chunks))
        super()._written(chunk_ids, now_s)


class Live:
    """The daemon, led through the same steps."""

    def __init__(self, daemon: KvDaemon, client: StoreClient, clock: list[float]) -> None:
        self.daemon, self.client, self.clock = daemon, client, clock
        self.decisions: list[Decision] = []
        self._waiting: dict[int, bytes] = {}  # ticket -> turn key
        self._leases: dict[int, bytes] = {}
        self._writes_allowed = 0
        self._content = make_chain(SMALL, 1, 1)[0].layers
        store, placement = daemon.store, daemon.store.placement
        placement.capacity["ssd"] = SSD  # the trace is too small for a database of that size
        next_victim, next_fetch, next_dirty = placement.next_victim, placement.next_fetch, store.next_dirty

        def recorded_victim(tier: Any, now_s: float, **options: Any) -> bytes | None:
            victim = next_victim(tier, now_s, **options)
            if victim is not None:
                self.decisions.append((f"evict {tier}", victim))
            return victim

        def recorded_fetch(free_slots: int, now_s: float) -> Any:
            fetch = next_fetch(free_slots, now_s)
            if fetch is not None and fetch.victim is not None:
                self.decisions.append(("evict dram", fetch.victim))
            if fetch is not None:
                self.decisions.append(("fetch", fetch.chunk_id))
            return fetch

        def gated_dirty(limit: int) -> Any:
            chunks = next_dirty(min(limit, self._writes_allowed))
            self._writes_allowed -= len(chunks)
            return chunks

        placement.next_victim = recorded_victim  # type: ignore[method-assign]
        placement.next_fetch = recorded_fetch  # type: ignore[method-assign]
        store.next_dirty = gated_dirty  # type: ignore[method-assign]

    async def step(self, step: Step) -> None:
        self.clock[0] = step.now_s
        await getattr(self, step.what)(step)
        await eventually(self._is_settled, "the daemon has settled")

    def _is_settled(self) -> bool:
        chunks = self.daemon.store.index.resident()
        return not self.daemon.prefetcher.is_busy and all(c.residence is Residence.READY for c in chunks)

    async def wait(self, step: Step) -> None:
        assert step.request is not None
        if step.request.chain:  # a conversation that begins needs nothing
            self._waiting[step.ticket] = _key(step.request.chain)
            await self._tell_queue()

    async def begin(self, step: Step) -> None:
        assert step.request is not None
        chain = step.request.chain
        self._leases[step.ticket] = (await self.client.acquire(chain)).lease_id
        if self._waiting.pop(step.ticket, None) is not None:
            await self._tell_queue()

    async def end(self, step: Step) -> None:
        assert step.request is not None
        left = step.request.left
        for parent_id, chunk_id in zip((ROOT, *left), left, strict=False):
            if self.daemon.store.index.get(chunk_id) is not None:
                continue
            slots = await self.client.reserve(1)
            if not slots:
                break
            kv = Kv(chunk_id, parent_id, SIZE, self._content)
            self.client.fill(slots[0].slot, kv)
            reply = await self.client.rpc.request(Commit((self.client.committed(slots[0], kv),)), Committed, 5.0)
            assert reply.accepted == (True,)
        manifest = Manifest(
            *(_key(left), NAMESPACE, pack_tokens([1]), "", left, len(left) * SIZE),
            answer_tokens=step.request.answer_tokens,
            next_speaker=step.request.next_speaker,  # type: ignore[arg-type]
        )
        await self.client.rpc.request(SaveManifest(manifest), Ack, 5.0)
        await self.client.release(self._leases.pop(step.ticket))

    async def written(self, step: Step) -> None:
        """The turn's chunks come to SSD, after room was made where the simulator did so."""
        store = self.daemon.store
        for _ in [what for what, _ in step.decisions if what == "evict ssd"]:
            victims = store.evict_from_ssd(1, limit=1)
            assert self.daemon.ssd is not None
            await self.daemon.ssd.delete(victims)
        expected = store.index.dirty_chunks - step.chunks
        self._writes_allowed = step.chunks
        await eventually(lambda: store.index.dirty_chunks == expected, "chunks written")

    async def _tell_queue(self) -> None:
        keys = tuple(key for _, key in sorted(self._waiting.items()))
        await self.client.rpc.request(QueueOrder(keys), Ack, 5.0)


def _key(chain: tuple[bytes, ...]) -> bytes:
    return digest("turn", *chain)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_simulator_and_the_daemon_decide_the_same(
    policy: PolicyName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every eviction from either tier and every fetch, in order, by each policy; and all of them occur."""
    monkeypatch.setattr("kvdaemon.write_behind._GATHER_S", 0.0)  # the trace says when chunks are written
    steps: list[Step] = []
    tally = replay(make_trace(4), lambda tally, at: Recorded(steps, policy, tally, at), MACHINE)
    simulated = Counter(what for step in steps for what, _ in step.decisions)
    looks_ahead = policy in ("scheduler-aware", "anticipating")
    assert simulated["evict dram"] > 30
    assert simulated["evict ssd"] > 10
    assert (simulated["fetch"] > 10) == looks_ahead, simulated
    assert tally.most_waiting > 5

    async def main(run_dir: Path) -> None:
        clock = [0.0]
        slots = DRAM * (SMALL.slot_bytes + SMALL.entry_bytes) + 2 * 4096
        config = KvDaemonConfig(
            *(run_dir, tmp_path, f"ipc://{run_dir}/kvdaemon.sock", slots, 64 * 2**20), policy=policy, metrics_port=0
        )
        daemon = KvDaemon(config, lambda: clock[0])
        await daemon.start()
        try:
            client = await StoreClient(run_dir).start()
            assert daemon.store.dram is not None
            assert daemon.store.dram.slots == DRAM
            live = Live(daemon, client, clock)
            for number, step in enumerate(steps):
                already = len(live.decisions)
                await live.step(step)
                assert live.decisions[already:] == step.decisions, (number, step.what, step.now_s)
            await client.stop()
        finally:
            await daemon.stop()

    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as run_dir:
        asyncio.run(main(Path(run_dir)))
    print(f"{len(steps)} steps, {simulated.total()} decisions {dict(simulated)}, {time.monotonic() - started:.1f} s")
