"""Recorded decode steps, without the device that records them.

What CUDA records is which operations run, over which memory, and nothing of the Python between them. So does the
recorder here. FlashAttention through a block table is stood in for by a function of tensors alone, as it is one.
tests/gpu has the real ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from inference import decoder_layer, decoupled, linear
from inference.attention import paged
from inference.attention.paged import over_gathered, through_block_table
from inference.decode_graphs import Replay, batch_sizes
from inference.decoupled import DecoupledModel, Segment
from inference.paged_kv import PagedKv, Pages
from inference.selfcheck import take_over
from inference.working_kv import new_context
from tests.inference.harness import VOCABULARY, make_model
from tests.inference.test_paged_attention import documented

PAGE, LONGEST = 32, 400


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    scale: float | None,
    window_size: tuple[int, int],
    **others: Any,
) -> torch.Tensor:
    """For one new token of each job: what it reads is in tensors or the same in all steps. Else as documented."""
    jobs, heads, dim = query.shape
    if max_q > 1:
        told = {"seqused_k": seqused_k, "block_table": block_table, "scale": scale, "window_size": window_size}
        return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **told, **others)
    assert max_k <= block_table.shape[1] * key.shape[1]
    k, v = (
        part[block_table.long()].flatten(1, 2).repeat_interleave(heads // part.shape[2], 2) for part in (key, value)
    )
    scores = torch.einsum("jhd,jkhd->jhk", query, k) * (dim**-0.5 if scale is None else scale)
    at, last = torch.arange(k.shape[1]), seqused_k.view(jobs, 1) - 1
    is_seen = at <= last
    if window_size[0] >= 0:
        is_seen &= at >= last - window_size[0]
    return torch.einsum("jhk,jkhd->jhd", scores.masked_fill(~is_seen.unsqueeze(1), -torch.inf).softmax(-1), v)


class Recorder(TorchDispatchMode):
    """Notes every operation and where its operands lie; `replay` does them again, and no Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(out: Any) -> list[torch.Tensor]:
    return [part for part in (out if isinstance(out, tuple | list) else [out]) if isinstance(part, torch.Tensor)]


def record(call: Callable[[], torch.Tensor]) -> Replay:
    with Recorder() as recorder:
        answer = call()

    def replay() -> torch.Tensor:
        recorder.replay()
        return answer

    return replay


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoupled, "flash_for", lambda shape: through_block_table)
    monkeypatch.setattr(paged, "_varlen_attn", lambda: varlen_attn)
    for module in (linear, decoder_layer):  # oneDNN and our kernels are the CPU's own, and no recorder sees them
        monkeypatch.setattr(module, "multiplies", lambda like: False)


def model_of(directory: Path, family: str) -> tuple[DecoupledModel, Pages]:
    made = make_model(directory, family, max_context=LONGEST)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, attn_implementation="eager").eval()
    checked = take_over(model, VOCABULARY, LONGEST, paged=True)
    return checked.model, Pages(checked.shape, PAGE, 60 * LONGEST * checked.shape.token_bytes)


def begin(model: DecoupledModel, pages: Pages, lengths: Sequence[int]) -> list[PagedKv]:
    """Contexts of so many tokens. To be called alike for alike ones."""
    generator = torch.Generator().manual_seed(1)
    kvs = []
    for length in lengths:
        kv = new_context(pages, length + 1, 0)
        assert isinstance(kv, PagedKv)
        kvs.append(kv)
    step(model, kvs, [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths])
    return kvs


