"""Working KV of layers with sliding windows: only what they still see is held, and answers stay transformers' own."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inference.decoupled import DecoupledModel, Segment
from inference.layer_groups import LayerGroup, layer_groups, places_of
from inference.paged_kv import Pages, context_pages
from inference.selfcheck import take_over
from inference.working_kv import Buffers, Kv, KvPool, KvShape, context_bytes, new_context
from tests.inference.harness import VOCABULARY, make_model

_WINDOW, _CHUNK, _TOKENS = 40, 16, 600
# One group of layers; two of which the decode kernel reads; two that it does not, for their scores are bent or sink.
_FAMILIES = ("mistral", "gemma3", "gemma2", "gpt_oss")


class Stock:
    """A model of ours, and transformers' own logits for one long row."""

    def __init__(self, directory: Path, family: str) -> None:
        make_model(directory, family, sliding_window=_WINDOW)
        load = AutoModelForCausalLM.from_pretrained
        stock, ours = (load(directory, dtype=torch.float32, attn_implementation="eager").eval() for _ in range(2))
        checked = take_over(ours, VOCABULARY, 2048)
        self.model: DecoupledModel = checked.model
        self.shape: KvShape = checked.shape
        self.row = torch.randint(0, 256, (_TOKENS,), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            self.logits = stock(input_ids=self.row.unsqueeze(0)).logits[0]

    def compute(self, *jobs: tuple[Kv, int]) -> None:
        """A step in which each job computes so many tokens of the row, and gives the stock logits."""
        segments = [Segment(kv, self.row[kv.length : kv.length + count]) for kv, count in jobs]
        found = self.model.forward(segments, all_logits=True)
        expected = torch.cat([self.logits[segment.past : segment.total] for segment in segments])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        self.model.commit(segments)


@pytest.fixture(scope="module", params=_FAMILIES)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return Stock(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(params=["contiguous", "paged"])
def pool(request: pytest.FixtureRequest, stock: Stock) -> KvPool:
    if request.param == "paged":
        return Pages(stock.shape, _CHUNK, 4 * _TOKENS * stock.shape.token_bytes)
    return Buffers(stock.shape, 1 << 20, chunk_tokens=_CHUNK)


def test_layers_with_the_same_window_are_a_group() -> None:
    groups = layer_groups(5, (4, None, 4, 8, None))
    assert groups == (LayerGroup(4, (0, 2)), LayerGroup(None, (1, 4)), LayerGroup(8, (3,)))
    assert places_of(groups) == ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1))
    assert layer_groups(2, ()) == (LayerGroup(None, (0, 1)),)


def test_a_group_keeps_what_the_next_token_sees_from_the_beginning_of_a_chunk() -> None:
    group = LayerGroup(40, (0,))
    for position in range(200):
        first = group.kept_from(position, 16)
        assert first % 16 == 0
        assert 0 <= first <= max(0, position - 39) < first + 16 or first == 0
        assert group.whole_from(first) <= position


def test_windows_slide_under_prompts_and_answers(stock: Stock, pool: KvPool) -> None:
    """Two contexts many windows long, in pieces of all sizes and token by token, hold little more than the windows."""
    chance = random.Random(0)
    first, second = new_context(pool, 100, 0), new_context(pool, 100, 0)
    while first.length < _TOKENS:
        pieces = [min(chance.choice((1, 1, 1, 7, 30, 90)), _TOKENS - kv.length) for kv in (first, second)]
        stock.compute(*[(kv, n) for kv, n in zip((first, second), pieces, strict=True) if n])
    assert first.whole_from > _TOKENS - 3 * _WINDOW
    for kv in (first, second):
        kv.compact(_CHUNK)  # nothing is to be saved, so no un-rotated keys are needed
    base = second.length // _CHUNK * _CHUNK
    if isinstance(pool, Pages):  # a page more than needed is kept for branches
        one = context_pages(stock.shape, _CHUNK, second.length, base - _CHUNK) * pool.page_bytes
    else:
        one = context_bytes(stock.shape, second.length, base, _CHUNK)
    assert second.nbytes <= one
    assert pool.used_bytes == first.nbytes + second.nbytes


def test_decoding_jobs_at_different_places_do_not_see_each_other(stock: Stock, pool: KvPool) -> None:
    """Windows of each job begin elsewhere; one step reads them all."""
    kvs = [new_context(pool, 64, 0) for _ in range(3)]
    for kv, length in zip(kvs, (300, 170, 20), strict=True):
        stock.compute((kv, length))
    for _ in range(150):
        stock.compute(*[(kv, 1) for kv in kvs])


def test_what_a_long_prompt_took_goes_back_as_its_windows_move_on(stock: Stock, pool: KvPool) -> None:
    """Room for the whole prompt is there from the beginning; what is behind the windows is given to others."""
    kv = new_context(pool, _TOKENS, 0)
    taken = pool.used_bytes
    for start, end in itertools.pairwise(range(0, _TOKENS + 1, 50)):
        stock.compute((kv, end - start))
    assert pool.used_bytes < taken
    sliding = sum(window is not None for window in stock.shape.windows)
    row_bytes = 2 * 2 * stock.shape.key_dim * 4
    assert taken - pool.used_bytes >= sliding * (_TOKENS - 200) * row_bytes


def values_of(kv: Kv) -> torch.Tensor:
    """Of the first 64 tokens.  # [layers, 64, kv_heads, value_dim]"""
    chunks = [torch.cat(kv.values_of(range(kv.shape.layers), start, start + _CHUNK)) for start in range(0, 64, _CHUNK)]
    return torch.cat(chunks, 1)


def test_what_somebody_still_copies_stays(stock: Stock, pool: KvPool) -> None:
    """The window moves past it, but the values are there until they are saved."""
    kv = new_context(pool, 64, 0)
    hold = kv.hold(0)
    stock.compute((kv, 64))
    kept = values_of(kv)
    while kv.length < 400:
        stock.compute((kv, 48))
    assert torch.equal(values_of(kv), kept)
    before = pool.used_bytes
    hold.start = 320
    stock.compute((kv, 1))
    assert pool.used_bytes < before
    assert kv.raw.base == 320  # un-rotated keys go, too
    hold.release()


def test_a_branch_takes_the_window_along(stock: Stock, pool: KvPool) -> None:
    kv = new_context(pool, _TOKENS, 0)
    stock.compute((kv, 300))
    stock.compute((kv, 100))
    at = max(kv.whole_from, 385)
    at = max(at // _CHUNK * _CHUNK, kv.raw.base)  # as RetentionPool has it
    branch = kv.branch(at, at, _TOKENS)
    stock.compute((kv, 3), (branch, 120))
    stock.compute((branch, 1))


def test_history_is_computed_in_front_of_what_is_loaded(stock: Stock, pool: KvPool) -> None:
    """Memory is for a loaded history: its end. What is computed instead has room of its own, as long as it needs it."""
    kv = new_context(pool, 420, 384)
    kv.open_front(50)
    opened = pool.used_bytes
    for count in (50, 50, 7, 50, 43, 50, 50, 50):
        stock.compute((kv, count))
    stock.compute((kv, 50))
    stock.compute((kv, 10))
    assert pool.used_bytes < opened
    assert kv.raw.base == 384
