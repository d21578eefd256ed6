"""The queue beside a plain list: arrival order, bounds, and illegal steps that change nothing."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.queue import TurnQueue
from protocol.errors import QueueFull


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


class QueueMachine(RuleBasedStateMachine):
    """Every stage as a set of arrival numbers; ids are given in an order of their own."""

    LIMIT = 4

    def __init__(self) -> None:
        super().__init__()
        self.queue = TurnQueue(self.LIMIT)
        self.arrivals: dict[bytes, int] = {}
        self.entered: set[bytes] = set()
        self.waiting: set[bytes] = set()
        self.running: set[bytes] = set()
        self.came = 0

    @property
    def known(self) -> set[bytes]:
        return self.entered | self.waiting | self.running

    @rule(number=st.integers(0, 12), places=st.integers(0, 3))
    def enter(self, number: int, places: int) -> None:
        turn_id = _id(number)
        if turn_id in self.known:
            with pytest.raises(ValueError):
                self.queue.enter(turn_id, places)
        elif len(self.known) >= self.LIMIT + places:
            with pytest.raises(QueueFull):
                self.queue.enter(turn_id, places)
        else:
            self.queue.enter(turn_id, places)
            self.entered.add(turn_id)
            self.arrivals[turn_id] = self.came
            self.came += 1

    @rule(number=st.integers(0, 12))
    def wait(self, number: int) -> None:
        turn_id = _id(number)
        if turn_id not in self.entered:
            with pytest.raises(ValueError):
                self.queue.wait(turn_id)
            return
        self.queue.wait(turn_id)
        self.entered.remove(turn_id)
        self.waiting.add(turn_id)

    @rule(places=st.integers(0, 3))
    def pop(self, places: int) -> None:
        popped = self.queue.pop(places)
        if len(self.running) >= places or not self.waiting:
            assert popped is None
            return
        assert popped == min(self.waiting, key=self.arrivals.__getitem__)
        self.waiting.remove(popped)
        self.running.add(popped)

    @rule(number=st.integers(0, 12))
    def release(self, number: int) -> None:
        turn_id = _id(number)
        if turn_id not in self.waiting | self.running:
            with pytest.raises(ValueError):
                self.queue.release(turn_id)
            return
        self.queue.release(turn_id)
        self.waiting.discard(turn_id)
        self.running.discard(turn_id)
        self.entered.add(turn_id)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        turn_id = data.draw(st.sampled_from(sorted(self.known)))
        self.queue.leave(turn_id)
        for stage in (self.entered, self.waiting, self.running):
            stage.discard(turn_id)
        with pytest.raises(ValueError):
            self.queue.leave(turn_id)

    @invariant()
    def agrees(self) -> None:
        assert self.queue.order == sorted(self.waiting, key=self.arrivals.__getitem__)
        assert self.queue.running == len(self.running)
        assert len(self.queue) == len(self.known)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_turn_that_lost_its_place_goes_before_later_ones() -> None:
    queue = TurnQueue(4)
    for number in (1, 2, 3):
        queue.enter(_id(number), 1)
        queue.wait(_id(number))
    assert queue.pop(1) == _id(1)
    queue.release(_id(1))
    queue.wait(_id(1))
    assert queue.order == [_id(1), _id(2), _id(3)]
