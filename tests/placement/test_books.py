"""Whatever happens to the two tiers: a victim is named whenever one may go, and never one that may not."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvdaemon.placement.placement import Placement
from kvdaemon.placement.policies import POLICIES
from kvdaemon.placement.policy import TurnEnd
from kvdaemon.placement.runs import TIERS, Tier

words = st.text("ab", min_size=1, max_size=5)
tiers = st.sampled_from(TIERS)


def path_of(word: str) -> list[bytes]:
    return [word[: i + 1].encode() for i in range(len(word))]


class TwoTiers(RuleBasedStateMachine):
    """A store as the daemon keeps it, of sets."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.placement = Placement(POLICIES[self.policy](), {"dram": 8, "ssd": 20})
        self.resident: dict[Tier, set[bytes]] = {"dram": set(), "ssd": set()}
        self.unsaved: set[bytes] = set()
        self.held: Counter[bytes] = Counter()
        self.waiting: dict[int, list[bytes]] = {}
        self.whole: set[int] = set()  # of the waiting, those whose context was stored all the time
        self.tickets = 0
        self.now_s = 0.0

    @rule(word=words, partial=st.booleans(), speaker=st.sampled_from(["person", "tool"]), took_s=st.floats(0.1, 100.0))
    def turn(self, word: str, partial: bool, speaker: str, took_s: float) -> None:
        self.now_s += took_s
        chain = path_of(word) + ([word.encode() + b"." + str(self.now_s).encode()] if partial else [])
        self.placement.used(chain, self.now_s)
        for i, chunk_id in enumerate(chain):
            if chunk_id not in self.resident["dram"]:
                is_new = chunk_id not in self.resident["ssd"]
                self._added("dram", chunk_id, chain[i - 1] if i else b"", i == len(word), is_new)
        self.placement.turn_ended(chain, len(word), TurnEnd(speaker), self.now_s)

    def _added(self, tier: Tier, chunk_id: bytes, parent_id: bytes, is_partial: bool, unsaved: bool) -> None:
        self.placement.added(tier, chunk_id, parent_id, self.now_s, is_partial=is_partial, unsaved=unsaved)
        self.resident[tier].add(chunk_id)
        if unsaved:
            self.unsaved.add(chunk_id)

    @rule()
    def write_behind(self) -> None:
        for chunk_id in sorted(self.unsaved, key=len)[:2]:
            self.placement.added("ssd", chunk_id, b"", self.now_s)
            self.placement.saved(chunk_id)
            self.resident["ssd"].add(chunk_id)
            self.unsaved.remove(chunk_id)

    @rule(tier=tiers)
    def evict(self, tier: Tier) -> None:
        victim = self.placement.next_victim(tier, self.now_s, unsaved_too=True)
        if victim is not None:
            self._removed(tier, victim)

    def _removed(self, tier: Tier, chunk_id: bytes) -> None:
        self.placement.removed(tier, chunk_id)
        self.resident[tier].remove(chunk_id)
        if tier == "dram":
            self.unsaved.discard(chunk_id)
        if not any(chunk_id in resident for resident in self.resident.values()):
            self.whole -= {ticket for ticket in self.whole if chunk_id in self.waiting[ticket]}

    @rule(free_slots=st.integers(0, 3))
    def fetch(self, free_slots: int) -> None:
        fetch = self.placement.next_fetch(free_slots, self.now_s)
        if fetch is None:
            return
        assert fetch.chunk_id in self.resident["ssd"] - self.resident["dram"]
        assert (fetch.victim is None) == (free_slots > 0)
        if fetch.victim is not None:
            assert fetch.victim in self._may_go("dram") - self.unsaved
            self._removed("dram", fetch.victim)
        self._added("dram", fetch.chunk_id, b"", False, False)

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        if self.resident["dram"]:
            chunk_id = data.draw(st.sampled_from(sorted(self.resident["dram"])))
            self.placement.hold(chunk_id)
            self.held[chunk_id] += 1

    @rule()
    def release(self) -> None:
        for chunk_id in list(self.held)[:1]:
            self.placement.release(chunk_id)
            self.held[chunk_id] -= 1
            self.held += Counter()  # drops what is zero

    @rule(word=words)
    def wait(self, word: str) -> None:
        self.placement.wait(self.tickets, path_of(word))
        self.waiting[self.tickets] = path_of(word)
        if set(path_of(word)) <= self.resident["dram"] | self.resident["ssd"]:
            self.whole.add(self.tickets)
        self.tickets += 1

    @rule()
    def go(self) -> None:
        for ticket in list(self.waiting)[:1]:
            self.placement.go(ticket)
            del self.waiting[ticket]
            self.whole.discard(ticket)

    def _may_go(self, tier: Tier) -> set[bytes]:
        """By the chunks alone: not held, and nothing in the tier continues it."""
        tree, resident = self.placement.tree, self.resident[tier]
        last = set()
        for chunk_id in resident:
            run = tree.run_of(chunk_id)
            assert run is not None
            behind = run.chunks[run.chunks.index(chunk_id) + 1 :]
            below = list(run.children.values())
            for child in below:
                behind.extend(child.chunks)
                below.extend(child.children.values())
            if not resident & set(behind):
                last.add(chunk_id)
        return last - set(self.held)

    @invariant()
    def a_victim_is_named_whenever_one_may_go(self) -> None:
        for tier in TIERS:
            may_go = self._may_go(tier)
            saved = may_go - self.unsaved if tier == "dram" else may_go
            for allowed, unsaved_too in ((saved, False), (may_go, True)):
                victim = self.placement.next_victim(tier, self.now_s, unsaved_too=unsaved_too)
                assert (victim is None) == (not allowed)
                assert victim is None or victim in allowed

    @invariant()
    def what_the_head_waits_for_goes_last(self) -> None:
        """Unless nothing else may go, no chunk that the first turn waits for is named."""
        ticket = min(self.waiting, default=-1)
        if ticket not in self.whole or not POLICIES[self.policy]().looks_ahead:
            return
        head = set(self.waiting[ticket])
        for tier in TIERS:
            may_go = self._may_go(tier) - (self.unsaved if tier == "dram" else set())
            victim = self.placement.next_victim(tier, self.now_s)
            if victim in head:
                wanted = {id(self.placement.tree.run_of(c)) for c in head}
                assert all(id(self.placement.tree.run_of(c)) in wanted for c in may_go)


@pytest.mark.parametrize("policy", POLICIES)
def test_two_tiers(policy: str) -> None:
    machine = type("TwoTiers", (TwoTiers,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=25, deadline=None))
