"""Load or compute: the choice is the best border there is, and no worse than either extreme."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.load_or_compute import choose, name_of
from inference.rates import PrefillRate

LAYERS = 12
CHUNKS = st.lists(st.tuples(st.integers(1, 512), st.floats(0, 2)), min_size=1, max_size=20)
RATES = st.builds(PrefillRate, st.floats(1e-6, 1e-2), st.floats(0, 1e-5), st.floats(0, 0.1), st.integers(64, 2048))


def borders_of(first: int, tokens: list[int]) -> list[int]:
    borders = [first]
    for count in tokens:
        borders.append(borders[-1] + count)
    return borders


def time_to_first_token(
    borders: list[int], load_s: list[float], at: int, new_tokens: int, layers: int, prefill: PrefillRate
) -> float:
    """Played layer by layer: the front first, then each layer of the new tokens' first step when it and its past are
    there, then their other steps."""
    if at == len(borders) - 1:
        return prefill.seconds(borders[0], borders[-1] - borders[0] + new_tokens)
    front_s = prefill.seconds(borders[0], borders[at] - borders[0])
    step_s = prefill.seconds(borders[-1], min(new_tokens, prefill.step_tokens))
    layer_load_s, layer_new_s = sum(load_s[at:]) / layers, step_s / layers
    now = front_s
    for layer in range(layers):
        now = max(now, layer_load_s * (layer + 1)) + layer_new_s
    return now + prefill.seconds(borders[-1], new_tokens) - step_s


@given(CHUNKS, st.integers(0, 4000), st.integers(1, 300), RATES)
def test_choice_is_the_best_border(
    chunks: list[tuple[int, float]], first: int, new_tokens: int, prefill: PrefillRate
) -> None:
    """Against a play of every meeting point: within 3 % and 2 ms of the best of all."""
    borders, load_s = borders_of(first, [tokens for tokens, _ in chunks]), [seconds for _, seconds in chunks]
    choice = choose(borders, load_s, new_tokens, LAYERS, prefill)
    played = [time_to_first_token(borders, load_s, at, new_tokens, LAYERS, prefill) for at in range(len(borders))]
    assert choice.start in borders
    assert choice.chosen_s == pytest.approx(played[borders.index(choice.start)])
    assert choice.load_s == pytest.approx(played[0])
    assert choice.compute_s == pytest.approx(played[-1])
    assert choice.chosen_s <= min(played) / 0.97 + 0.0021


def test_a_free_link_loads_and_a_dead_one_computes() -> None:
    prefill = PrefillRate(1e-3, 1e-7)
    borders = borders_of(0, [256] * 8)
    assert choose(borders, [0.0] * 8, 64, LAYERS, prefill).start == 0
    assert choose(borders, [1e9] * 8, 64, LAYERS, prefill).start == borders[-1]


def test_two_equal_ends_meet_in_the_middle_in_half_the_time() -> None:
    """Cake's bound: with equal rates the time tends to a half of either."""
    choice = choose(borders_of(0, [16] * 200), [0.016] * 200, 1, LAYERS, PrefillRate(1e-3, 0.0))
    assert choice.start == pytest.approx(1600, rel=0.05)
    assert choice.chosen_s == pytest.approx(choice.load_s / 2, rel=0.05)


def test_what_hides_under_the_new_tokens_is_loaded() -> None:
    """It costs one layer's time at most, which is less than computing a chunk."""
    choice = choose(borders_of(0, [256] * 4), [0.02] * 4, 300, LAYERS, PrefillRate(1e-3, 0.0))
    assert choice.start == 0


def test_a_step_of_its_own_has_a_price() -> None:
    """Computing a part of a short history and loading the rest takes a step more than computing all of it at once."""
    borders, load_s = borders_of(0, [128, 128]), [0.128, 0.128]
    assert choose(borders, load_s, 64, LAYERS, PrefillRate(1e-3, 0.0)).start == 128
    assert choose(borders, load_s, 64, LAYERS, PrefillRate(1e-3, 0.0, step_s=0.3)).start in (0, 256)


def test_names() -> None:
    assert [name_of(start, 10) for start in (0, 5, 10)] == ["load", "both", "compute"]
