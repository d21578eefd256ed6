"""DRAM and SSD under a placement, as kvdaemon has them, in simulated time."""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks.simulator.replay import Machine, Schedule, Tally
from benchmarks.simulator.traces import Request
from kvdaemon.placement.placement import Placement
from kvdaemon.placement.policy import Policy, TurnEnd
from kvdaemon.placement.runs import Node, Tier

_AHEAD_CHUNKS = 4  # that the disk is asked for before it has read what came first


class Tiers:
    """A store of two tiers. Chunks enter DRAM and are written behind; ssd_chunks = 0: DRAM alone."""

    def __init__(
        self,
        policy: Policy,
        dram_chunks: int,
        ssd_chunks: int,
        chunk_tokens: int,
        machine: Machine,
        tally: Tally,
        at: Schedule,
        decided: Callable[[str, bytes], None] = lambda what, chunk_id: None,
    ) -> None:
        """decided: told every decision of the placement, in order: what and which chunk."""
        self.placement = Placement(policy, {"dram": dram_chunks, "ssd": ssd_chunks})
        self._room: dict[Tier, int] = {"dram": dram_chunks, "ssd": ssd_chunks}
        self._has_ssd = ssd_chunks > 0
        self._chunk_tokens = chunk_tokens
        self._read_s = chunk_tokens / machine.ssd_read_rate  # per chunk
        self._write_s = chunk_tokens / machine.ssd_write_rate
        self._tally, self._at, self._decided = tally, at, decided
        self._waiting: set[int] = set()  # tickets that the placement knows
        self._held: dict[int, list[Node]] = {}  # by ticket of the running turn
        self._read_free_s = 0.0  # when the disk has read what was asked for
        self._write_free_s = 0.0
        self._loading: set[bytes] = set()
        self._unused: set[bytes] = set()  # prefetched, and not used yet

    def wait(self, ticket: int, request: Request, now_s: float) -> None:
        if not request.chain:  # a conversation that begins: the gateway tells of none
            return
        self._waiting.add(ticket)
        self.placement.wait(ticket, request.chain, now_s)
        self._prefetch(now_s)

    def begin(self, ticket: int, request: Request, now_s: float) -> tuple[int, int]:
        placement, tree, chain = self.placement, self.placement.tree, request.chain
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            placement.go(ticket)
        placement.used(chain, now_s)
        dram = found = tree.leading("dram", chain)
        if self._has_ssd:
            if self._loading:
                dram = next((i for i in range(dram) if chain[i] in self._loading), dram)
            while found < len(chain) and chain[found] in tree:
                found += 1
            held = [tree.nodes[chunk_id] for chunk_id in chain[:found]]
            self._count_prefetched(chain, dram, found)
        else:
            held = [tree.nodes[chain[found - 1]]] if found else []  # nothing leaves DRAM but from the tail
        placement.hold_all(held)
        for i in range(dram, found):
            if tree.holds("dram", chain[i]):
                continue
            if not self._make_room("dram", now_s):
                break
            self._tally.read_tokens += self._chunk_tokens
            placement.added("dram", chain[i], chain[i - 1] if i else b"", now_s)
        self._held[ticket] = held
        self._prefetch(now_s)
        return dram, found - dram

    def end(self, ticket: int, request: Request, now_s: float) -> None:
        placement, tree, left = self.placement, self.placement.tree, request.left
        held = self._held.pop(ticket)
        new: list[bytes] = []
        for i in range(tree.leading("dram", left), len(left)):
            chunk_id = left[i]
            if chunk_id in tree:
                continue
            if not self._make_room("dram", now_s):
                self._tally.lost_tokens += (len(left) - i) * self._chunk_tokens
                break
            parent_id = left[i - 1] if i else b""
            placement.added("dram", chunk_id, parent_id, now_s, is_partial=i >= request.whole, unsaved=self._has_ssd)
            held.append(tree.nodes[chunk_id])
            placement.hold_all(held[-1:])  # until the turn has ended
            new.append(chunk_id)
        share = request.left_tokens % self._chunk_tokens / self._chunk_tokens
        end = TurnEnd(request.next_speaker, request.answer_tokens, share)
        placement.turn_ended(left, request.whole, end, now_s)
        placement.release_all(held)
        if new and self._has_ssd:
            self._write_free_s = max(now_s, self._write_free_s) + len(new) * self._write_s
            self._at(self._write_free_s, functools.partial(self._written, new))
        self._prefetch(now_s)

    def _written(self, chunk_ids: list[bytes], now_s: float) -> None:
        placement = self.placement
        for chunk_id in chunk_ids:
            if not placement.tree.holds("dram", chunk_id):
                continue
            if self._make_room("ssd", now_s):
                self._tally.written_tokens += self._chunk_tokens
                placement.added("ssd", chunk_id, b"", now_s)
            placement.saved(chunk_id)
        self._prefetch(now_s)  # what is saved may give way

    def _make_room(self, tier: Tier, now_s: float) -> bool:
        """For one chunk more."""
        while self.placement.tree.count(tier) >= self._room[tier]:
            victim = self.placement.next_victim(tier, now_s, unsaved_too=not self._has_ssd)
            if victim is None:
                return False
            self._evict(tier, victim)
        return True

    def _evict(self, tier: Tier, victim: bytes) -> None:
        self._decided(f"evict {tier}", victim)
        if tier == "ssd":
            self._tally.evicted_ssd_tokens += self._chunk_tokens
        else:
            self._tally.evicted_dram_tokens += self._chunk_tokens
            if victim in self._unused:
                self._unused.remove(victim)
                self._tally.useless_tokens += self._chunk_tokens
        self.placement.removed(tier, victim)

    def _prefetch(self, now_s: float) -> None:
        """Keep the disk busy with what the queue needs, a little ahead."""
        if not self._has_ssd:
            return
        placement = self.placement
        while self._read_free_s <= now_s + _AHEAD_CHUNKS * self._read_s:
            fetch = placement.next_fetch(self._room["dram"] - placement.tree.count("dram"), now_s)
            if fetch is None:
                return
            if fetch.victim is not None:
                self._evict("dram", fetch.victim)
            chunk_id = fetch.chunk_id
            self._decided("fetch", chunk_id)
            self._tally.read_tokens += self._chunk_tokens
            placement.added("dram", chunk_id, b"", now_s)
            self._unused.add(chunk_id)
            if not self._read_s:
                continue
            placement.hold(chunk_id)  # until it is read
            self._loading.add(chunk_id)
            self._read_free_s = max(now_s, self._read_free_s) + self._read_s
            self._at(self._read_free_s, functools.partial(self._loaded, chunk_id))

    def _loaded(self, chunk_id: bytes, now_s: float) -> None:
        self._loading.discard(chunk_id)
        self.placement.release(chunk_id)
        self._prefetch(now_s)

    def _count_prefetched(self, chain: tuple[bytes, ...], dram: int, found: int) -> None:
        for i in range(found):
            if chain[i] in self._unused:
                self._unused.remove(chain[i])
                if i < dram:
                    self._tally.ready_tokens += self._chunk_tokens
