"""Life tables: the index against the plainest computation of what it says, and what a table learns."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdaemon.placement.return_times import BINS, EDGES_S, LifeTable, bin_of, gittins_index

WIDTHS_S = [*(b - a for a, b in itertools.pairwise(EDGES_S)), EDGES_S[-1]]


def brute_force(hazards: list[float], begin: int) -> float:
    """Hold on until the end of each later bin in turn: returns over seconds held, written out path by path."""
    best = 0.0
    for end in range(begin, BINS):
        returns = held_s = 0.0
        waits = 1.0  # probability that it has not come yet
        waited_s = 0.0
        for age_bin in range(begin, end + 1):
            comes = waits * hazards[age_bin]
            returns += comes
            held_s += comes * (waited_s + WIDTHS_S[age_bin] / 2)
            waits -= comes
            waited_s += WIDTHS_S[age_bin]
        held_s += waits * waited_s
        best = max(best, returns / held_s)
    return best


@given(st.lists(st.floats(0.0, 0.9), min_size=BINS, max_size=BINS))
def test_the_index_is_the_best_ratio(hazards: list[float]) -> None:
    index = gittins_index(hazards)
    for begin in range(0, BINS, 5):
        assert index[begin] == pytest.approx(brute_force(hazards, begin), rel=0.02)  # the far future is cut off


def test_a_constant_hazard_per_bin_is_lru() -> None:
    """With nothing known, the longer somebody is away the less they are worth, from the first half second on."""
    index = LifeTable().index()[1:]
    assert index == sorted(index, reverse=True)


def test_people_who_need_a_minute() -> None:
    """Who left long ago is worth more than who just left, where all return at about the same time, until it is past."""
    hazards = [0.0] * BINS
    hazards[bin_of(60.0)] = 0.9
    index = gittins_index(hazards)
    assert index[bin_of(40.0)] > index[bin_of(10.0)] > index[bin_of(1.0)] > index[bin_of(100.0)] == 0.0


@pytest.mark.parametrize("age_s", [0.0, 0.4, 0.5, 1.0, 59.0, 1e5, 1e9])
def test_bins(age_s: float) -> None:
    age_bin = bin_of(age_s)
    assert EDGES_S[age_bin] <= age_s
    assert age_bin == BINS - 1 or age_s < EDGES_S[age_bin + 1]


def test_a_table_learns_and_tells_the_kind_above() -> None:
    above = LifeTable()
    table = LifeTable(above)
    other = LifeTable(above)
    for _ in range(2000):
        table.reached(4)
    for _ in range(1000):
        table.returned(4)
    assert table.hazards()[4] == pytest.approx(0.5, abs=0.01)
    assert other.hazards()[4] == above.hazards()[4] == pytest.approx(0.5, abs=0.01)
    for _ in range(2000):
        other.reached(4)
    assert other.hazards()[4] < 0.01
    assert table.hazards()[4] > 0.45
    assert table.hazards()[5] == pytest.approx(0.06, abs=0.01)  # nobody was seen there
