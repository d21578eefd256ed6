"""The queue beside a plain list: arrival order, bounds, and illegal steps that change nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.queue import TurnQueue
from gateway.queue_policies import POLICIES, Waiting, estimate_wait_s, fair_share, fcfs, shortest_prefill
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


def test_a_turn_that_ran_before_goes_first_whatever_the_policy() -> None:
    """And it keeps the rank of its first dispatch."""
    for policy in POLICIES.values():
        queue = TurnQueue(4, policy)
        queue.enter(_id(1), 1)
        queue.wait(_id(1), new_tokens=10**6)
        assert queue.pop(1) == _id(1)
        rank = queue.rank(_id(1))
        queue.release(_id(1))
        queue.enter(_id(2), 1)
        queue.wait(_id(2))
        queue.wait(_id(1), new_tokens=10**6)
        assert queue.order == [_id(1), _id(2)]
        assert (queue.pop(2), queue.pop(2)) == (_id(1), _id(2))
        assert queue.rank(_id(1)) == rank < queue.rank(_id(2))


def test_priority_goes_before_everything() -> None:
    """In the queue, and in the order in which inference gives memory, whoever was dispatched first."""
    for policy in POLICIES.values():
        queue = TurnQueue(4, policy)
        for number, priority in ((1, 0), (2, 5), (3, -5)):
            queue.enter(_id(number), 1, priority=priority)
            queue.wait(_id(number), new_tokens=1000 - priority)
        assert [queue.pop(9) for _ in range(3)] == [_id(3), _id(1), _id(2)]
        queue.enter(_id(4), 1, priority=-100)
        queue.wait(_id(4))
        queue.pop(9)
        assert sorted(map(_id, range(1, 5)), key=queue.rank) == [_id(4), _id(3), _id(1), _id(2)]


turns = st.lists(
    st.builds(
        Waiting,
        turn_id=st.binary(min_size=16, max_size=16),
        ticket=st.integers(0, 10**6),
        tenant=st.sampled_from([b"a", b"b", b"c"]),
        priority=st.integers(-2, 2),
        new_tokens=st.integers(0, 5000),
        is_first_try=st.booleans(),
    ),
    unique_by=(lambda turn: turn.turn_id, lambda turn: turn.ticket),
    max_size=12,
)


@given(turns, st.dictionaries(st.sampled_from([b"a", b"b", b"c"]), st.floats(0, 1e6)))
def test_every_policy_orders_all_turns_by_class(waiting: list[Waiting], served: dict[bytes, float]) -> None:
    for policy in POLICIES.values():
        ordered = policy(waiting, served)
        assert sorted(ordered, key=id) == sorted(waiting, key=id)
        classes = [(turn.priority, turn.is_first_try) for turn in ordered]
        assert classes == sorted(classes)
        assert policy(ordered[::-1], served) == ordered, "the order in which turns are handed over says nothing"


@given(turns)
def test_within_a_tenant_and_a_class_turns_come_as_they_arrived(waiting: list[Waiting]) -> None:
    for policy in (fcfs, fair_share):
        ordered = policy(waiting, {})
        for tenant in (b"a", b"b", b"c"):
            own = [turn for turn in ordered if turn.tenant == tenant]
            assert own == fcfs(own, {})


def test_a_long_prompt_is_overtaken_by_short_ones_but_not_for_ever() -> None:
    long = Waiting(_id(0), 0, new_tokens=640)
    short = [Waiting(_id(n), n, new_tokens=0) for n in range(1, 30)]
    ordered = shortest_prefill([long, *short], {})
    assert ordered.index(long) == 9  # 640 tokens at 64 an arrival; the tenth has waited less than they are worth
    assert ordered[:9] == short[:9]


class FairShareMachine(RuleBasedStateMachine):
    """Tenants that always have turns waiting get equal shares, within what one turn costs, whoever asks more."""

    TENANTS = (b"a", b"b", b"c")

    def __init__(self) -> None:
        super().__init__()
        self.queue = TurnQueue(10**6, fair_share)
        self.shares = dict.fromkeys(self.TENANTS, 0.0)
        self.turns: dict[bytes, Waiting] = {}
        self.came = 0
        for tenant in self.TENANTS:
            self.add(tenant, 10)

    @rule(tenant=st.sampled_from(TENANTS), tokens=st.integers(0, 400))
    def add(self, tenant: bytes, tokens: int) -> None:
        turn = Waiting(_id(self.came), self.came, tenant, new_tokens=tokens)
        self.came += 1
        self.turns[turn.turn_id] = turn
        self.queue.enter(turn.turn_id, 0, tenant)
        self.queue.wait(turn.turn_id, tokens)

    @rule(answer=st.integers(0, 100))
    def run(self, answer: int) -> None:
        turn_id = self.queue.pop(10**6)
        assert turn_id is not None
        turn = self.turns.pop(turn_id)
        least = min(self.shares.values())
        assert self.shares[turn.tenant] == least, "whoever was served least is next"
        self.queue.charge(turn_id, answer)
        self.shares[turn.tenant] += turn.cost + 2 * answer
        if not any(other.tenant == turn.tenant for other in self.turns.values()):
            self.add(turn.tenant, 10)
        self.queue.leave(turn_id)

    @invariant()
    def nobody_is_far_behind(self) -> None:
        most, least = max(self.shares.values()), min(self.shares.values())
        assert most - least <= 16 + 400 + 200


TestFairShare = FairShareMachine.TestCase
TestFairShare.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_tenant_that_was_away_has_saved_nothing_up() -> None:
    """It is lifted to the least of those who are here, and then takes turns with them."""
    queue = TurnQueue(100, fair_share)
    for number in range(20):
        queue.enter(_id(number), 0, b"busy")
        queue.wait(_id(number), 1000)
    for _ in range(10):
        done = queue.pop(100)
        assert done is not None
        queue.leave(done)
    for number in range(20, 26):
        queue.enter(_id(number), 0, b"back")
        queue.wait(_id(number), 1000)
    tenants = [b"back" if turn_id >= _id(20) else b"busy" for turn_id in queue.order[:8]]
    assert tenants == [b"busy", b"back"] * 4
    for turn_id in queue.order:
        queue.leave(turn_id)
    assert queue._served == {}, "nobody is remembered when all are gone"


def test_the_estimate_counts_who_is_ahead() -> None:
    assert estimate_wait_s(0, 1, 2.0) == 2.0
    assert estimate_wait_s(7, 4, 2.0) == 4.0
    assert estimate_wait_s(3, 0, 2.0) == 8.0  # inference is away: one place, at best
