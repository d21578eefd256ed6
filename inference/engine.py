"""The engine: one thread that owns the model and runs step after step.

Between steps it takes in new jobs and cancellations; in a step it computes what the planner says. What a job
produces goes to its listener, which hands it to the event loop. A job whose memory somebody earlier in order needs is
preempted: it leaves the engine, and its turn sees to it that what was computed is saved and that it comes back.
"""

from __future__ import annotations

import bisect
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch

from inference.decoupled import DecoupledModel, Segment
from inference.logprobs import Logprobs
from inference.planner import JobView, StepCosts, plan_step
from inference.preload import LoadFailed, LoadTask
from inference.rates import Rates, pairs
from inference.sampling import Sampler
from inference.save import Saver, SaveTask
from inference.text import AnswerText
from inference.worker import Worker
from inference.working_kv import Kv, OutOfKv
from monitoring.logs import get_logger
from protocol.errors import CallerError
from protocol.ids import TokenArray
from protocol.lineage import Truncation, kept_ranges, place_of
from protocol.messages import SampledLogprobs

log = get_logger(__name__)

_STALLED_S = 0.02  # how soon jobs that lack memory look again; they are also told
# Memory that is on its way, from a save or from a preempted job, is waited for so long before a job is preempted.
_PATIENCE_S = 0.25
_PREEMPTED_PATIENCE_S = 6.0  # longer than such a save may take
_LOOK_AGAIN_S = 0.002  # at jobs that all wait for their history; the loader says so when a layer is there


class Listener(Protocol):
    """What a job tells. Called from the engine's thread; must not block."""

    def on_token(self, job: Job, token: int, text: str, logprobs: SampledLogprobs | None) -> None: ...

    def on_done(self, job: Job) -> None: ...

    def on_preempted(self, job: Job) -> None: ...

    def on_context_full(self, job: Job) -> None: ...

    def on_load_failed(self, job: Job, failure: LoadFailed) -> None: ...

    def on_failed(self, job: Job, error: Exception) -> None: ...


@dataclass(eq=False)
class Job:
    """One turn's answer in the making. It enters with working KV, and may leave and enter again: its state stays.

    After `submit` the engine's thread owns it until it tells the listener that it ended, was preempted, or has to do
    without its history.
    """

    prompt: TokenArray
    resumed: list[int]  # tokens sampled by an earlier attempt at this turn
    sampler: Sampler  # it and `answer` know the resumed tokens
    answer: AnswerText
    max_tokens: int
    eos_ids: Collection[int]
    listener: Listener
    order: int = 0  # the gateway's; the lowest goes first
    window: int = 1 << 30  # tokens; a context as long as that leaves before its next token
    logprobs: Logprobs | None = None  # where they are wanted
    is_cancelled: bool = False
    load: LoadTask | None = None
    save: SaveTask | None = None
    # the outcome
    sampled: list[int] = field(default_factory=list)
    finish_reason: str = ""
    admitted_s: float = field(default_factory=time.monotonic)
    first_token_s: float = 0.0
    done_s: float = 0.0
    context: torch.Tensor = field(init=False)  # what is computed before the next new token, int64
    truncations: tuple[Truncation, ...] = ()  # what of prompt and sampled is not in it
    _kv: Kv | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.sampled = list(self.resumed)

    def enter(
        self,
        kv: Kv,
        load: LoadTask | None = None,
        save: SaveTask | None = None,
        truncations: tuple[Truncation, ...] = (),
    ) -> None:
        """Go on from here with `kv`, which is begun; its length is the history. truncations: what is not in it."""
        self._kv, self.load, self.save, self.truncations = kv, load, save, truncations
        self.context = torch.from_numpy(self.context_ids(truncations).astype("int64"))

    def leave(self) -> None:
        """Let go of the working KV."""
        self._kv, self.load, self.save = None, None, None

    @property
    def token_ids(self) -> TokenArray:
        """The whole transcript so far, what was dropped of it included."""
        return np.concatenate([self.prompt, np.asarray(self.sampled, dtype=np.uint32)])

    def context_ids(self, truncations: Sequence[Truncation]) -> TokenArray:
        """What is left of it."""
        token_ids = self.token_ids
        return np.concatenate([token_ids[start:end] for start, end in kept_ranges(len(token_ids), truncations)])

    @property
    def computed_tokens(self) -> int:
        """Tokens of the transcript up to the end of the working KV."""
        return place_of(self.kv.length, len(self.prompt) + len(self.sampled), self.truncations)

    @property
    def kv(self) -> Kv:
        assert self._kv is not None, "the job has not entered"
        return self._kv

    @property
    def remaining_prompt(self) -> int:
        """Tokens to compute next: up to the loaded part of the history, or behind it."""
        load, length = self.load, self.kv.length
        if load is not None and length <= load.start < load.end:
            return load.start - length or len(self.context) - load.end
        return max(0, len(self.context) - length)

    @property
    def is_whole(self) -> bool:
        """All before kv.length is there, in every layer, and nothing of it is still to come."""
        load = self.load
        if load is None or load.start == load.end:
            return load is None or self.kv.length >= load.end
        return self.kv.length >= load.end and load.ready_layers == self.kv.shape.layers

    @property
    def is_at_load(self) -> bool:
        """All before the loaded part of the history is computed, and nothing behind it."""
        return self.load is not None and self.kv.length == self.load.start < self.load.end


