"""What a placement policy is: an order in which runs leave a tier.

A policy changes nothing but its own order, and asks nobody: time arrives as an argument. Which chunks may go at all,
what waiting turns need, and the windows of the paper's section 3.3 are the same for all policies (placement.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvdaemon.placement.runs import UNKNOWN_WORTH, Run, Worth

IsCurrent = Callable[[Run, int], bool]  # whether an entry, by its stamp, still says how things are


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What is known of a conversation when a turn of it has ended.

    next_speaker: "person" or "tool", whoever is expected to speak next; "" where nobody said. answer_tokens: 0 where
    unknown. partial_share: how full its last chunk is, 0 to 1. The rest is filled in by the placement: turns so far,
    chunks of context, of which so many came with this turn, and seconds between the turn before and this one.
    """

    next_speaker: str = ""
    answer_tokens: int = 0
    partial_share: float = 1.0
    answers: int = 1
    chunks: int = 1
    new_chunks: int = 1
    gap_s: float | None = None


class Rank(NamedTuple):
    """What a policy makes of a turn's end. profile: handed back when the conversation goes on."""

    profile: object = None
    worth: Worth = UNKNOWN_WORTH
    partial_worth: Worth = UNKNOWN_WORTH  # of the chunk that is not full


class Order(Protocol):
    """The runs of one tier that may lose their last chunk, worst first."""

    def push(self, run: Run, stamp: int, now_s: float) -> None:
        """The run is a candidate, with its present worth. An earlier entry of it is void by its stamp."""
        ...

    def worst(self, now_s: float) -> Run | None:
        """The run to take from next. Void entries are dropped on the way."""
        ...


class Policy(Protocol):
    """Makes orders, and learns from what happens."""

    looks_ahead: bool  # whether waiting turns count, as the paper's scheduler-aware placement has it

    def new_order(self, is_current: IsCurrent) -> Order: ...

    def turn_ended(self, end: TurnEnd, now_s: float) -> Rank:
        """A turn ended: what its conversation is worth from now on."""
        ...

    def turn_returned(self, profile: object, now_s: float, *, partial_hit: bool | None) -> None:
        """A conversation goes on whose last turn got this profile.

        partial_hit: whether the new turn asked for the chunk that was not full; None where there was none.
        """
        ...

    def turn_forked(self, profile: object, now_s: float) -> Rank:
        """Another turn shares the beginning of a conversation but not the rest, which has this profile."""
        ...
