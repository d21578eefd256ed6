"""The replay: turns wait for places and for the disk, figures add up, and equal arguments give equal results."""

from __future__ import annotations

from dataclasses import asdict, replace
from random import Random

import pytest

from benchmarks.simulator.names import PolicyName
from benchmarks.simulator.replay import Machine, Tally, replay
from benchmarks.simulator.simulation import Simulation, as_json
from benchmarks.simulator.tiers import Tiers
from benchmarks.simulator.traces import Trace
from kvdaemon.placement.policies import POLICIES
from tests.simulator.making import AT_ONCE, SIZE, conversations, request, sequence

BUSY = Machine(places=2, prefill_rate=40.0, decode_rate=2.0, ssd_read_rate=60.0, ssd_write_rate=60.0)


def run(
    trace: Trace, policy: str, dram: int, ssd: int, machine: Machine = BUSY
) -> tuple[Tally, list[tuple[str, bytes]]]:
    """Sizes in chunks. Also every decision in order."""
    decisions: list[tuple[str, bytes]] = []

    def decided(what: str, chunk_id: bytes) -> None:
        decisions.append((what, chunk_id))

    tally = replay(
        trace, lambda tally, at: Tiers(POLICIES[policy](), dram, ssd, SIZE, machine, tally, at, decided), machine
    )
    return tally, decisions


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("dram", "ssd"), [(12, 0), (12, 30), (12, 200), (200, 12), (1, 1)])
def test_sums(policy: str, dram: int, ssd: int) -> None:
    """Whatever the policy and the sizes: hits are of DRAM or late, turns add up, and what came went or stayed."""
    trace = conversations(Random(7), 40)
    tally, decisions = run(trace, policy, dram, ssd)
    requests = [r for turns in trace.conversations for r in turns]
    assert tally.requests == len(requests) == sum(r.prompt_tokens > 0 for r in requests)
    assert tally.prompt_tokens == sum(r.prompt_tokens for r in requests)
    assert tally.hit_tokens == tally.hit_tokens_dram + tally.hit_tokens_ssd <= tally.prompt_tokens
    assert sum(prompt for prompt, _ in tally.by_turn.values()) == tally.prompt_tokens
    assert sum(hit for _, hit in tally.by_turn.values()) == tally.hit_tokens
    assert tally.evicted_dram_tokens == SIZE * sum(what == "evict dram" for what, _ in decisions)
    assert tally.evicted_ssd_tokens == SIZE * sum(what == "evict ssd" for what, _ in decisions)
    assert 0 <= tally.written_tokens - tally.evicted_ssd_tokens <= ssd * SIZE
    fetched = SIZE * sum(what == "fetch" for what, _ in decisions)
    assert tally.ready_tokens + tally.useless_tokens <= fetched <= tally.read_tokens
    if not ssd:
        assert tally.hit_tokens_ssd == tally.read_tokens == tally.written_tokens == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_determinism(policy: str) -> None:
    """Decision by decision."""
    first, decisions = run(conversations(Random(3), 40), policy, 12, 40)
    second, again = run(conversations(Random(3), 40), policy, 12, 40)
    assert decisions
    assert decisions == again
    assert asdict(replace(first, wall_s=0.0)) == asdict(replace(second, wall_s=0.0))


def test_time() -> None:
    """One place: the second turn waits for the first; what hits is not computed again."""
    trace = Trace(SIZE, [[request("ab", at_s=0.0), request("abc", number=1, after_s=5.0)], [request("x", at_s=0.5)]])
    machine = Machine(places=1, prefill_rate=4.0, decode_rate=1.0)
    tally, _ = run(trace, "lru", 100, 0, machine)
    # 0-3: ab, 2 s of prefill and 1 s of answer; 3-5: x, which waited 2.5 s; 8-10: abc, of which only c is computed
    assert (tally.simulated_s, tally.queue_wait_s, tally.prefill_s) == (10.0, 2.5, 2.0 + 1.0 + 1.0)
    assert (tally.hit_tokens, tally.most_waiting) == (2 * SIZE, 1)
    assert tally.by_turn == {0: [3 * SIZE, 0], 1: [3 * SIZE, 2 * SIZE]}


