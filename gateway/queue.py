"""The order of turns. Pure: no clock, no task, no socket; dispatch.py acts on what is decided here.

    enter            wait             pop
    ------> entered ------> waiting ------> running        leave, from anywhere: forgotten
               ^---------------+---------------+ release

A turn takes its ticket when it enters, so the order is that of arrival: a turn that was dispatched and lost its
inference process waits again before everyone who came later. An illegal step raises and changes nothing.
"""

from __future__ import annotations

import bisect
from enum import Enum, auto

from protocol.errors import QueueFull


class Stage(Enum):
    ENTERED = auto()  # has its ticket and something else to do first: journal its messages, or record an attempt
    WAITING = auto()
    RUNNING = auto()


class TurnQueue:
    """First come, first served, bounded. Turns are named by their ids."""

    def __init__(self, limit: int) -> None:
        """limit: turns that may be here beyond those for which inference has a place."""
        self._limit = limit
        self._next_ticket = 0
        self._stages: dict[bytes, Stage] = {}
        self._tickets: dict[bytes, int] = {}
        self._waiting: list[tuple[int, bytes]] = []  # by ticket

    def __len__(self) -> int:
        """Turns in any stage."""
        return len(self._stages)

    @property
    def running(self) -> int:
        return sum(stage is Stage.RUNNING for stage in self._stages.values())

    @property
    def order(self) -> list[bytes]:
        """The waiting turns, head first."""
        return [turn_id for _, turn_id in self._waiting]

    def ticket(self, turn_id: bytes) -> int:
        """The turn's place in the order, lowest first."""
        return self._tickets[turn_id]

    def enter(self, turn_id: bytes, places: int) -> None:
        """Take a ticket. `places`: how many turns inference runs at once, 0 while it is away.

        Raises QueueFull: as many turns as allowed are here. ValueError: this one is here already.
        """
        if turn_id in self._stages:
            raise ValueError("a turn enters once")
        if len(self._stages) >= self._limit + places:
            raise QueueFull(f"{len(self._waiting)} turns are waiting; try again later")
        self._stages[turn_id] = Stage.ENTERED
        self._tickets[turn_id] = self._next_ticket
        self._next_ticket += 1

    def wait(self, turn_id: bytes) -> None:
        """The turn may run from now on. Raises ValueError: not an entered turn."""
        self._expect(turn_id, Stage.ENTERED)
        self._stages[turn_id] = Stage.WAITING
        bisect.insort(self._waiting, (self._tickets[turn_id], turn_id))

    def pop(self, places: int) -> bytes | None:
        """The turn to dispatch now, which counts as running from here on; None: nobody waits, or no place is free."""
        if not self._waiting or self.running >= places:
            return None
        _, turn_id = self._waiting.pop(0)
        self._stages[turn_id] = Stage.RUNNING
        return turn_id

    def release(self, turn_id: bytes) -> None:
        """The turn gives up waiting, or its place at inference; it keeps its ticket. Raises ValueError: neither."""
        if self._expect(turn_id, Stage.WAITING, Stage.RUNNING) is Stage.WAITING:
            self._waiting.remove((self._tickets[turn_id], turn_id))
        self._stages[turn_id] = Stage.ENTERED

    def leave(self, turn_id: bytes) -> None:
        """The turn is over. Raises ValueError: it never entered."""
        if self._expect(turn_id, *Stage) is Stage.WAITING:
            self._waiting.remove((self._tickets[turn_id], turn_id))
        del self._stages[turn_id], self._tickets[turn_id]

    def _expect(self, turn_id: bytes, *stages: Stage) -> Stage:
        stage = self._stages.get(turn_id)
        if stage is None or stage not in stages:
            raise ValueError(f"turn is {stage.name.lower() if stage else 'unknown'}; this step is not for it")
        return stage
