"""Placement as pure functions: who goes, who comes, in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvdaemon.placement.lru import LeastRecentlyUsed
from kvdaemon.placement.policy import Candidate, Fetch, Placement

LRU: Placement = LeastRecentlyUsed()


def names(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


def candidates(text: str, *, leased: str = "", dirty: str = "", size: int = 10) -> list[Candidate]:
    return [Candidate(c.encode(), size, c in leased, c in dirty) for c in text]


def test_coldest_clean_unleased_first() -> None:
    plan = LRU.plan_dram_eviction(candidates("abcdef", leased="a", dirty="b"), 2, {b"c"})
    assert plan == names("de")


def test_dirty_only_when_told_and_last() -> None:
    resident = candidates("abcd", dirty="ab")
    assert LRU.plan_dram_eviction(resident, 4, frozenset()) == names("cd")
    assert LRU.plan_dram_eviction(resident, 3, frozenset(), dirty_too=True) == names("cda")
    assert LRU.plan_dram_eviction(resident, 0, frozenset(), dirty_too=True) == []


def test_reads_no_further_than_needed() -> None:
    """A tier of a million chunks must not be walked for one victim."""
    resident = iter(candidates("abcdef"))
    assert LRU.plan_dram_eviction(resident, 2, frozenset()) == names("ab")
    assert next(resident).chunk_id == b"c"


def test_ssd_eviction_adds_up() -> None:
    assert LRU.plan_ssd_eviction(candidates("abcdef", leased="b"), 25) == names("acd")
    assert LRU.plan_ssd_eviction(candidates("ab"), 1000) == names("ab")
    assert LRU.plan_ssd_eviction(candidates("ab"), 0) == []


def test_prefetch_head_first_into_free_slots() -> None:
    jobs = [names("ab"), names("cd")]
    plan = LRU.plan_prefetch(jobs, set(names("bcd")), candidates("a"), free_slots=2, limit=10)
    assert plan == [Fetch(b"b"), Fetch(b"c")]  # "a" is the head's own: nobody takes its slot for "d"


def test_prefetch_takes_from_nobody_nearer_to_the_head() -> None:
    """Unwanted chunks give way first, then the last job's; never one's own or an earlier job's."""
    jobs = [names("ab"), names("cd"), names("ef")]
    plan = LRU.plan_prefetch(jobs, set(names("bd")), candidates("aexf"), free_slots=0, limit=10)
    assert plan == [Fetch(b"b", b"x"), Fetch(b"d", b"e")]
    plan = LRU.plan_prefetch(jobs, set(names("ef")), candidates("abcd"), free_slots=0, limit=10)
    assert plan == []


def test_prefetch_leaves_dirty_and_leased_alone() -> None:
    plan = LRU.plan_prefetch([names("a")], {b"a"}, candidates("xy", leased="x", dirty="y"), free_slots=0, limit=1)
    assert plan == []


@given(
    jobs=st.lists(st.lists(st.sampled_from(names("abcdefgh")), max_size=4), max_size=4),
    resident=st.lists(st.sampled_from(names("abcdefghxyz")), unique=True),
    blocked=st.sets(st.sampled_from(names("abcdefghxyz"))),
    free_slots=st.integers(0, 4),
    limit=st.integers(0, 6),
)
def test_prefetch_plans_are_sound(
    jobs: list[list[bytes]], resident: list[bytes], blocked: set[bytes], free_slots: int, limit: int
) -> None:
    """Whatever the queue: no more than the limit, nothing twice, no victim that is busy or wanted as soon."""
    on_ssd_only = {c for job in jobs for c in job} - set(resident)
    chunks = [Candidate(c, 1, leased=c in blocked) for c in resident]
    plan = LRU.plan_prefetch(jobs, on_ssd_only, chunks, free_slots, limit)
    first = {c: n for n, job in reversed(list(enumerate(jobs))) for c in job}
    fetched, victims = [f.chunk_id for f in plan], [f.victim for f in plan if f.victim is not None]
    assert len(plan) <= limit
    assert len(set(fetched)) == len(fetched)
    assert len(set(victims)) == len(victims)
    assert set(fetched) <= on_ssd_only
    assert sum(f.victim is None for f in plan) <= free_slots
    assert [first[c] for c in fetched] == sorted(first[c] for c in fetched)
    for fetch in plan:
        if fetch.victim is not None:
            assert fetch.victim in resident
            assert fetch.victim not in blocked
            assert first.get(fetch.victim, len(jobs)) > first[fetch.chunk_id]
