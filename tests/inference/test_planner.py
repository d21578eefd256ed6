"""The step planner: every decoding job goes on, prompts share what remains of the budget, and every job ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference.planner import LEAST_PIECE_TOKENS, JobView, StepCosts, StepPlan, plan_step

HISTORIES = ("here", "arriving", "absent")


@st.composite
def views(draw: st.DrawFn) -> list[JobView]:
    jobs = []
    for i in range(draw(st.integers(0, 12))):
        remaining = draw(st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 2000)))
        history = draw(st.sampled_from(HISTORIES)) if remaining else "here"
        jobs.append(JobView(i, remaining, history, lacks_room=not remaining and draw(st.integers(0, 5)) == 0))
    return jobs


@given(views(), st.integers(13, 600), st.none() | st.integers(0, 200), st.booleans())
def test_a_plan_keeps_to_its_bounds(jobs: list[JobView], budget: int, beside: int | None, is_freeing: bool) -> None:
    plan = plan_step(jobs, budget, beside, is_freeing=is_freeing)
    by_id = {view.job: view for view in jobs}
    lacking = [view.job for view in jobs if view.lacks_room]
    assert plan.preempt == (jobs[-1].job if lacking and not is_freeing else None)  # the last in order, and no other
    # No decoding job is skipped but for want of memory.
    staying = [view.job for view in jobs if view.job != plan.preempt]
    assert plan.decode == tuple(i for i in staying if not by_id[i].remaining_prompt and i not in lacking)
    assert len(plan.decode) + plan.prefill_tokens <= budget
    if plan.decode and beside is not None:
        assert plan.prefill_tokens <= beside
    for job, tokens in plan.prefill:
        assert job in staying
        assert 0 < tokens <= by_id[job].remaining_prompt
        assert not plan.decode or by_id[job].history == "here"
    # In order: of all that could go, the first ones, each to its end before the next begins.
    waiting = {
        history: [i for i in staying if by_id[i].remaining_prompt and by_id[i].history == history]
        for history in HISTORIES
    }
    could_go = waiting["here"]
    if not could_go and not plan.decode:  # one alone is waited for
        could_go = waiting["arriving"][:1] or waiting["absent"][:1]
    chosen = [job for job, _ in plan.prefill]
    assert chosen == could_go[: len(chosen)]
    assert all(tokens == by_id[job].remaining_prompt for job, tokens in plan.prefill[:-1])
    # Something goes on whenever something can.
    room = budget - len(plan.decode) if beside is None or not plan.decode else min(beside, budget - len(plan.decode))
    assert bool(chosen) == bool(could_go and room > 0)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(13, 200),
    st.integers(LEAST_PIECE_TOKENS, 100),
)
def test_every_job_ends(specs: list[tuple[int, int, int]], budget: int, beside: int) -> None:
    """Prompt, answer and time of arrival are arbitrary; nobody waits for ever, and who decodes never misses a step."""
    waiting = sorted(range(len(specs)), key=lambda i: specs[i][2])
    prompt, answer = [spec[0] for spec in specs], [spec[1] for spec in specs]
    running: list[int] = []
    for step in range(10_000):
        while waiting and specs[waiting[0]][2] <= step:
            running.append(waiting.pop(0))
            running.sort()
        if not running and not waiting:
            return
        plan = plan_step([JobView(i, prompt[i]) for i in running], budget, beside)
        for job in running:
            if not prompt[job]:
                assert job in plan.decode
        for job in plan.decode:
            answer[job] -= 1
        for job, tokens in plan.prefill:
            prompt[job] -= tokens
            if not prompt[job]:
                answer[job] -= 1
        running = [job for job in running if prompt[job] or answer[job] > 0]
    raise AssertionError(f"still running: {running}")


def test_a_job_whose_history_is_not_here_lets_others_pass() -> None:
    jobs = [JobView(0, 10, "absent"), JobView(1, 20), JobView(2, 5)]
    assert plan_step(jobs, 512) == StepPlan((), ((1, 20), (2, 5)))


def test_waits_for_a_load_only_when_nothing_else_is_to_do() -> None:
    assert plan_step([JobView(0, 10, "absent")], 512) == StepPlan((), ((0, 10),))
    assert plan_step([JobView(0, 10, "absent"), JobView(1, 0)], 512) == StepPlan((1,))
    # Layer by layer under the loading, but not while others decode: they would wait for every layer of it.
    assert plan_step([JobView(0, 10, "arriving")], 512) == StepPlan((), ((0, 10),))
    assert plan_step(
        [JobView(0, 10, "absent"), JobView(1, 10, "arriving"), JobView(2, 10, "arriving")], 512
    ) == StepPlan((), ((1, 10),))
    assert plan_step([JobView(0, 10, "arriving"), JobView(1, 0)], 512) == StepPlan((1,))


def test_a_long_prompt_goes_in_pieces() -> None:
    assert plan_step([JobView(0, 1000), JobView(1, 0)], 512) == StepPlan((1,), ((0, 511),))
    assert plan_step([JobView(0, 1000), JobView(1, 0)], 512, 40) == StepPlan((1,), ((0, 40),))
    # What the piece leaves over is too little to begin with the next one.
    assert plan_step([JobView(0, 500), JobView(1, 1000)], 512) == StepPlan((), ((0, 500),))


def test_where_memory_lacks_the_last_in_order_goes() -> None:
    jobs = [JobView(0, 0, lacks_room=True), JobView(1, 0), JobView(2, 10)]
    assert plan_step(jobs, 512) == StepPlan((1,), (), preempt=2)
    assert plan_step(jobs, 512, is_freeing=True) == StepPlan((1,), ((2, 10),))
    assert plan_step(jobs[:1], 512) == StepPlan(preempt=0)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 300), st.floats(1e-4, 1.0)), max_size=60))
def test_prompts_never_starve_beside_decoding_jobs(steps: list[tuple[int, int, float]]) -> None:
    """Whatever steps took: none for the prompts is followed by some, as soon as the decoding jobs were seen alone."""
    costs = StepCosts()
    for decodes, prefill_tokens, seconds in steps:
        costs.observe(decodes, prefill_tokens, seconds)
    for decodes in (1, 8, 32):
        if costs.prefill_beside(decodes, decodes + 1, 2.0) == 0:
            costs.observe(decodes, 0, 0.01)
        assert costs.prefill_beside(decodes, decodes + 1, 2.0) >= LEAST_PIECE_TOKENS


def test_the_piece_is_what_makes_a_step_as_long_as_allowed() -> None:
    """A machine on which 8 jobs decode in 20 ms and a prompt's token takes half a millisecond."""
    costs = StepCosts()
    for _ in range(30):
        costs.observe(8, 0, 0.020)
        costs.observe(8, 50, 0.020 + 50 * 0.0005)
    assert costs.prefill_beside(8, 8, 2.0) in (39, 40)
    assert costs.prefill_beside(8, 8, 3.0) in (79, 80)
    assert costs.prefill_beside(4, 8, 2.0) in (39, 40)  # as with the nearest number of jobs
    assert costs.prefill_beside(8, 12, 2.0) in (47, 48)  # four more take as long as four tokens of a prompt
    for _ in range(30):
        costs.observe(16, 0, 0.040)
    assert costs.prefill_beside(12, 12, 2.0) in (59, 60)  # between the two
    # After many steps with prompts in them, one shows what the jobs take alone by now.
    seen = []
    for _ in range(40):
        seen.append(costs.prefill_beside(8, 8, 2.0))
        costs.observe(8, seen[-1], 0.020 + seen[-1] * 0.0005)
    assert seen.count(0) == 1


