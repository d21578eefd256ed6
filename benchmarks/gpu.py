"""One device: what a turn with a saved history costs there, and decoding, each against its limit.

    python -m benchmarks.gpu [--quick] [--json FILE]

An 8-billion-parameter Llama shape with random weights made on the device, histories of 2k to 64k tokens, bfloat16:

- time to the first of 64 new tokens' answer with the history loaded from a pinned arena, layer by layer; the load
  alone; the new tokens alone, their history being there; and all of it computed,
- the part of the load that ran under computation, and the load's bandwidth against the link's,
- tokens per second of 1 and 32 decoding jobs, launched one by one and as CUDA graphs, against what the device's memory
  bandwidth allows.

No store and no HTTP: the engine's own model, loader and pages. --quick: a tiny shape that runs anywhere in seconds, to
see that it works; its figures mean nothing.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from inference.attention.paged import flash_for
from inference.copies import copies_for, pin
from inference.decode_graphs import cuda_graphs
from inference.decoupled import DecoupledModel, Segment
from inference.memory import free_bytes
from inference.paged_kv import Pages, context_pages, page_tokens_for
from inference.preload import Loader, LoadTask
from inference.selfcheck import take_over
from inference.working_kv import Kv, KvShape, new_context
from protocol.arena import Arena, Geometry, SlotState
from protocol.messages import SlotRef

_CHUNK_TOKENS = 256
_WAIT_S = 120.0


@dataclass(frozen=True)
class Size:
    """What is measured."""

    config: LlamaConfig
    histories: tuple[int, ...]  # tokens
    new_tokens: int
    step_tokens: int  # of prefill
    jobs: tuple[int, ...]  # that decode together
    job_tokens: int  # history of each
    decode_steps: int
    probe_bytes: int  # copied to measure bandwidths


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


_WHOLE = Size(
    _llama(32, 4096, 32, 8, 14336, 128256, 66_560),
    histories=(2048, 4096, 8192, 16384, 32768, 65536),
    new_tokens=64,
    step_tokens=2048,
    jobs=(1, 32),
    job_tokens=2048,
    decode_steps=64,
    probe_bytes=1 << 30,
)
_QUICK = Size(
    _llama(2, 64, 4, 2, 128, 512, 2048),
    histories=(256, 1024),
    new_tokens=64,
    step_tokens=256,
    jobs=(1, 4),
    job_tokens=256,
    decode_steps=4,
    probe_bytes=1 << 22,
)


@dataclass
class Turn:
    """A turn with a history of so many tokens. Medians."""

    history: int
    history_bytes: int
    ttft_cached_s: float  # loading under computation
    load_s: float  # alone
    compute_s: float  # of the new tokens alone, their history being there
    ttft_recomputed_s: float
    overlap_ratio: float
    load_bytes_per_s: float

    @property
    def over_limit(self) -> float:
        """1: as fast as the slower of loading and computing."""
        return self.ttft_cached_s / max(self.load_s, self.compute_s)


@dataclass
class Decoding:
    jobs: int
    history: int  # tokens of each
    is_recorded: bool  # as CUDA graphs
    step_s: float  # median
    tokens_per_s: float
    limit_tokens_per_s: float  # weights and KV read once a step, at the measured bandwidth


class Device:
    """A model, pages and an arena full of chunks. Use as a context manager."""

    def __init__(self, device: torch.device, size: Size, arena_dir: Path) -> None:
        self.size, self.device = size, device
        with torch.device(device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(size.config).eval()
            torch.set_default_dtype(default)
        self.weight_bytes = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
        model.set_attn_implementation("eager")
        checked = take_over(model, size.config.vocab_size, size.config.max_position_embeddings, paged=True)
        self.model: DecoupledModel = checked.model
        self.shape: KvShape = checked.shape
        page_tokens = page_tokens_for(_CHUNK_TOKENS)
        most = max(
            context_pages(self.shape, page_tokens, max(size.histories) + size.new_tokens),
            max(size.jobs) * context_pages(self.shape, page_tokens, size.job_tokens + size.decode_steps + 1),
        )
        self.pages = Pages(self.shape, page_tokens, most * page_tokens * self.shape.token_bytes)
        number_bytes = self.shape.kv_heads * self.shape.key_dim * self.shape.dtype.itemsize
        geometry = Geometry(self.shape.layers, number_bytes, number_bytes, _CHUNK_TOKENS)
        chunks = max(size.histories) // _CHUNK_TOKENS
        self.arena = Arena.create(arena_dir / "arena", geometry, chunks * (geometry.slot_bytes + 8192) + (1 << 20))
        self.is_pinned = pin(self.arena, device)
        self.chunks = [self._fill(slot) for slot in range(chunks)]
        self.loader = Loader(self.model.rotary, lambda: None, copies=copies_for(device))
        self.loader.start()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: object) -> None:
        self.loader.stop()

    def _fill(self, slot: int) -> SlotRef:
        identity = slot.to_bytes(16, "big")
        generation = self.arena.take(slot, SlotState.LOADING, bytes(16))
        self.arena.set_identity(slot, identity, bytes(16), bytes(16), _CHUNK_TOKENS)
        for part in (self.arena.keys, self.arena.values):
            numbers = torch.randn(part.shape[2] // self.shape.dtype.itemsize).to(self.shape.dtype)
            part[slot] = numbers.view(torch.uint8).numpy()
        for layer in range(self.shape.layers):
            self.arena.set_layer_ready(slot, layer, 0)  # nobody verifies
        return SlotRef(slot, generation, identity, _CHUNK_TOKENS, "dram")

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, act: Callable[[], object]) -> float:
        self.sync()
        started = time.perf_counter()
        act()
        self.sync()
        return time.perf_counter() - started

    def tokens(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.size.config.vocab_size, (count,))

    # -- limits -------------------------------------------------------------------------------------------

    def link_bytes_per_s(self) -> float:
        """From the arena to the device, in the largest pieces there are."""
        source = torch.from_numpy(self.arena.keys[0])
        times = max(1, self.size.probe_bytes // source.nbytes)
        target = torch.empty_like(source, device=self.device)

        def copy() -> None:
            for _ in range(times):
                target.copy_(source, non_blocking=True)

        return times * source.nbytes / min(self.timed(copy) for _ in range(5))

    def memory_bytes_per_s(self) -> float:
        """Of the device, by a copy: read once and written once."""
        source = torch.zeros(self.size.probe_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(self.timed(lambda: target.copy_(source)) for _ in range(10))

    # -- turns --------------------------------------------------------------------------------------------

    def turn(self, history: int, repeats: int) -> Turn:
        new = self.tokens(self.size.new_tokens)
        cached = [self._cached(history, new) for _ in range(repeats + 1)][1:]
        loads = [self._load(history) for _ in range(repeats + 1)][1:]
        compute = [self._compute(history, new) for _ in range(repeats + 1)][1:]
        recomputed = [self._recompute(history, new) for _ in range(max(1, repeats // 2))]
        load_s = statistics.median(loads)
        nbytes = history * self.shape.token_bytes
        return Turn(
            history,
            nbytes,
            statistics.median(seconds for seconds, _ in cached),
            load_s,
            statistics.median(compute),
            statistics.median(recomputed),
            statistics.median(ratio for _, ratio in cached),
            nbytes / load_s,
        )

    def _context(self, history: int, raw_base: int, length: int) -> Kv:
        return new_context(self.pages, history + self.size.new_tokens, raw_base, length)

    def _task(self, kv: Kv, history: int) -> tuple[LoadTask, threading.Event]:
        ended = threading.Event()
        chunks = self.chunks[: history // _CHUNK_TOKENS]
        return LoadTask(kv, self.arena, chunks, time.monotonic() + _WAIT_S, ended.set), ended

    def _cached(self, history: int, new: torch.Tensor) -> tuple[float, float]:
        kv = self._context(history, history, history)
        task, ended = self._task(kv, history)

        def act() -> None:
            self.loader.submit(task)
            self.model.forward([Segment(kv, new, wait_layer=task.wait_layer)])

        seconds = self.timed(act)
        ended.wait(_WAIT_S)
        return seconds, task.overlap_ratio

    def _load(self, history: int) -> float:
        task, ended = self._task(self._context(history, history, history), history)

        def act() -> None:
            self.loader.submit(task)
            task.wait_layer(self.shape.layers - 1)

        seconds = self.timed(act)
        ended.wait(_WAIT_S)
        return seconds

    def _compute(self, history: int, new: torch.Tensor) -> float:
        kv = self._context(history, history, history)
        return self.timed(lambda: self.model.forward([Segment(kv, new)]))

    def _recompute(self, history: int, new: torch.Tensor) -> float:
        row = torch.cat((self.tokens(history), new))
        kv = self._context(history, 0, 0)

        def act() -> None:
            for start in range(0, len(row), self.size.step_tokens):
                segment = [Segment(kv, row[start : start + self.size.step_tokens])]
                self.model.forward(segment)
                self.model.commit(segment)

        return self.timed(act)

    # -- decoding -----------------------------------------------------------------------------------------

    def record_decoding(self) -> bool:
        """From now on decode steps are CUDA graphs."""
        longest = self.size.config.max_position_embeddings
        return self.model.record_decoding(self.pages, longest, self.size.jobs, cuda_graphs(self.device))

    def decoding(self, jobs: int, memory_bytes_per_s: float, *, is_recorded: bool) -> Decoding:
        history, steps = self.size.job_tokens, self.size.decode_steps
        kvs = [new_context(self.pages, history + steps + 1, history, history) for _ in range(jobs)]
        tokens = self.tokens(jobs).split(1)
        times = []
        for _ in range(steps):
            segments = [Segment(kv, token) for kv, token in zip(kvs, tokens, strict=True)]
            times.append(self.timed(lambda: self.model.forward(segments).argmax(-1).tolist()))  # noqa: B023
            self.model.commit(segments)
        step_s = statistics.median(times[steps // 4 :])
        read_bytes = self.weight_bytes + jobs * history * self.shape.token_bytes
        return Decoding(jobs, history, is_recorded, step_s, jobs / step_s, jobs * memory_bytes_per_s / read_bytes)


def main(
    quick: Annotated[bool, typer.Option(help="A tiny shape, to see that it works.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "auto",
    repeats: int = 5,
    arena_dir: Annotated[Path, typer.Option(help="On tmpfs, with room for the longest history.")] = Path("/dev/shm"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Cached turns, recomputed ones and decoding on one device, against its limits."""
    console = Console()
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" and not quick:
        console.print("there is no CUDA device here; --quick runs on the CPU")
        raise typer.Exit(1)
    size = _QUICK if quick else _WHOLE
    where = torch.device(name, 0) if name == "cuda" else torch.device(name)
    with tempfile.TemporaryDirectory(dir=arena_dir) as directory, Device(where, size, Path(directory)) as made:
        flash = flash_for(made.shape)
        settings = {
            "device": torch.cuda.get_device_name(where) if name == "cuda" else "cpu",
            "torch": torch.__version__,
            "attention": flash.__name__ if flash is not None else "scaled_dot_product_attention",
            "arena_is_pinned": made.is_pinned,
            "weight_bytes": made.weight_bytes,
            "kv_bytes_per_token": made.shape.token_bytes,
            "new_tokens": size.new_tokens,
            "step_tokens": size.step_tokens,
            "free_bytes": free_bytes(where),
            "link_bytes_per_s": made.link_bytes_per_s(),
            "memory_bytes_per_s": made.memory_bytes_per_s(),
        }
        console.print_json(data=settings)
        turns = [made.turn(history, repeats) for history in size.histories]
        rate = settings["memory_bytes_per_s"]
        decodings = [made.decoding(jobs, rate, is_recorded=False) for jobs in size.jobs]
        if name == "cuda" and made.record_decoding():
            decodings += [made.decoding(jobs, rate, is_recorded=True) for jobs in size.jobs]
    console.print(_turns(turns, settings["link_bytes_per_s"]), _decodings(decodings))
    if json_file is not None:
        found = {
            "settings": settings,
            "turns": [asdict(turn) | {"over_limit": turn.over_limit} for turn in turns],
            "decoding": [asdict(decoding) for decoding in decodings],
        }
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _turns(turns: list[Turn], link_bytes_per_s: float) -> Table:
    table = Table(title="a turn of new tokens behind a history; milliseconds")
    for column in ("history", "cached", "load", "compute", "cached / max", "recomputed", "overlap", "of the link"):
        table.add_column(column, justify="right")
    for turn in turns:
        times = (turn.ttft_cached_s, turn.load_s, turn.compute_s)
        table.add_row(
            f"{turn.history:,}",
            *(f"{seconds * 1e3:.1f}" for seconds in times),
            f"{turn.over_limit:.2f}",
            f"{turn.ttft_recomputed_s * 1e3:.1f}",
            f"{turn.overlap_ratio:.0%}",
            f"{turn.load_bytes_per_s / link_bytes_per_s:.0%}",
        )
    return table


def _decodings(decodings: list[Decoding]) -> Table:
    table = Table(title="decoding")
    for column in ("jobs", "history", "CUDA graph", "ms per step", "tokens/s", "of the bandwidth's limit"):
        table.add_column(column, justify="right")
    for found in decodings:
        table.add_row(
            str(found.jobs),
            f"{found.history:,}",
            "yes" if found.is_recorded else "no",
            f"{found.step_s * 1e3:.2f}",
            f"{found.tokens_per_s:.0f}",
            f"{found.tokens_per_s / found.limit_tokens_per_s:.0%}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