def test_a_hit_on_ssd_is_late_and_takes_time() -> None:
    """Without a queue nobody knows that it is needed: the turn waits for the disk."""
    trace = sequence("ab", "cd", "ab")
    machine = replace(AT_ONCE, ssd_read_rate=2.0)
    tally, _ = run(trace, "scheduler-aware", 2, 10, machine)
    assert (tally.hit_tokens_dram, tally.hit_tokens_ssd) == (0, 2 * SIZE)
    assert (tally.prefill_s, tally.read_tokens, tally.ready_tokens) == (4.0, 2 * SIZE, 0)


def test_what_waits_is_fetched_in_time() -> None:
    """The third turn waits behind a long one; meanwhile its chunks come up. LRU does not look, and is late."""
    trace = Trace(
        SIZE, [[request(word, at_s=at)] for word, at in (("ab", 0.0), ("cdfg", 10.0), ("e", 20.0), ("ab", 20.1))]
    )
    machine = Machine(1, float("inf"), 0.5, 8.0, float("inf"))
    aware, decisions = run(trace, "scheduler-aware", 4, 10, machine)
    assert (aware.hit_tokens_dram, aware.hit_tokens_ssd, aware.ready_tokens) == (2 * SIZE, 0, 2 * SIZE)
    assert [what for what in decisions if what[0] == "fetch"] == [("fetch", b"a"), ("fetch", b"ab")]
    lru, _ = run(trace, "lru", 4, 10, machine)
    assert (lru.hit_tokens_dram, lru.hit_tokens_ssd, lru.ready_tokens) == (0, 2 * SIZE, 0)


def test_warm_up_is_not_counted() -> None:
    """The same turns, of which the first are not counted, for the limit neither."""
    trace = conversations(Random(5), 30)
    whole, best = Simulation(trace, "lru", 20 * SIZE, machine=AT_ONCE).run()
    later, best_later = Simulation(trace, "lru", 20 * SIZE, machine=AT_ONCE, warm_up=10).run()
    assert later.requests == best_later.requests == whole.requests - 10
    assert 0 < later.prompt_tokens == best_later.prompt_tokens < whole.prompt_tokens
    some, best_some = Simulation(trace, "lru", 20 * SIZE, machine=AT_ONCE, warm_up=10, count=7).run()
    assert some.requests == best_some.requests == 7
    assert some.hit_tokens <= best_some.hit_tokens
    assert later.hit_tokens <= best_later.hit_tokens < best.hit_tokens
    with pytest.raises(ValueError, match="leave none"):
        Simulation(trace, "lru", 20 * SIZE, warm_up=trace.requests)


def test_partial_chunks_count_their_tokens() -> None:
    """A hit on a chunk of one token is a hit of one token."""
    short = replace(request("ab"), left_tokens=SIZE + 1, whole=1, prompt_tokens=SIZE, at_s=0.0)
    first = replace(short, chain=(), chain_tokens=0)
    second = replace(short, chain_tokens=SIZE + 1, prompt_tokens=2 * SIZE, number=1, at_s=None)
    tally, _ = run(Trace(SIZE, [[first, second]]), "lru", 10, 0, AT_ONCE)
    assert (tally.hit_tokens, tally.prompt_tokens) == (SIZE + 1, 3 * SIZE)


@pytest.mark.parametrize(
    ("policy", "dram", "ssd", "complaint"),
    [
        ("lru", SIZE - 1, 0, "holds no chunk"),
        ("lru", SIZE, SIZE - 1, "holds no chunk"),
        ("arc", SIZE, SIZE, "one tier"),
    ],
)
def test_sizes_that_make_no_sense(policy: PolicyName, dram: int, ssd: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Simulation(sequence("a"), policy, dram, ssd)


def test_json_is_complete() -> None:
    trace = conversations(Random(1), 20)
    tally, best = Simulation(trace, "anticipating", 10 * SIZE, 40 * SIZE, BUSY).run()
    figures = as_json(tally, bytes_per_token=10)
    assert figures["bytes_written"] == 10 * tally.written_tokens > 0
    assert figures["late_tokens"] == figures["hit_tokens_ssd"]
    assert sum(turn["hit_tokens"] for turn in figures["hit_rate_by_turn"]) == figures["hit_tokens"]
    assert figures["hit_rate"] == pytest.approx(figures["hit_tokens"] / figures["prompt_tokens"])
    assert best.hit_tokens >= tally.hit_tokens
    alone, same = Simulation(trace, "belady", 10 * SIZE, 40 * SIZE, BUSY).run()
    assert alone == same
