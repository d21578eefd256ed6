"""The order of turns. Pure: no clock, no task, no socket; dispatch.py acts on what is decided here.

    enter            wait             pop
    ------> entered ------> waiting ------> running        leave, from anywhere: forgotten
               ^---------------+---------------+ release

A turn takes its ticket, the order of arrival, when it enters; a policy (queue_policies.py) orders those that wait. A
turn that was dispatched and lost its inference process waits again before all of its priority. An illegal step raises
and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from gateway.queue_policies import ANSWER_WEIGHT, Policy, Waiting, fcfs
from protocol.errors import QueueFull

LOWEST_PRIORITY = 100  # to -LOWEST_PRIORITY, which goes first
_RANKS = 1 << 40  # for each priority


class Stage(Enum):
    ENTERED = auto()  # has its ticket and something else to do first: journal its messages, or record an attempt
    WAITING = auto()
    RUNNING = auto()


@dataclass
class _Entry:
    turn: Waiting
    stage: Stage = Stage.ENTERED
    rank: int | None = None


class TurnQueue:
    """Ordered by a policy, bounded. Turns are named by their ids."""

    def __init__(self, limit: int, policy: Policy = fcfs) -> None:
        """limit: turns that may be here beyond those for which inference has a place."""
        self._limit = limit
        self._policy = policy
        self._next_ticket = 0
        self._next_rank = 0
        self._entries: dict[bytes, _Entry] = {}
        self._running = 0
        self._waiting: list[Waiting] = []  # in the policy's order, unless it is stale
        self._is_stale = False
        # Weighted tokens by tenant, for fair-share. Whoever comes is lifted to the least of those that are here, so
        # that nobody saves up service; a tenant that is away and has no more than that is forgotten.
        self._served: dict[bytes, float] = {}
        self._turns_of: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Turns in any stage."""
        return len(self._entries)

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def order(self) -> list[bytes]:
        """The waiting turns, head first."""
        return [turn.turn_id for turn in self._ordered()]

    def rank(self, turn_id: bytes) -> int:
        """The place of a turn that was dispatched among all that ever were, lowest first: by priority, then by when
        it was dispatched first.
        """
        rank = self._entries[turn_id].rank
        assert rank is not None
        return rank

    def enter(self, turn_id: bytes, places: int, tenant: bytes = b"", priority: int = 0) -> None:
        """Take a ticket. `places`: how many turns inference runs at once, 0 while it is away.

        Raises QueueFull: as many turns as allowed are here. ValueError: this one is here already.
        """
        if turn_id in self._entries:
            raise ValueError("a turn enters once")
        if len(self._entries) >= self._limit + places:
            raise QueueFull(f"{len(self._waiting)} turns are waiting; try again later")
        self._entries[turn_id] = _Entry(Waiting(turn_id, self._next_ticket, tenant, priority))
        self._next_ticket += 1
        if not self._turns_of.get(tenant):
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._least_served())
        self._turns_of[tenant] = self._turns_of.get(tenant, 0) + 1

    def wait(self, turn_id: bytes, new_tokens: int = 0) -> None:
        """The turn may run from now on. Raises ValueError: not an entered turn."""
        entry = self._expect(turn_id, Stage.ENTERED)
        entry.stage = Stage.WAITING
        entry.turn = replace(entry.turn, new_tokens=new_tokens, is_first_try=entry.rank is None)
        self._waiting.append(entry.turn)
        self._is_stale = True

    def pop(self, places: int) -> bytes | None:
        """The turn to dispatch now, which counts as running from here on; None: nobody waits, or no place is free."""
        if not self._waiting or self._running >= places:
            return None
        turn = self._ordered().pop(0)
        entry = self._entries[turn.turn_id]
        entry.stage = Stage.RUNNING
        self._running += 1
        if entry.rank is None:
            entry.rank = (turn.priority + LOWEST_PRIORITY) * _RANKS + self._next_rank
            self._next_rank += 1
            self._served[turn.tenant] += turn.cost
        return turn.turn_id

    def charge(self, turn_id: bytes, answer_tokens: int) -> None:
        """The turn got so many tokens."""
        self._served[self._entries[turn_id].turn.tenant] += ANSWER_WEIGHT * answer_tokens
        self._is_stale = True

    def release(self, turn_id: bytes) -> None:
        """The turn gives up waiting, or its place at inference; it keeps its ticket. Raises ValueError: neither."""
        entry = self._expect(turn_id, Stage.WAITING, Stage.RUNNING)
        self._take_out(entry)
        entry.stage = Stage.ENTERED

    def leave(self, turn_id: bytes) -> None:
        """The turn is over. Raises ValueError: it never entered."""
        entry = self._expect(turn_id, *Stage)
        self._take_out(entry)
        del self._entries[turn_id]
        tenant = entry.turn.tenant
        self._turns_of[tenant] -= 1
        if not self._turns_of[tenant]:
            del self._turns_of[tenant]
            least = self._least_served()
            for absent in [t for t, served in self._served.items() if t not in self._turns_of and served <= least]:
                del self._served[absent]

    def _least_served(self) -> float:
        """Of the tenants that are here; where nobody is, all that was served is forgiven."""
        if not self._turns_of:
            return max(self._served.values(), default=0.0)
        return min(self._served[tenant] for tenant in self._turns_of)

    def _ordered(self) -> list[Waiting]:
        if self._is_stale:
            self._waiting = self._policy(self._waiting, self._served)
            self._is_stale = False
        return self._waiting

    def _take_out(self, entry: _Entry) -> None:
        if entry.stage is Stage.WAITING:
            self._waiting.remove(entry.turn)
            self._is_stale = True
        elif entry.stage is Stage.RUNNING:
            self._running -= 1

    def _expect(self, turn_id: bytes, *stages: Stage) -> _Entry:
        entry = self._entries.get(turn_id)
        if entry is None or entry.stage not in stages:
            raise ValueError(f"turn is {entry.stage.name.lower() if entry else 'unknown'}; this step is not for it")
        return entry
