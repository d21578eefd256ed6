"""What the next step computes. Pure: values in, a plan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# The least that a prompt gets beside decoding jobs, so that these never starve it; smaller pieces cost nearly as much.
LEAST_PIECE_TOKENS = 16


@dataclass(frozen=True)
class JobView:
    """A job as the planner sees it. Jobs come in the gateway's order."""

    job: int
    remaining_prompt: int  # tokens of the prompt still to compute; 0: the job decodes
    # here: a step need not wait for it; arriving: from layer 0 on; absent: not even that
    history: Literal["here", "arriving", "absent"] = "here"
    lacks_room: bool = False  # there is no memory for its next token


@dataclass(frozen=True)
class StepPlan:
    """Which jobs decode one token, how many prompt tokens of which jobs are computed beside them, and who gives way."""

    decode: tuple[int, ...] = ()
    prefill: tuple[tuple[int, int], ...] = ()  # job, tokens
    preempt: int | None = None

    @property
    def prefill_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prefill)


def plan_step(
    jobs: Sequence[JobView], token_budget: int, beside_decodes: int | None = None, *, is_freeing: bool = False
) -> StepPlan:
    """All decoding jobs go on; what remains of the budget goes to prompts, in order.

    token_budget: tokens in a step; more than there are jobs. beside_decodes: prompt tokens in a step in which jobs
    decode, so that it does not take much longer than without them (StepCosts); None: as many as the budget holds.
    Long prompts go in pieces of that, short ones share a step.

    A prompt whose history is still arriving lets the next one pass: nobody waits for another's load, and it loses
    nothing, for it is loaded meanwhile. If there is nothing else to do, it is computed alone, layer by layer.

    Where memory lacks, the last job in order is preempted, unless memory is on its way (is_freeing).
    """
    preempt = None
    if any(view.lacks_room for view in jobs) and not is_freeing:
        preempt = jobs[-1].job
    staying = [view for view in jobs if view.job != preempt]
    decode = tuple(view.job for view in staying if view.remaining_prompt == 0 and not view.lacks_room)
    waiting = [view for view in staying if view.remaining_prompt > 0]
    room = token_budget - len(decode)
    if decode and beside_decodes is not None:
        room = min(room, beside_decodes)
    ready = [view for view in waiting if view.history == "here"]
    if not ready and not decode:
        ready = [view for view in waiting if view.history == "arriving"][:1] or waiting[:1]
    prefill = _share(ready, room)
    return StepPlan(decode, prefill, preempt)


def _share(waiting: Sequence[JobView], room: int) -> tuple[tuple[int, int], ...]:
    """Pieces of prompts in order, the last one cut to fit."""
    pieces: list[tuple[int, int]] = []
    for view in waiting:
        piece = min(view.remaining_prompt, room)
        if piece == 0 or (pieces and piece < min(view.remaining_prompt, LEAST_PIECE_TOKENS)):
            break  # nothing is left, or a splinter that would cost more than it brings
        pieces.append((view.job, piece))
        room -= piece
    return tuple(pieces)


class StepCosts:
    """How long steps take, learned from those that were taken. No clock: whoever takes steps tells."""

    _WEIGHT = 0.2  # of the newest step
    # Of the newest step's prompt tokens: what they cost changes with the size of the piece and what else runs, and
    # pieces that are too large for a while are what clients notice.
    _TOKEN_WEIGHT = 0.5
    # Of what was known a sample counts for no more: a step that something else held up would be remembered for long,
    # while a machine that has become slower says so again and again.
    _MOST = 2.0
    _MIXED_STEPS = 32  # then one without prompts, that what the decoding jobs take alone stays known

    def __init__(self) -> None:
        self._decode_s: dict[int, float] = {}  # of steps without prompts, by how many jobs decode
        self._prefill_token_s: float | None = None
        self._mixed_steps = 0  # since the last one without prompts

    def observe(self, decodes: int, prefill_tokens: int, seconds: float) -> None:
        """A step of so many decoding jobs and prompt tokens took `seconds`."""
        if prefill_tokens == 0:
            self._decode_s[decodes] = self._mix(self._decode_s.get(decodes), seconds, self._WEIGHT)
            self._mixed_steps = 0
            return
        if decodes:
            self._mixed_steps += 1
        alone_s = self._decode_only_s(decodes)
        if alone_s is not None:
            token_s = max(0.0, seconds - alone_s) / prefill_tokens
            self._prefill_token_s = self._mix(self._prefill_token_s, token_s, self._TOKEN_WEIGHT)

    def prefill_beside(self, decodes: int, jobs: int, stretch: float) -> int:
        """Prompt tokens for a step in which `decodes` of the `jobs` that are there decode.

        With them it takes `stretch` times as long as when all of these decode: no token comes much later than it will
        then, and the first of many that begin together do not hold up the prompts of the rest.
        0: this step is to show what the decoding jobs take alone. Otherwise never so few that prompts starve.
        """
        alone_s, all_s = self._decode_only_s(decodes), self._decode_only_s(jobs)
        if alone_s is None or all_s is None or self._mixed_steps >= self._MIXED_STEPS:
            return 0
        if self._prefill_token_s is None:
            return LEAST_PIECE_TOKENS
        tokens = (stretch * max(all_s, alone_s) - alone_s) / max(self._prefill_token_s, 1e-9)
        return max(int(tokens), LEAST_PIECE_TOKENS)

    def _decode_only_s(self, decodes: int) -> float | None:
        """As measured, between two numbers of jobs by interpolation; None: not measured yet."""
        if decodes == 0:
            return 0.0
        below = max((known for known in self._decode_s if known <= decodes), default=None)
        above = min((known for known in self._decode_s if known >= decodes), default=None)
        if below is None or below == above:
            return None if above is None else self._decode_s[above]
        if above is None:  # another job takes as long as another prompt's token, or longer
            return self._decode_s[below] + (decodes - below) * (self._prefill_token_s or 0.0)
        low_s, high_s = self._decode_s[below], self._decode_s[above]
        return low_s + (high_s - low_s) * (decodes - below) / (above - below)

    def _mix(self, known: float | None, new: float, weight: float) -> float:
        return known + weight * (min(new, self._MOST * known) - known) if known else new
