"""Estimates of what loading and computing cost: found from what was seen, never negative, followed when they change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.rates import LinkRate, PrefillRate, Rates, pairs

STEPS = [(0, 512), (512, 512), (1024, 512), (1536, 64), (1600, 64), (0, 128)]


def seen(token_s: float, pair_s: float, steps: list[tuple[int, int]]) -> PrefillRate:
    rate = PrefillRate()
    for start, tokens in steps:
        rate = rate.prefilled(tokens, pairs(start, tokens), token_s * tokens + pair_s * pairs(start, tokens))
    return rate


@given(st.floats(1e-5, 1e-2), st.floats(0.05, 2))
def test_both_costs_are_found(token_s: float, ratio: float) -> None:
    """ratio: of a thousand earlier tokens' cost to the token's own."""
    rate = seen(token_s, ratio * token_s / 1000, STEPS * 3)
    true_s = token_s * 2000 + ratio * token_s / 1000 * pairs(0, 2000)
    assert rate.seconds(0, 2000) == pytest.approx(true_s, rel=0.03)


def test_steps_that_are_all_alike_are_still_foretold() -> None:
    """Nothing tells the two costs apart, and neither gets out of hand."""
    rate = seen(1e-3, 3e-7, [(1650, 64)] * 20)
    assert rate.seconds(1650, 64) == pytest.approx(1e-3 * 64 + 3e-7 * pairs(1650, 64), rel=0.01)
    assert rate.seconds(0, 1650) == pytest.approx(1e-3 * 1650 + 3e-7 * pairs(0, 1650), rel=0.5)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 1e7), st.floats(0, 10)), min_size=1, max_size=30))
def test_no_cost_is_ever_negative(steps: list[tuple[int, float, float]]) -> None:
    rate = PrefillRate()
    for tokens, token_pairs, seconds in steps:
        rate = rate.prefilled(tokens, token_pairs, seconds)
        assert rate.token_s >= 0
        assert rate.pair_s >= 0


def test_a_step_has_a_price_of_its_own() -> None:
    """Known from decoding; prefill in two steps costs it twice."""
    rate = PrefillRate(step_tokens=512).decoded(0.03)
    for start, tokens in STEPS * 3:
        rate = rate.prefilled(tokens, pairs(start, tokens), 0.03 + 1e-3 * tokens)
    assert rate.seconds(0, 512) == pytest.approx(0.542, rel=0.02)
    assert rate.seconds(0, 1024) == pytest.approx(1.084, rel=0.02)


def test_a_link_that_changes_is_followed() -> None:
    link = LinkRate()
    assert link.bytes_per_s == 0
    for now in range(10):
        link = link.observed(1000, 1.0, now)
    assert link.bytes_per_s == pytest.approx(1000)
    for now in range(10, 18):
        link = link.observed(100, 1.0, now)
    assert link.bytes_per_s == pytest.approx(190, rel=0.1)


def test_an_old_rate_is_not_known_any_more() -> None:
    rates = Rates()
    assert rates.load_s("dram", 100, 0.0) is None
    rates.loaded("dram", 1000, 1.0, 10.0)
    assert rates.load_s("dram", 500, 20.0) == pytest.approx(0.5)
    assert rates.load_s("ssd", 500, 20.0) is None
    assert rates.load_s("dram", 500, 1000.0) is None
