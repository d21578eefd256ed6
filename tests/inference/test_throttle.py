"""The slowed link holds its rate, whatever the sizes and however late its user wakes up. By a clock of our own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.throttle import Throttle

RATE = 1_000_000


@given(st.lists(st.tuples(st.integers(1, 500_000), st.floats(0, 0.05)), min_size=1, max_size=60))
def test_the_rate_holds(transfers: list[tuple[int, float]]) -> None:
    """Never faster, but for a burst of 10 ms; never slower than the link and its user's own delays together."""
    link, now, delays = Throttle(RATE), 100.0, 0.0
    for nbytes, delay in transfers:
        link.transfer(nbytes, now)
        now += link.busy_s(now) + delay
        delays += delay
    total_s = sum(nbytes for nbytes, _ in transfers) / RATE
    assert total_s - 0.01 * 1.001 <= now - 100.0 <= total_s + delays + 1e-6


@given(st.lists(st.integers(100_000, 500_000), min_size=1, max_size=60), st.floats(0, 0.0099))
def test_oversleeping_is_made_good(sizes: list[int], late: float) -> None:
    link, now = Throttle(RATE), 100.0
    for nbytes in sizes:
        link.transfer(nbytes, now)
        now += link.busy_s(now) + late
    assert now - 100.0 == pytest.approx(sum(sizes) / RATE, abs=0.011)


def test_no_limit() -> None:
    link = Throttle(0)
    link.transfer(10**12, 1.0)
    assert link.busy_s(1.0) == 0
