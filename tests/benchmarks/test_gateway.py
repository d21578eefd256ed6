"""The gateway's benchmark runs to its end, small, and every request of it is answered in full."""

from __future__ import annotations

from benchmarks.gateway.__main__ import measure, show
from benchmarks.gateway.load import quantile


def test_every_part_runs() -> None:
    figures = measure(seconds=0.5, rounds=1, streams=12, conversations=4, warm=4)
    added = figures["added_ttft"]
    assert added["gateway"]["requests"] > 0
    assert added["direct"]["p50_ms"] >= 10, "the stand-in's prefill"
    assert figures["open_streams"]["open_at_once"] == 12
    assert len(figures["idle_memory"]["resident_bytes"]) == 5
    show(figures)


def test_quantiles_go_by_the_nearest_rank() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile([1.0], 0.0) == 1.0
