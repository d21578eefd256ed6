"""The step planner: every decoding job goes on, one prompt at a time, within the budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference.planner import JobView, StepPlan, plan_step

VIEWS = st.lists(st.tuples(st.integers(0, 2000), st.booleans()), max_size=12).map(
    lambda rows: [JobView(i, left, loading and left > 0) for i, (left, loading) in enumerate(rows)]
)


@given(VIEWS, st.integers(1, 600))
def test_plan_is_work_conserving_and_bounded(views: list[JobView], budget: int) -> None:
    plan = plan_step(views, budget)
    assert plan.decode == tuple(v.job for v in views if v.remaining_prompt == 0)
    assert plan.is_empty == (not views or (plan.prefill is None and not plan.decode))
    if plan.prefill is not None:
        chosen = views[plan.prefill]
        assert 0 < plan.prefill_tokens <= chosen.remaining_prompt
        assert plan.prefill_tokens <= max(budget - len(plan.decode), budget // 2, 1)
    if any(v.remaining_prompt and not v.is_loading for v in views):
        assert plan.prefill is not None
    if views:
        assert not plan.is_empty


def test_order_of_arrival_and_loading_jobs_let_others_pass() -> None:
    views = [JobView(0, 10, True), JobView(1, 20, False), JobView(2, 5, False)]
    assert plan_step(views, 512) == StepPlan((), 1, 20)


def test_waits_for_a_load_only_when_nothing_else_is_to_do() -> None:
    assert plan_step([JobView(0, 10, True)], 512) == StepPlan((), 0, 10)
    assert plan_step([JobView(0, 10, True), JobView(1, 0, False)], 512) == StepPlan((1,), None, 0)


def test_long_prompt_goes_in_pieces() -> None:
    assert plan_step([JobView(0, 1000, False), JobView(1, 0, False)], 512) == StepPlan((1,), 0, 511)
