"""The budget of bytes written to the SSD: what it adds up to, and whom it serves first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvdaemon.placement.admission import WriteBudget

_DAY_S = 86_400.0
_HOUR = 24_000  # bytes of an hour, below


def budget(bytes_per_day: int = 24 * _HOUR) -> WriteBudget:
    return WriteBudget(bytes_per_day, now_s=0.0)


def test_half_full_everybody_below_only_who_came_back() -> None:
    bucket = budget()
    assert bucket.level_bytes(0.0) == _HOUR
    assert bucket.admits(_HOUR // 2, reused=False, now_s=0.0)
    assert bucket.admits(1, reused=False, now_s=0.0)  # at least half full: not below yet
    assert not bucket.admits(1, reused=False, now_s=0.0)
    assert bucket.admits(_HOUR // 2, reused=True, now_s=0.0)
    assert bucket.level_bytes(0.0) == -1
    assert not bucket.admits(1, reused=True, now_s=0.0)


def test_it_fills_evenly_and_no_further_than_an_hour() -> None:
    bucket = budget()
    bucket.admits(_HOUR, reused=True, now_s=0.0)
    assert bucket.level_bytes(_DAY_S / 48) == _HOUR * 23 / 48
    assert bucket.level_bytes(10 * _DAY_S) == _HOUR


def test_a_chunk_larger_than_the_bucket_waits_for_what_the_one_before_overdrew() -> None:
    bucket = budget()
    assert bucket.admits(3 * _HOUR, reused=True, now_s=0.0)
    refills_s = 2 * _HOUR / (23 * _HOUR / _DAY_S)
    assert not bucket.admits(3 * _HOUR, reused=True, now_s=refills_s - 1)
    assert bucket.admits(3 * _HOUR, reused=True, now_s=refills_s + 1)


def test_what_is_written_beside_chunks_is_paid_for_once() -> None:
    """Chunks reach the disk after they were admitted: its count runs behind, then ahead by logs and rewriting."""
    bucket = budget()
    bucket.admits(1000, reused=False, now_s=0.0)
    bucket.wrote(200, now_s=0.0)  # the chunk waits in memory
    assert bucket.level_bytes(0.0) == _HOUR - 1000
    bucket.wrote(1100, now_s=0.0)
    bucket.wrote(1100, now_s=0.0)
    assert bucket.level_bytes(0.0) == _HOUR - 1100
    bucket.admits(1000, reused=False, now_s=0.0)
    bucket.wrote(1500, now_s=0.0)
    assert bucket.level_bytes(0.0) == _HOUR - 2100
    bucket.wrote(2150, now_s=0.0)
    assert bucket.level_bytes(0.0) == _HOUR - 2150


@given(
    st.lists(st.tuples(st.floats(0.0, 4000.0), st.integers(1, 3 * _HOUR), st.booleans()), min_size=1, max_size=200),
    st.integers(_HOUR, 100 * _HOUR),
)
def test_no_day_gets_more_than_the_budget_and_one_chunk(
    offers: list[tuple[float, int, bool]], bytes_per_day: int
) -> None:
    """Whatever is offered when: in every window of 24 hours the admitted bytes stay within it."""
    bucket = budget(bytes_per_day)
    now_s = 0.0
    admitted: list[tuple[float, int]] = []
    for pause_s, size, reused in offers:
        now_s += pause_s
        if bucket.admits(size, reused=reused, now_s=now_s):
            admitted.append((now_s, size))
    for n, (start_s, _) in enumerate(admitted):
        window = [size for at_s, size in admitted[n:] if at_s <= start_s + _DAY_S]
        assert sum(window) - max(window) <= bytes_per_day + 1e-6
