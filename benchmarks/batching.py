"""What jobs that decode together get, alone and while long prompts arrive: the engine in this process, no store.

    python -m benchmarks.batching [--dtype float32] [--json FILE]

`bench-88m`. So many jobs decode from prompts of 128 tokens; then they do so again while jobs with long prompts arrive,
the next one as soon as the one before has its first token. TPOT is the time between two tokens of one job.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from inference.environment import for_torch

with for_torch():
    import torch

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.models import bench_88m
from inference.config import InferenceConfig
from inference.engine import Engine, Job
from inference.model import LoadedModel, load_model
from inference.preload import LoadFailed
from inference.sampling import Sampler
from inference.text import AnswerText
from inference.working_kv import Buffers, new_context
from protocol.messages import SampledLogprobs, Sampling

_PROMPT_TOKENS = 128
_ANSWER_TOKENS = 3000  # it is broken off when all is measured
_ANSWER_ROOM_TOKENS = 128  # as in inference.turn
_WARM_TOKENS = 8  # of each job, not measured
_WAIT_S = 300.0
DType = Literal["float32", "bfloat16"]


@dataclass
class Result:
    dtype: str
    concurrency: int
    long_prompts: int  # that arrived meanwhile
    tokens_per_s: float  # decoded
    tpot_p50_ms: float
    tpot_p99_ms: float
    tpot_max_ms: float
    long_ttft_s: float = 0.0  # median of the long prompts


@dataclass
class Recorder:
    """Listens to one job: when its tokens came."""

    times_s: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def on_token(self, job: Job, token: int, text: str, logprobs: SampledLogprobs | None) -> None:
        self.times_s.append(time.perf_counter())

    def on_done(self, job: Job) -> None:
        self.ended.set()

    def on_context_full(self, job: Job) -> None:
        raise RuntimeError("a context was full")

    def on_preempted(self, job: Job) -> None:
        self.on_failed(job, RuntimeError("preempted"))

    def on_load_failed(self, job: Job, failure: LoadFailed) -> None:
        self.on_failed(job, failure)

    def on_failed(self, job: Job, error: Exception) -> None:
        self.error = error
        self.ended.set()

    def wait(self, event: threading.Event) -> None:
        """Raises RuntimeError: it failed, or takes too long."""
        if not event.wait(_WAIT_S) or self.error is not None:
            raise RuntimeError(f"a job failed: {self.error or 'no answer in time'}")


def _wait_tokens(recorders: list[Recorder], tokens: int) -> None:
    while min(len(recorder.times_s) for recorder in recorders) < tokens:
        for recorder in recorders:
            if recorder.ended.is_set():
                raise RuntimeError(f"a job ended too early: {recorder.error}")
        time.sleep(0.001)


class Bench:
    def __init__(self, dtype: DType, step_tokens: int, stretch: float) -> None:
        with tempfile.TemporaryDirectory() as run_dir:
            config = InferenceConfig(
                str(bench_88m()), Path(run_dir), "inproc://none", "inproc://none", device="cpu", dtype=dtype
            )
            self.model: LoadedModel = load_model(config)
        self.dtype = dtype
        self.engine = Engine(self.model.checked.model, None, step_tokens, stretch)
        self._buffers = Buffers(self.model.checked.shape, 1 << 30)
        self._chance = np.random.default_rng(0)
        self.engine.start()

    def submit(self, prompt_tokens: int, answer_tokens: int) -> tuple[Job, Recorder]:
        prompt = self._chance.integers(300, self.model.vocabulary.size, prompt_tokens).astype(np.uint32)
        recorder = Recorder()
        job = Job(
            prompt=prompt,
            resumed=[],
            sampler=Sampler(Sampling(temperature=0.0), self.model.vocabulary.size, prompt),
            answer=AnswerText(self.model.tokenizer),
            max_tokens=answer_tokens,
            eos_ids=(),
            listener=recorder,
        )
        job.enter(new_context(self._buffers, prompt_tokens + min(answer_tokens, _ANSWER_ROOM_TOKENS), 0))
        self.engine.submit(job)
        return job, recorder

    def measure(self, concurrency: int, tokens: int, long_prompts: int, long_tokens: int) -> Result:
        """Decode with `concurrency` jobs until the long prompts are through, or each has `tokens` tokens."""
        decoding = [self.submit(_PROMPT_TOKENS, _ANSWER_TOKENS) for _ in range(concurrency)]
        recorders = [recorder for _, recorder in decoding]
        _wait_tokens(recorders, _WARM_TOKENS)
        begin_s, ttft_s = time.perf_counter(), []
        for _ in range(long_prompts):
            asked_s = time.perf_counter()
            _, long = self.submit(long_tokens, 1)
            long.wait(long.ended)
            ttft_s.append(time.perf_counter() - asked_s)
        if not long_prompts:
            _wait_tokens(recorders, _WARM_TOKENS + tokens)
        end_s = time.perf_counter()
        for job, _ in decoding:
            self.engine.cancel(job)
        while self.engine.running:
            time.sleep(0.001)
        times = [np.array([t for t in recorder.times_s if begin_s <= t <= end_s]) for recorder in recorders]
        gaps_ms = np.concatenate([np.diff(t) for t in times]) * 1e3
        return Result(
            self.dtype,
            concurrency,
            long_prompts,
            sum(len(t) for t in times) / (end_s - begin_s),
            float(np.percentile(gaps_ms, 50)),
            float(np.percentile(gaps_ms, 99)),
            float(gaps_ms.max()),
            float(np.median(ttft_s)) if ttft_s else 0.0,
        )


def main(
    dtype: Annotated[DType, typer.Option(help="Number format of weights and KV.")] = "bfloat16",
    concurrency: Annotated[list[int], typer.Option(help="Jobs that decode together; several times.")] = [1, 8, 32],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens of each job without long prompts.")] = 50,
    long_prompts: Annotated[int, typer.Option(help="Long prompts, one after another.")] = 2,
    long_tokens: Annotated[int, typer.Option(help="Length of a long prompt.")] = 1500,
    step_tokens: Annotated[int, typer.Option(help="Token budget of a step.")] = 512,
    stretch: Annotated[float, typer.Option(help="As --step-stretch.")] = 2.5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Measure throughput and TPOT of jobs that decode together, with and without long prompts arriving."""
    bench = Bench(dtype, step_tokens, stretch)
    bench.measure(max(concurrency), 2, 0, 0)  # touches the memory
    results = [
        bench.measure(count, tokens, prompts, long_tokens) for count in concurrency for prompts in (0, long_prompts)
    ]
    bench.engine.stop()
    table = Table(
        "jobs", "long prompts", "tokens/s", "TPOT p50, ms", "p99, ms", "max, ms", "p99 / p50", "long TTFT, s",
        title=f"bench-88m, {dtype}, {torch.get_num_threads()} threads",
    )  # fmt: skip
    for r in results:
        table.add_row(
            str(r.concurrency),
            str(r.long_prompts),
            f"{r.tokens_per_s:.0f}",
            f"{r.tpot_p50_ms:.1f}",
            f"{r.tpot_p99_ms:.1f}",
            f"{r.tpot_max_ms:.1f}",
            f"{r.tpot_p99_ms / r.tpot_p50_ms:.2f}",
            f"{r.long_ttft_s:.2f}" if r.long_prompts else "",
        )
    Console().print(table)
    if json_file is not None:
        settings = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "step_tokens": step_tokens,
            "stretch": stretch,
            "prompt_tokens": _PROMPT_TOKENS,
            "long_tokens": long_tokens,
        }
        document = {"benchmark": "benchmarks.batching", "settings": settings, "results": [asdict(r) for r in results]}
        json_file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