@dataclass
class EngineStats:
    """Read by monitoring; written by the engine's thread."""

    steps: int = 0
    prefill_s: float = 0.0  # of steps with prefill in them
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0


class Engine:
    """`submit` and `cancel` may be called from any thread; everything else is the engine's own."""

    def __init__(
        self,
        model: DecoupledModel,
        saver: Saver | None,
        token_budget: int,
        stretch: float = 2.5,
        *,
        rates: Rates | None = None,
        reclaim: Callable[[], bool] = lambda: False,
        on_relief: Callable[[], None] = lambda: None,
        observe: Callable[[int, int, float], None] = lambda decodes, prefill_tokens, seconds: None,
    ) -> None:
        """stretch: a step may take so many times as long with prompts as without them, while jobs decode.

        rates: where the cost of prefill is noted.
        Called from the engine's thread: reclaim, to let go of a retained context (False: there is none); on_relief,
        when is_short ends; observe, with (decoding jobs, prompt tokens, seconds) of every step.
        """
        self.stats = EngineStats()
        self.is_short = False  # running jobs lack memory: none should be given to new ones
        self._model = model
        self._saver = saver
        self._token_budget = token_budget
        self._stretch = stretch
        self._reclaim = reclaim
        self._on_relief = on_relief
        self._observe = observe
        self._costs = StepCosts()
        self._rates = rates if rates is not None else Rates()
        self._rates.prefill = replace(self._rates.prefill, step_tokens=token_budget)
        self._new: deque[Job] = deque()
        self._jobs: list[Job] = []  # in the gateway's order
        self._leaving: list[weakref.ref[Kv]] = []  # of preempted jobs, until the memory is free
        self._patient_until_s = 0.0
        self._worker = Worker("engine", self._work, torch.get_num_threads())

    @property
    def running(self) -> int:
        return len(self._jobs) + len(self._new)

    def start(self) -> None:
        self._worker.start()

    def stop(self) -> None:
        """Stop after the current step; jobs still in the engine end without a word."""
        self._worker.stop(30.0)

    def submit(self, job: Job) -> None:
        self._new.append(job)
        self._worker.notify()

    def cancel(self, job: Job) -> None:
        """The job ends before the next step, silently."""
        job.is_cancelled = True
        if job.load is not None:
            job.load.cancel()
        self.poke()

    def poke(self) -> None:
        """Something that a waiting step looks at has changed."""
        self._worker.notify()

    # -- the thread ---------------------------------------------------------------------------------------

    def _work(self) -> float | None:
        while self._new:
            bisect.insort(self._jobs, self._new.popleft(), key=lambda job: job.order)
        for job in [job for job in self._jobs if job.is_cancelled]:
            self._remove(job)
            self._abandon_save(job)
        pause_s = self._step() if self._jobs else None
        if self._jobs:
            return pause_s
        self._note_shortage(False)
        return None

    def _choose(self) -> None:
        """Load or compute, for the job whose prompt is the next to compute."""
        job = next((job for job in self._jobs if job.remaining_prompt), None)
        if job is not None and job.load is not None:
            job.load.make_due()
            if job.is_at_load:
                job.load.choose(self._rates)

    def _history(self, job: Job, tokens: int) -> Literal["here", "arriving", "absent"]:
        """How much of what the next tokens attend to is there. Here: so much that a step of `tokens` would not wait."""
        load = job.load
        if load is None or job.kv.length < load.start or load.has_enough(self._rates, tokens):
            return "here"
        return "arriving" if load.has_begun() else "absent"

    def _step(self) -> float:
        """Take a step. Returns after how many seconds to take the next one."""
        self._choose()
        decodes = sum(job.remaining_prompt == 0 for job in self._jobs)
        count = len(self._jobs)
        beside = self._costs.prefill_beside(decodes, count, self._stretch) if 0 < decodes < count else None
        views = [
            self._view(i, job, self._token_budget if beside is None else beside) for i, job in enumerate(self._jobs)
        ]
        self._note_shortage(any(view.lacks_room for view in views))
        plan = plan_step(views, self._token_budget, beside, is_freeing=self.is_short and self._is_freeing())
        jobs = [self._jobs[i] for i in plan.decode]
        prompts = [self._jobs[i] for i, _ in plan.prefill]
        if plan.preempt is not None:
            self._preempt(self._jobs[plan.preempt])
        if not jobs and not prompts:
            return _STALLED_S
        if not jobs and views[plan.prefill[0][0]].history == "absent":
            return _LOOK_AGAIN_S
        started, waited_before_s = time.monotonic(), _waited_s(prompts)
        last_tokens = torch.tensor([job.sampled[-1] for job in jobs]).split(1) if jobs else ()
        segments = [Segment(job.kv, token) for job, token in zip(jobs, last_tokens, strict=True)]
        segments += [self._prefill_segment(job, tokens) for job, (_, tokens) in zip(prompts, plan.prefill, strict=True)]
        jobs += prompts
        try:
            logits = self._model.forward(segments)
        except LoadFailed as failure:
            # Nothing of this step counts. The other jobs take the same step again; this one begins anew.
            failed = next(job for job in jobs if job.load is failure.task)
            self._remove(failed)
            self._abandon_save(failed)
            failed.listener.on_load_failed(failed, failure)
            return 0.0
        except Exception as error:  # a bug or exhausted memory: the jobs of this step fail, the engine goes on
            log.exception("step failed")
            for job in jobs:
                self._remove(job)
                self._abandon_save(job)
                job.listener.on_failed(job, error)
            return 0.0
        self._model.commit(segments)
        seconds = time.monotonic() - started
        self._count(segments, len(plan.decode), seconds, _waited_s(prompts) - waited_before_s)
        # One search for all: for most jobs it is all that sampling is.
        best = torch.argmax(logits, dim=-1).tolist() if any(job.sampler.is_argmax for job in jobs) else []
        for i, job in enumerate(jobs):
            self._mark_computed(job)
            if job.remaining_prompt == 0:
                self._try_take_token(job, logits[i], best[i] if job.sampler.is_argmax else None)
        return 0.0

    def _view(self, index: int, job: Job, piece: int) -> JobView:
        remaining = job.remaining_prompt
        if remaining:
            return JobView(index, remaining, self._history(job, min(remaining, piece)))
        return JobView(index, 0, lacks_room=not self._has_room(job))

    def _has_room(self, job: Job) -> bool:
        """Whether a decoding job has memory for its next token, if need be at the expense of retained contexts."""
        while True:
            try:
                job.kv.ensure(job.kv.length + 1)
            except OutOfKv:
                if not self._reclaim():
                    return False
            else:
                return True

    def _note_shortage(self, is_short: bool) -> None:
        if is_short and not self.is_short:
            self._patient_until_s = time.monotonic() + _PATIENCE_S
        was_short, self.is_short = self.is_short, is_short
        if was_short and not is_short:
            self._on_relief()

    def _is_freeing(self) -> bool:
        """Whether memory is on its way: of a preempted job, or of a turn that is being saved."""
        self._leaving = [kv for kv in self._leaving if kv() is not None]
        is_saving = self._saver is not None and self._saver.backlog > 0
        return (bool(self._leaving) or is_saving) and time.monotonic() < self._patient_until_s

    def _preempt(self, job: Job) -> None:
        self.stats.preemptions += 1
        self._remove(job)
        self._mark_whole(job)
        self._leaving.append(weakref.ref(job.kv))
        self._patient_until_s = time.monotonic() + _PREEMPTED_PATIENCE_S
        job.listener.on_preempted(job)

    def _count(self, segments: Sequence[Segment], decodes: int, seconds: float, waited_s: float) -> None:
        """waited_s: of `seconds`, for history."""
        stats = self.stats
        counts = [(segment.past, len(segment.token_ids)) for segment in segments]
        tokens = sum(n for _, n in counts)
        prefill_tokens = tokens - decodes
        stats.steps += 1
        stats.decode_tokens += decodes
        stats.prefill_tokens += prefill_tokens
        if prefill_tokens:
            stats.prefill_s += seconds
            self._rates.prefilled(tokens, sum(pairs(past, n) for past, n in counts), seconds - waited_s)
        else:
            self._rates.decoded(seconds)
        self._costs.observe(decodes, prefill_tokens, seconds - waited_s)
        self._observe(decodes, prefill_tokens, seconds)

    def _prefill_segment(self, job: Job, tokens: int) -> Segment:
        save, load = job.save, job.load
        if load is not None and job.is_at_load:
            job.kv.length = load.end  # what is loaded counts from here on; the layers wait for it
        start = job.kv.length
        end = start + tokens
        is_behind_load = load is not None and load.start < load.end <= start
        told_after = save.told_after(start, end) if save is not None and self._saver is not None else ()

        def layer_done(layer: int) -> None:
            if save is not None:
                save.layer_done(layer, end)
            if self._saver is not None and layer in told_after:
                self._saver.notify()

        return Segment(
            job.kv,
            job.context[start:end],
            wait_layer=load.wait_layer if load is not None and is_behind_load else None,
            layer_done=layer_done,
        )

    def _mark_computed(self, job: Job) -> None:
        """Tell the saver of a chunk that is full. It has no use for less before the end."""
        if job.save is not None and self._saver is not None and job.kv.length % job.save.chunk_tokens == 0:
            self._mark_whole(job)
            self._saver.notify()

    @staticmethod
    def _mark_whole(job: Job) -> None:
        if job.save is not None:
            job.save.all_done(job.kv.length)

    def _try_take_token(self, job: Job, logits: torch.Tensor, best: int | None) -> None:
        try:
            self._take_token(job, logits, best)
        except Exception as error:  # a schema that cannot be followed any more, or a bug: this job's matter alone
            if not isinstance(error, CallerError):
                log.exception("sampling failed")
            self._remove(job)
            self._abandon_save(job)
            job.listener.on_failed(job, error)

    def _take_token(self, job: Job, logits: torch.Tensor, best: int | None) -> None:
        """best: the token with the largest logit, where it is to be taken."""
        if best is None:
            token = job.sampler.sample(logits)
        else:
            token = best
            job.sampler.accept(token)
        logprobs = None if job.logprobs is None else job.logprobs.of(logits, token)
        job.sampled.append(token)
        if job.save is not None:
            job.save.token_ids.append(token)
        if len(job.sampled) == len(job.resumed) + 1:
            job.first_token_s = time.monotonic()
        piece = ""
        if token in job.eos_ids:
            job.finish_reason = "stop"
        else:
            piece = job.answer.feed(token)
            if job.answer.stopped or job.sampler.is_over:
                job.finish_reason = "stop"
            elif len(job.sampled) >= job.max_tokens:
                job.finish_reason = "length"
        if job.finish_reason:
            piece += job.answer.finish()
        job.listener.on_token(job, token, piece, logprobs)
        if job.finish_reason:
            job.done_s = time.monotonic()
            self._remove(job)
            self._mark_whole(job)
            job.listener.on_done(job)
        elif job.kv.length >= job.window:
            self._remove(job)
            self._mark_whole(job)
            job.listener.on_context_full(job)

    def _remove(self, job: Job) -> None:
        self._jobs.remove(job)
        if job.load is not None:
            job.load.cancel()  # it is over, or nobody waits for it

    def _abandon_save(self, job: Job) -> None:
        if job.save is not None and self._saver is not None:
            self._saver.abandon(job.save)


def _waited_s(jobs: Iterable[Job]) -> float:
    """How long the engine waited for the jobs' histories so far."""
    return sum(job.load.waited_s for job in jobs if job.load is not None)
