"""The read buffer: the paper's formula, and who gets how much of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference.read_buffer import Waiting, layers_ahead, read_buffer_bytes

WAITING = st.lists(st.builds(Waiting, st.integers(1, 40), st.integers(1, 1000), st.integers(0, 40_000)), max_size=8)


@given(st.integers(1, 10**9), st.floats(1e-3, 10), st.floats(0, 10), st.integers(1, 80))
def test_with_so_much_loaded_computing_never_waits(total: int, load_s: float, compute_s: float, layers: int) -> None:
    """Played: from S_buf on the link goes on at its rate and the computation takes its time; the bytes are always ahead
    of it. And it is no more than needed: the last byte comes when the computation ends."""
    buffer = read_buffer_bytes(total, load_s, compute_s)
    assert 0 <= buffer <= total
    for layer in range(layers + 1):
        part = layer / layers
        loaded = buffer + total * part * compute_s / load_s
        assert loaded >= total * part * (1 - 1e-9) - 1
    if buffer:
        assert buffer + total * compute_s / load_s <= total * (1 + 1e-9)


def test_the_papers_own_figures() -> None:
    """LLaMA-2-13B with 1K history and compute : load = 0.39 : 0.61 need 14.4 of 40 layers (its PL-B15)."""
    assert round(read_buffer_bytes(40_000, 0.61, 0.39) / 1000, 1) == 14.4


@given(WAITING, st.integers(0, 100_000))
def test_a_buffer_is_never_overfilled(waiting: list[Waiting], capacity: int) -> None:
    allowed = layers_ahead(waiting, capacity)
    assert len(allowed) == len(waiting)
    assert all(0 <= layers <= history.layers for layers, history in zip(allowed, waiting, strict=True))
    assert sum(layers * history.layer_bytes for layers, history in zip(allowed, waiting, strict=True)) <= capacity


@given(WAITING)
def test_without_a_size_each_gets_what_it_wants(waiting: list[Waiting]) -> None:
    for layers, history in zip(layers_ahead(waiting, None), waiting, strict=True):
        assert layers == history.layers or layers * history.layer_bytes >= history.wanted_bytes
        assert layers >= 1


def test_a_buffer_of_nothing_loads_nothing_ahead() -> None:
    assert layers_ahead([Waiting(12, 100, 1200), Waiting(12, 100, 0)], 0) == [0, 0]