def step(model: DecoupledModel, kvs: Sequence[PagedKv], tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    segments = [Segment(kv, of) for kv, of in zip(kvs, tokens, strict=True)]
    logits = model.forward(segments)
    model.commit(segments)
    return logits


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "mistral", "gemma3", "smollm3", "exaone4", "gpt_neox", "phi3-partial", "cohere"],
)
def test_recorded_steps_are_the_same_steps(family: str, tmp_path: Path) -> None:
    """Jobs that come, go and grow over pages: the same logits, the same KV, as many un-rotated keys."""
    model, pages = model_of(tmp_path, family)
    lengths = (30, 250, 64, 1, 95)
    ways = [begin(model, pages, lengths) for _ in range(2)]
    assert model.record_decoding(pages, LONGEST, (1, 2, 4), record)
    recordings = model._recorded
    assert recordings is not None
    before = recordings.steps
    rounds: list[tuple[int, ...]] = [(0, 1, 2, 3), (0, 1, 2), (4,), (3, 4), *[(0, 2)] * 5]
    for number, jobs in enumerate(rounds):
        tokens = [torch.tensor([(7 * number + job) % VOCABULARY]) for job in jobs]
        model._recorded = None
        expected = step(model, [ways[0][job] for job in jobs], tokens)
        model._recorded = recordings
        found = step(model, [ways[1][job] for job in jobs], tokens)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert recordings.steps - before == len(rounds)
    for length, kv, other in zip(lengths, *ways, strict=True):
        assert kv.length == other.length
        for layer, at in itertools.product(range(pages.shape.layers), range(length, kv.length)):
            for read in (PagedKv.keys_at, PagedKv.values_at):
                torch.testing.assert_close(read(kv, layer, at, at + 1), read(other, layer, at, at + 1))
            torch.testing.assert_close(kv.raw.span(layer, at, at + 1), other.raw.span(layer, at, at + 1))


def test_steps_that_are_not_recorded_are_taken_as_before(tmp_path: Path) -> None:
    """Prompts, more jobs than any recording has, jobs that wait, keys that are not kept."""
    model, pages = model_of(tmp_path, "llama")
    assert model.record_decoding(pages, LONGEST, (1, 2), record)
    assert model._recorded is not None
    kvs, one = begin(model, pages, (30, 40, 50)), torch.tensor([5])
    before = model._recorded.steps
    step(model, kvs, [one] * 3)
    step(model, kvs[:2], [one, torch.tensor([5, 6])])
    waited: list[int] = []
    model.forward([Segment(kvs[0], one, wait_layer=waited.append)])
    assert waited == list(range(pages.shape.layers))
    kvs[0].begin(kvs[0].length, PAGE * 2, LONGEST)
    step(model, kvs[:1], [one])
    assert model._recorded.steps == before
    step(model, kvs[1:], [one] * 2)
    assert model._recorded.steps == before + 1


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_what_cannot_be_recorded_is_not(family: str, tmp_path: Path) -> None:
    """Bent scores, sinks: their keys are gathered, by lengths that Python knows."""
    model, pages = model_of(tmp_path, family)
    assert not model.record_decoding(pages, LONGEST, (1,), record)
    assert step(model, begin(model, pages, (30,)), [torch.tensor([5])]).shape == (1, VOCABULARY)
    assert not pages.used_bytes


def test_a_device_that_refuses_to_record_serves_without(tmp_path: Path) -> None:
    model, pages = model_of(tmp_path, "llama")

    def refused(call: Callable[[], torch.Tensor]) -> Replay:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    assert not model.record_decoding(pages, LONGEST, (1,), refused)
    assert not pages.used_bytes
    assert step(model, begin(model, pages, (30,)), [torch.tensor([5])]).shape == (1, VOCABULARY)


def test_a_recording_that_answers_otherwise_is_not_used(tmp_path: Path) -> None:
    """Such as one that plays what it was told at first, whatever it is told later."""
    model, pages = model_of(tmp_path, "llama")

    def frozen(call: Callable[[], torch.Tensor]) -> Replay:
        answer = call()
        return lambda: answer

    assert not model.record_decoding(pages, LONGEST, (1, 2, 4), frozen)
    assert model._recorded is None


def test_sizes_are_powers_of_two_and_the_most() -> None:
    assert [batch_sizes(most) for most in (1, 2, 3, 32)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16, 32]]


def test_without_a_block_table_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention over gathered keys (torch 2.11) copies as many as there are."""
    model, pages = model_of(tmp_path, "llama")
    monkeypatch.setattr(decoupled, "flash_for", lambda shape: over_gathered)
    assert not model.record_decoding(pages, LONGEST, (1,), record)
