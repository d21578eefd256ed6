"""The engine: one thread that owns the model and runs step after step.

Between steps it takes in new jobs and cancellations; in a step it computes what the planner says. What a job
produces goes to its listener, which hands it to the event loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch

from inference.decoupled import DecoupledModel, Segment
from inference.logprobs import Logprobs
from inference.planner import JobView, plan_step
from inference.preload import LoadFailed, LoadTask
from inference.sampling import Sampler
from inference.save import Saver, SaveTask
from inference.text import AnswerText
from inference.worker import Worker
from inference.working_kv import WorkingKv
from monitoring.logs import get_logger
from protocol.errors import CallerError
from protocol.ids import TokenArray
from protocol.messages import SampledLogprobs

log = get_logger(__name__)


class Listener(Protocol):
    """What a job tells. Called from the engine's thread; must not block."""

    def on_token(self, job: Job, token: int, text: str, logprobs: SampledLogprobs | None) -> None: ...

    def on_done(self, job: Job) -> None: ...

    def on_load_failed(self, job: Job, failure: LoadFailed) -> None: ...

    def on_failed(self, job: Job, error: Exception) -> None: ...


@dataclass(eq=False)
class Job:
    """One turn in the engine. After `submit` the engine's thread owns it until it tells the listener the end."""

    prompt: TokenArray
    resumed: list[int]  # tokens sampled by an earlier attempt at this turn
    kv: WorkingKv  # begun; its length is the history
    sampler: Sampler  # it and `answer` know the resumed tokens
    answer: AnswerText
    max_tokens: int
    eos_ids: Collection[int]
    listener: Listener
    load: LoadTask | None = None
    save: SaveTask | None = None
    logprobs: Logprobs | None = None  # where they are wanted
    is_cancelled: bool = False
    # the outcome
    sampled: list[int] = field(default_factory=list)
    finish_reason: str = ""
    admitted_s: float = field(default_factory=time.monotonic)
    first_token_s: float = 0.0
    done_s: float = 0.0
    context: torch.Tensor = field(init=False)  # what is computed before the first new token, int64

    def __post_init__(self) -> None:
        prompt = torch.from_numpy(self.prompt.astype("int64"))
        self.context = torch.cat([prompt, torch.tensor(self.resumed, dtype=torch.int64)])
        self.sampled = list(self.resumed)

    @property
    def remaining_prompt(self) -> int:
        return max(0, len(self.context) - self.kv.length)

    @property
    def is_loading(self) -> bool:
        return self.load is not None and not self.load.has_begun()


@dataclass
class EngineStats:
    """Read by monitoring; written by the engine's thread."""

    steps: int = 0
    prefill_s: float = 0.0  # of steps with prefill in them
    prefill_tokens: int = 0
    decode_tokens: int = 0


class Engine:
    """`submit` and `cancel` may be called from any thread; everything else is the engine's own."""

    def __init__(self, model: DecoupledModel, saver: Saver | None, token_budget: int) -> None:
        self.stats = EngineStats()
        self._model = model
        self._saver = saver
        self._token_budget = token_budget
        self._new: deque[Job] = deque()
        self._jobs: list[Job] = []
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
            job.load.is_cancelled = True
        self.poke()

    def poke(self) -> None:
        """Something that a waiting step looks at has changed."""
        self._worker.notify()

    # -- the thread ---------------------------------------------------------------------------------------

    def _work(self) -> float | None:
        while self._new:
            self._jobs.append(self._new.popleft())
        for job in [job for job in self._jobs if job.is_cancelled]:
            self._remove(job)
            self._abandon_save(job)
        if self._jobs:
            self._step()
        return 0.0 if self._jobs else None

    def _step(self) -> None:
        views = [JobView(i, job.remaining_prompt, job.is_loading) for i, job in enumerate(self._jobs)]
        plan = plan_step(views, self._token_budget)
        started = time.monotonic()
        jobs = [self._jobs[i] for i in plan.decode]
        segments = [Segment(job.kv, torch.tensor([job.sampled[-1]])) for job in jobs]
        if plan.prefill is not None:
            job = self._jobs[plan.prefill]
            jobs.append(job)
            segments.append(self._prefill_segment(job, plan.prefill_tokens))
        try:
            logits = self._model.forward(segments)
        except LoadFailed as failure:
            # Nothing of this step counts. The other jobs take the same step again; this one begins anew.
            failed = next(job for job in jobs if job.load is failure.task)
            self._remove(failed)
            self._abandon_save(failed)
            failed.listener.on_load_failed(failed, failure)
            return
        except Exception as error:  # a bug or exhausted memory: the jobs of this step fail, the engine goes on
            log.exception("step failed")
            for job in jobs:
                self._remove(job)
                self._abandon_save(job)
                job.listener.on_failed(job, error)
            return
        self._model.commit(segments)
        self.stats.steps += 1
        if plan.prefill is not None:
            self.stats.prefill_s += time.monotonic() - started
        self.stats.decode_tokens += len(plan.decode)
        self.stats.prefill_tokens += plan.prefill_tokens
        for job, row in zip(jobs, logits, strict=True):
            self._mark_computed(job)
            if job.remaining_prompt == 0:
                self._try_take_token(job, row)

    def _prefill_segment(self, job: Job, tokens: int) -> Segment:
        start = job.kv.length
        end = start + tokens
        save = job.save
        is_loaded = job.load is None or job.load.ready_layers == job.kv.shape.layers

        def layer_done(layer: int) -> None:
            if save is not None:
                save.layer_done(layer, end)
                if self._saver is not None and end // save.chunk_tokens > start // save.chunk_tokens:
                    self._saver.notify()

        return Segment(
            job.kv,
            job.context[start:end],
            wait_layer=None if is_loaded or job.load is None else job.load.wait_layer,
            layer_done=layer_done,
        )

    def _mark_computed(self, job: Job) -> None:
        if job.save is None or self._saver is None:
            return
        length = job.kv.length
        for layer in range(job.kv.shape.layers):
            job.save.layer_done(layer, length)
        if length % job.save.chunk_tokens == 0:
            self._saver.notify()

    def _try_take_token(self, job: Job, logits: torch.Tensor) -> None:
        try:
            self._take_token(job, logits)
        except Exception as error:  # a schema that cannot be followed any more, or a bug: this job's matter alone
            if not isinstance(error, CallerError):
                log.exception("sampling failed")
            self._remove(job)
            self._abandon_save(job)
            job.listener.on_failed(job, error)

    def _take_token(self, job: Job, logits: torch.Tensor) -> None:
        token = job.sampler.sample(logits)
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
            job.listener.on_done(job)

    def _remove(self, job: Job) -> None:
        self._jobs.remove(job)

    def _abandon_save(self, job: Job) -> None:
        if job.save is not None and self._saver is not None:
            self._saver.abandon(job.save)
