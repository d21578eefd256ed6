"""A step of the model alone: ours, transformers' own, and what the machine allows.

    python -m benchmarks.forward [--model DIR] [--dtype bfloat16] [--json FILE]

No service and no store: the forward pass over working KV that is there already. The two take turns, so that whatever
else the machine does slows both. The limit of a step is the longer of two times: to read its weights and KV once at
the rate of memory, and to multiply at the rate of a large product by oneDNN; both rates are measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from inference.environment import for_torch

with for_torch():
    import torch

import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.models import bench_88m
from inference.decoupled import DecoupledModel, Segment
from inference.selfcheck import CheckedModel, take_over
from inference.working_kv import Buffers, WorkingKv


@dataclass(frozen=True)
class Case:
    """A step: `jobs` jobs with `past` tokens each compute `new` tokens each."""

    name: str
    jobs: int
    past: int
    new: int


@dataclass(frozen=True)
class Figure:
    case: Case
    dtype: str
    ours_ms: float  # medians
    stock_ms: float
    limit_ms: float


CASES = (
    Case("decode", 1, 1650, 1),
    Case("decode, 8 jobs", 8, 1650, 1),
    Case("decode, 32 jobs", 32, 1650, 1),
    Case("a short turn", 1, 1650, 64),
    Case("a piece of a long prompt", 1, 1202, 512),
    Case("a whole prompt", 1, 0, 1714),
)


class Ours:
    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
        self._checked: CheckedModel = take_over(model, model.config.vocab_size, model.config.max_position_embeddings)

    def step(self, case: Case) -> Callable[[], object]:
        shape, model = self._checked.shape, self._checked.model
        buffers = Buffers(shape, 0)
        segments = []
        for _ in range(case.jobs):
            kv = WorkingKv(buffers, case.past + case.new)
            for rows in kv.rows:
                rows.keys.normal_()
                rows.values.normal_()
            kv.begin(case.past, case.past, case.past + case.new)
            segments.append(Segment(kv, torch.arange(case.new)))
        return lambda: self._run(model, segments)

    @staticmethod
    def _run(model: DecoupledModel, segments: list[Segment]) -> object:
        return model.forward(segments).argmax(-1)


class Stock:
    """transformers with scaled_dot_product_attention and one DynamicCache for the batch."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa"
        ).eval()

    def step(self, case: Case) -> Callable[[], object]:
        config, dtype = self.model.config, self.model.dtype
        cache = DynamicCache(config=config)
        heads, dim = config.num_key_value_heads, config.head_dim
        for layer in range(config.num_hidden_layers if case.past else 0):
            kv = torch.randn(case.jobs, heads, case.past, dim).to(dtype)
            cache.update(kv, kv.clone(), layer)
        row = torch.arange(case.new).expand(case.jobs, -1)

        @torch.inference_mode()
        def run() -> object:
            found = self.model(input_ids=row, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            cache.crop(-case.new)
            return found

        return run


@dataclass(frozen=True)
class Machine:
    """What it allows."""

    read_bytes_per_s: float
    multiply_flops_per_s: float

    @classmethod
    @torch.inference_mode()
    def measured(cls, dtype: torch.dtype) -> Machine:
        memory = torch.zeros(64 * 1024 * 1024)
        read_s = min(_seconds(memory.sum) for _ in range(7))
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(4096, 768).to(dtype), 512)
        x = torch.randn(1024, 768).to(dtype)
        product = torch.ops.mkldnn._linear_pointwise.default
        flop = 2 * 1024 * 768 * 4096
        multiply_s = min(_seconds(lambda: product(x, weight, None, "none", [], "")) for _ in range(9))
        return cls(memory.nbytes / read_s, flop / multiply_s)

    def limit_s(self, case: Case, config: Any, itemsize: int) -> float:
        hidden, heads, kv_heads, dim = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config.intermediate_size
        layers, head = config.num_hidden_layers, hidden * config.vocab_size
        tokens = case.jobs * case.new
        read = (layer * layers + head) * itemsize
        read += case.jobs * (case.past + case.new) * layers * 2 * kv_heads * dim * itemsize
        seen = case.past + (case.new + 1) / 2  # tokens that a new one attends to, on average
        flop = 2 * (layer * layers * tokens + head * case.jobs) + 4 * tokens * seen * heads * dim * layers
        return max(read / self.read_bytes_per_s, flop / self.multiply_flops_per_s)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(directory: Path, dtype: torch.dtype, cases: tuple[Case, ...], for_s: float) -> list[Figure]:
    """Each case for about for_s seconds."""
    ours, stock = Ours(directory, dtype), Stock(directory, dtype)
    machine = Machine.measured(dtype)
    config = stock.model.config
    found = []
    for case in cases:
        steps = ours.step(case), stock.step(case)
        times: tuple[list[float], list[float]] = [], []
        for step in steps:
            step()
        end = time.perf_counter() + for_s
        while time.perf_counter() < end or len(times[0]) < 3:
            for step, seconds in zip(steps, times, strict=True):
                seconds.append(_seconds(step))
        ours_ms, stock_ms = (statistics.median(seconds) * 1e3 for seconds in times)
        limit_ms = machine.limit_s(case, config, dtype.itemsize) * 1e3
        found.append(Figure(case, str(dtype).removeprefix("torch."), ours_ms, stock_ms, limit_ms))
    return found


def main(
    model: Annotated[Path | None, typer.Option(help="A model's directory.  [default: bench-88m]")] = None,
    dtypes: Annotated[list[str], typer.Option("--dtype")] = ["bfloat16", "float32"],  # noqa: B006
    for_s: Annotated[float, typer.Option(help="Seconds for each case.")] = 2.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Measure steps of the model alone."""
    directory = model or bench_88m()
    found = [figure for name in dtypes for figure in measure(directory, getattr(torch, name), CASES, for_s)]
    table = Table("", "past + new", "dtype", "ours", "transformers", "limit", "ours / limit", title=directory.name)
    for figure in found:
        case = figure.case
        table.add_row(
            case.name,
            f"{case.past:,} + {case.new:,}",
            figure.dtype,
            f"{figure.ours_ms:.1f} ms",
            f"{figure.stock_ms:.1f} ms",
            f"{figure.limit_ms:.1f} ms",
            f"{figure.ours_ms / figure.limit_ms:.2f}",
        )
    Console(width=120).print(table)
    if json_file is not None:
        command = " ".join(["python -m benchmarks.forward", *sys.argv[1:]])
        settings = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        record = {"command": command, "settings": settings, "steps": [asdict(figure) for figure in found]}
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
