"""What the page says, without a browser: branches, markdown, the estimate of what the cache saved."""

from __future__ import annotations

from gateway.journal.tables import Turn
from gateway.page import branches, figures
from gateway.page.machine import Picture, Waiting
from gateway.page.markdown import to_html
from gateway.turns import Account
from protocol.messages import StoreStatus, TierStatus, TurnUsage, WorkingKv


def tree() -> list[Turn]:
    """a - b - c, with b' beside b and d behind it, oldest first."""
    born = [(b"a", None), (b"b", b"a"), (b"c", b"b"), (b"B", b"a"), (b"d", b"B")]
    return [Turn(id=turn_id, parent_id=parent_id) for turn_id, parent_id in born]


def test_walks_of_the_tree() -> None:
    turns = tree()
    a, b, c, other, d = turns
    assert branches.newest_end(turns) is d
    assert branches.newest_end(turns, b) is c
    assert branches.path_to(turns, d) == [a, other, d]
    assert branches.siblings(turns, b) == [b, other]
    assert branches.newest_end([]) is None
    assert branches.path_to([], None) == []


def test_markup_of_an_answer_is_shown_not_done() -> None:
    """Neither tags, nor images, nor links that run something."""
    html = to_html("<script>1</script> **bold** ![a](http://x/y.png) [b](javascript:alert(1)) [c](https://x)")
    assert "<script" not in html
    assert "<img" not in html
    assert 'href="javascript' not in html
    assert "<strong>bold</strong>" in html
    assert 'href="https://x"' in html


def test_the_estimate_is_marked_and_left_out_where_there_is_none() -> None:
    usage = TurnUsage(100, 5, dram=80, computed=20, recompute_s=0.5)
    assert figures.saved_s(usage, 0.1) == 0.4
    assert "without cache ≈ 600 ms (estimate)" in figures.turn(1, usage, 0.2, 0.1, 100)
    for other in (TurnUsage(100, 5, dram=80, computed=20), TurnUsage(100, 5, computed=100, recompute_s=0.5)):
        assert "without" not in figures.turn(1, other, 0.2, 0.1, 100)
    dearer = Account(b"", 0.0, TurnUsage(10, 1, ssd=9, computed=1, recompute_s=0.1), 0.3, 0.3)
    assert "≈ −200 ms" in figures.over_time([dearer])


def test_misses_and_others_are_told_and_escaped() -> None:
    usage = TurnUsage(9, 1, computed=4, missed={"evicted": 5}, explained={"evicted": "from <ssd> at 9"})
    assert "5 missed: from &lt;ssd&gt; at 9" in figures.turn(1, usage, 0.1, 0.1, 9)
    tier = TierStatus(100, 50, 1)
    store = StoreStatus("ok", "", tier, tier, 0, 0, 0, prefetch_window=1, eviction_window=2)
    picture = Picture(store, 1, 3, tuple(Waiting(tenant, 10, 0, 5) for tenant in (b"me", b"you", b"you")))
    html = figures.queue(picture, b"me")
    assert [html.count(text) for text in ('"waiting fetch"', '"waiting keep"', '"waiting "')] == [1, 1, 1]
    assert html.count("another’s") == 2


def test_each_worker_tells_how_full_its_device_is() -> None:
    """What finished turns have left there apart from the rest; with or without a store."""
    kv = WorkingKv(capacity_bytes=4096, used_bytes=3072, retained_bytes=1024)
    html = figures.tiers(Picture(devices={"inference": kv}))
    assert "HBM</span><span>3.0 KiB of 4.0 KiB · 1.0 KiB retained" in html
    assert '"src-hbm" style="width:50.00%"' in html
    assert '"src-hbm retained" style="width:25.00%"' in html
    assert "75% full" in html
    assert "does not answer" in html
    two = figures.tiers(Picture(devices={"inference-1": kv, "inference-2": kv}))
    assert [name in two for name in ("HBM of inference-1", "HBM of inference-2")] == [True, True]
