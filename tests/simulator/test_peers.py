"""Other systems' replacement against the few lines that define each, and the optimum against all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.peers import Arc, Belady, Lru, Replacement, S3Fifo, TailLru
from benchmarks.simulator.simulation import PEERS, Simulation
from benchmarks.simulator.traces import Request
from tests.simulator.making import AT_ONCE, SIZE, conversations, request, sequence

words = st.lists(st.text("abcd", min_size=1, max_size=4), min_size=1, max_size=40)


def resident(replacement: Replacement, prompts: list[str]) -> set[bytes]:
    every = {word[: i + 1].encode() for word in prompts for i in range(len(word))}
    return {chunk_id for chunk_id in every if chunk_id in replacement}


@given(words, st.integers(1, 6))
def test_lru(prompts: list[str], capacity: int) -> None:
    """The chunks used last, with those in front of a prompt used after those behind them."""
    lru, uses = Lru(capacity), list[bytes]()
    for word in prompts:
        lru.use(request(word))
        uses += reversed(request(word).left)
        latest = list(dict.fromkeys(reversed(uses)))
        assert resident(lru, prompts) == set(latest[:capacity])


@given(words, st.integers(1, 6))
def test_tail_lru_with_nothing_to_spare_is_lru(prompts: list[str], capacity: int) -> None:
    lru, tail = Lru(capacity), TailLru(capacity, SIZE, 0)
    for word in prompts:
        lru.use(request(word))
        tail.use(request(word))
        assert resident(tail, prompts) == resident(lru, prompts)


def test_tail_lru_spares_tails_first() -> None:
    """What lies behind history + expected prompt - spare goes before anything that is needed, however old that is."""
    tail, lru = TailLru(3, SIZE, 4 * SIZE), Lru(3)
    for word in ("wx", "yz", "q"):  # the first two are to lose a chunk each: 9 of history + 8 expected - 16 is needed
        tail.use(request(word))
        lru.use(request(word))
    assert resident(tail, ["wx", "yz", "q"]) == {b"w", b"y", b"q"}
    assert resident(lru, ["wx", "yz", "q"]) == {b"y", b"yz", b"q"}


@given(words, st.integers(1, 6))
def test_arc_keeps_its_invariants(prompts: list[str], capacity: int) -> None:
    """Those of the paper: sizes of the lists, and no chunk in two of them."""
    arc = Arc(capacity)
    for word in prompts:
        arc.use(request(word))
        lists = [arc._once, arc._often, arc._ghost_once, arc._ghost_often]
        assert len(arc._once) + len(arc._often) <= capacity
        assert len(arc._once) + len(arc._ghost_once) <= capacity
        assert sum(map(len, lists)) <= 2 * capacity
        assert len(set().union(*lists)) == sum(map(len, lists))
        assert 0 <= arc._target <= capacity


def test_arc_keeps_what_was_used_twice_from_a_scan() -> None:
    arc, lru = Arc(4), Lru(4)
    for letter in [*"abab", *"cdefghijkl"]:
        arc.use(request(letter))
        lru.use(request(letter))
    assert {b"a", b"b"} <= resident(arc, [*"ab"])
    assert not resident(lru, [*"ab"])


@given(words, st.integers(1, 12))
def test_s3_fifo_by_its_definition(prompts: list[str], capacity: int) -> None:
    """Against the pseudo-code of the paper, written with plain lists."""
    s3 = S3Fifo(capacity)
    small: list[bytes] = []
    main: list[bytes] = []
    ghosts: list[bytes] = []
    freq: dict[bytes, int] = {}
    small_capacity = max(1, capacity // 10)
    for word in prompts:
        s3.use(request(word))
        for chunk_id in reversed(request(word).left):
            if chunk_id in small or chunk_id in main:
                freq[chunk_id] = min(3, freq[chunk_id] + 1)
                continue
            while len(small) + len(main) >= capacity:
                if len(small) >= small_capacity or not main:
                    while small:
                        out = small.pop(0)
                        if freq[out] > 1:
                            freq[out] = 0
                            main.append(out)
                        else:
                            ghosts = [*ghosts, out][-capacity:]
                            break
                    else:
                        continue
                else:
                    while freq[main[0]]:
                        freq[main[0]] -= 1
                        main.append(main.pop(0))
                    main.pop(0)
            if chunk_id in ghosts:
                ghosts.remove(chunk_id)
                main.append(chunk_id)
            else:
                small.append(chunk_id)
            freq[chunk_id] = 0
        assert resident(s3, prompts) == set(small) | set(main)


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=9), st.integers(1, 3))
def test_belady_is_the_optimum(letters: list[str], capacity: int) -> None:
    """No choice of what to keep after each turn hits more often: all are tried."""
    steps = [(is_end, request(letter)) for letter in letters for is_end in (False, True)]
    found = sum(count for _, count in Belady(capacity, steps).hits())
    best: dict[frozenset[str], int] = {frozenset(): 0}
    for letter in letters:
        after: dict[frozenset[str], int] = {}
        for kept, hits in best.items():
            hits += letter in kept
            there = sorted(kept | {letter})
            for size in range(min(capacity, len(there)) + 1):
                for chosen in map(frozenset, itertools.combinations(there, size)):
                    after[chosen] = max(after.get(chosen, 0), hits)
        best = after
    assert found == max(best.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("policy", ["fifo", "lru", "scheduler-aware", "anticipating", *PEERS])
def test_nobody_beats_belady(policy: str, seed: int) -> None:
    """In one tier, shown the same turns in the same order."""
    trace = conversations(Random(seed), 25)
    tally, best = Simulation(trace, policy, 20 * SIZE, machine=AT_ONCE).run()  # type: ignore[arg-type]
    assert 0 < tally.hit_tokens <= best.hit_tokens
    assert tally.prompt_tokens == best.prompt_tokens


@pytest.mark.parametrize("policy", ["lru", "plain-lru", "arc", "belady"])
def test_room_for_all_hits_all_that_was_seen(policy: str) -> None:
    trace = sequence("abc", "x", "abcd", "ab", "abcde", "x")
    tally, _ = Simulation(trace, policy, 100 * SIZE, machine=AT_ONCE).run()  # type: ignore[arg-type]
    assert tally.hit_tokens == (3 + 2 + 4 + 1) * SIZE


def test_flat_hits_end_at_the_first_missing_chunk() -> None:
    """A chunk is of use only with all before it."""
    request_: Callable[[str], Request] = request
    lru = Lru(2)
    lru.use(request_("abc"))
    assert resident(lru, ["abc"]) == {b"a", b"ab"}
    tally, _ = Simulation(sequence("abc", "abc"), "plain-lru", 2 * SIZE, machine=AT_ONCE).run(limit=False)
    assert tally.hit_tokens == 2 * SIZE
