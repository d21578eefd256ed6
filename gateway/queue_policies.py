"""In which order waiting turns are dispatched. Pure: values in, an order out.

Whatever the policy, a lower `priority` goes first, and within one priority a turn that ran before and lost its
inference process. `order` puts the rest into one of these orders:

    fcfs              first come, first served
    shortest-prefill  fewest new tokens first, so that small turns do not wait behind large prompts
    fair-share        the tenant that was served least, turn by turn
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, get_args

PolicyName = Literal["fcfs", "shortest-prefill", "fair-share"]

# shortest-prefill: each later arrival counts as so many tokens more, so that a turn with N tokens more than the others
# is overtaken by no more than N / 64 of them.
_AGING_TOKENS = 64
# fair-share: what a generated token costs beside one of a prompt, as in the paper.
ANSWER_WEIGHT = 2.0
_TURN_TOKENS = 16  # what a turn costs by itself: many empty ones are not free


@dataclass(frozen=True, slots=True)
class Waiting:
    """What policies know of a waiting turn."""

    turn_id: bytes
    ticket: int  # its place in the order of arrival
    tenant: bytes = b""
    priority: int = 0
    new_tokens: int = 0  # of its prompt that nothing is stored for, estimated
    is_first_try: bool = True

    @property
    def cost(self) -> float:
        """What the turn's prompt takes, for fair-share."""
        return float(_TURN_TOKENS + self.new_tokens)


Policy = Callable[[Sequence[Waiting], Mapping[bytes, float]], list[Waiting]]


def fcfs(waiting: Sequence[Waiting], served: Mapping[bytes, float]) -> list[Waiting]:
    return sorted(waiting, key=attrgetter("priority", "is_first_try", "ticket"))


def shortest_prefill(waiting: Sequence[Waiting], served: Mapping[bytes, float]) -> list[Waiting]:
    def key(turn: Waiting) -> tuple[int, bool, int, int]:
        aged = turn.new_tokens + _AGING_TOKENS * turn.ticket
        return turn.priority, turn.is_first_try, aged, turn.ticket

    return sorted(waiting, key=key)


def fair_share(waiting: Sequence[Waiting], served: Mapping[bytes, float]) -> list[Waiting]:
    """Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024): always the earliest
    turn of the tenant that was served least. served: weighted tokens by tenant.
    """
    ordered: list[Waiting] = []
    counters = dict(served)
    for _, group in itertools.groupby(fcfs(waiting, served), key=attrgetter("priority", "is_first_try")):
        turns: dict[bytes, list[Waiting]] = {}
        for turn in group:
            turns.setdefault(turn.tenant, []).append(turn)
        heads = [(counters.get(tenant, 0.0), own[0].ticket, tenant, 0) for tenant, own in turns.items()]
        heapq.heapify(heads)
        while heads:
            counter, _, tenant, at = heapq.heappop(heads)
            own = turns[tenant]
            ordered.append(own[at])
            counters[tenant] = counter + own[at].cost
            if at + 1 < len(own):
                heapq.heappush(heads, (counters[tenant], own[at + 1].ticket, tenant, at + 1))
    return ordered


POLICIES: dict[PolicyName, Policy] = {"fcfs": fcfs, "shortest-prefill": shortest_prefill, "fair-share": fair_share}
assert set(POLICIES) == set(get_args(PolicyName))


def estimate_wait_s(waiting: int, places: int, turn_s: float) -> float:
    """How long a turn that came now behind `waiting` others would wait, where each holds one of `places` for turn_s."""
    return (waiting + 1) * turn_s / max(1, places)
