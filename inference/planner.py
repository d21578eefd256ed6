"""What the next step computes. Pure: values in, a plan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class JobView:
    """A job as the planner sees it, in order of arrival."""

    job: int
    remaining_prompt: int  # tokens of the prompt still to compute; 0: the job decodes
    is_loading: bool  # layer 0 of its history is not there yet


@dataclass(frozen=True)
class StepPlan:
    """Which jobs decode one token, and how many prompt tokens of which job are computed beside them."""

    decode: tuple[int, ...] = ()
    prefill: int | None = None
    prefill_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        return not self.decode and self.prefill is None


def plan_step(jobs: Sequence[JobView], token_budget: int) -> StepPlan:
    """All decoding jobs go on; the first job with prompt left gets what remains of the budget.

    One prompt at a time, in order of arrival: later prompts would only make the first one's answer later. A job
    whose history has not begun to arrive lets the next one pass, unless there is nothing else to do: then
    it is planned, and its first layer waits for the loader.
    Long prompts go in pieces of the budget, so that decoding jobs wait for one piece at most.
    """
    decode = tuple(view.job for view in jobs if view.remaining_prompt == 0)
    waiting = [view for view in jobs if view.remaining_prompt > 0]
    ready = next((view for view in waiting if not view.is_loading), None)
    chosen = ready if ready is not None or decode or not waiting else waiting[0]
    if chosen is None:
        return StepPlan(decode)
    # Decoding jobs never starve prefill: at least half of the budget is for the prompt.
    room = max(token_budget - len(decode), token_budget // 2, 1)
    return StepPlan(decode, chosen.job, min(chosen.remaining_prompt, room))