def test_a_step_that_something_held_up_is_soon_forgotten() -> None:
    costs = StepCosts()
    for _ in range(30):
        costs.observe(8, 0, 0.020)
        costs.observe(8, 40, 0.020 + 40 * 0.0005)
    costs.observe(8, 0, 1.0)
    costs.observe(8, 40, 1.0)
    assert costs.prefill_beside(8, 8, 2.0) >= 20
    for _ in range(3):
        costs.observe(8, 40, 0.020 + 40 * 0.0005)
    assert 35 <= costs.prefill_beside(8, 8, 2.0) <= 60
    for _ in range(30):  # and a machine that has become slower is believed
        costs.observe(8, 0, 0.060)
        costs.observe(8, 40, 0.060 + 40 * 0.0030)
    assert costs.prefill_beside(8, 8, 2.0) in range(19, 22)


def test_the_first_answers_of_many_do_not_hold_up_the_rest() -> None:
    """While one of 16 decodes, the others' prompts get what a step takes when all of them decode."""
    costs = StepCosts()
    for _ in range(30):
        costs.observe(1, 0, 0.010)
        costs.observe(16, 0, 0.040)
        costs.observe(16, 80, 0.040 + 80 * 0.0005)
    assert costs.prefill_beside(1, 2, 2.0) in range(20, 30)
    assert costs.prefill_beside(1, 16, 2.0) in range(139, 141)  # 10 + 70 ms
    assert costs.prefill_beside(15, 16, 2.0) in range(80, 90)
