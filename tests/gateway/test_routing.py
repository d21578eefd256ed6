"""Which worker a turn goes to, beside rules written another way: values in, a decision out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import Holders, Load, choose_worker

loads = st.lists(st.builds(Load, st.integers(0, 9), st.integers(0, 8), st.integers(0, 3)), max_size=5)


def _has_room(load: Load) -> bool:
    return load.running < load.places


@given(loads, st.none() | st.integers(0, 4))
def test_a_turn_goes_where_there_is_room_and_never_far_above_the_least_load(
    loads: list[Load], holder: int | None
) -> None:
    chosen = choose_worker(loads, holder)
    if chosen is None:
        assert not any(map(_has_room, loads))
        return
    assert _has_room(loads[chosen])
    free = [load for load in loads if _has_room(load)]
    assert loads[chosen].share <= min(load.share for load in free) * (1.5 if chosen == holder else 1)
    assert not loads[chosen].running or all(load.running for load in free), "nobody is idle while others share"


@given(loads.filter(lambda found: any(map(_has_room, found))), st.data())
def test_a_holder_with_room_and_no_more_load_keeps_its_turn(loads: list[Load], data: st.DataObject) -> None:
    free = [worker for worker, load in enumerate(loads) if _has_room(load)]
    least = min(loads[worker].share for worker in free)
    holder = data.draw(st.sampled_from([worker for worker in free if loads[worker].share == least]))
    assert choose_worker(loads, holder) == holder


def test_what_decides() -> None:
    idle, busy, full, away = Load(0, 8), Load(3, 8), Load(8, 8), Load(0, 0)
    assert choose_worker([busy, idle], None) == 1
    assert choose_worker([busy, Load(2, 8)], 0) == 0, "a little more load is worth its pages"
    assert choose_worker([Load(4, 8), Load(2, 8)], 0) == 1, "much more is not"
    assert choose_worker([Load(1, 8), idle], 0) == 1, "nor is any where another one is idle"
    assert choose_worker([full, busy], 0) == 1
    assert choose_worker([away, full], 0) is None
    assert choose_worker([away, busy], 0) == 1
    assert choose_worker([], None) is None
    assert choose_worker([Load(0, 8, served=5), Load(0, 8, served=4)], None) == 1, "new conversations spread"
    assert choose_worker([Load(1, 4), Load(1, 8)], None) == 1, "load is a share of the places"


def test_holders_are_remembered_up_to_a_bound_and_forgotten_with_their_worker() -> None:
    holders = Holders(limit=3)
    for turn in range(4):
        holders.note(b"%d" % turn, turn % 2, 0.0)
    assert [holders.find(b"%d" % turn) for turn in range(4)] == [None, 1, 0, 1]
    holders.note(b"1", 0, 0.0)  # the same answer again, elsewhere
    holders.note(b"4", 0, 0.0)
    assert [holders.find(b"%d" % turn) for turn in (1, 2, 3, 4)] == [0, None, 1, 0], "the one noted last stays"
    holders.forget(0)
    assert [holders.find(b"%d" % turn) for turn in (1, 3, 4)] == [None, 1, None]


def test_only_another_worker_waits_for_a_context_that_was_left_just_now() -> None:
    holders = Holders()
    holders.note(b"turn", 0, 10.0)
    assert holders.save_wait_s(b"turn", 0, 10.0) == 0.0, "it has it on its device"
    assert holders.save_wait_s(b"turn", 1, 10.25) == 0.75
    assert holders.save_wait_s(b"turn", 1, 11.5) == 0.0, "saved by now, or never"
    assert holders.save_wait_s(b"other", 1, 10.0) == 0.0
    holders.forget(0)
    assert holders.save_wait_s(b"turn", 1, 10.0) == 0.0, "nobody is saving it any more"
