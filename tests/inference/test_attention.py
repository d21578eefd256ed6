"""Attention over contiguous KV, whichever way it is computed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from inference.attention import dense
from inference.attention.decode import Decoding, share_out, takes
from inference.attention.dense import Masks, attend
from inference.rotary import Rotary, RotaryTable
from inference.working_kv import Buffers, KvShape


def _exact(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """The definition, in float64."""
    heads, new, _ = query.shape
    total, kv_heads, _ = keys.shape
    key, value = (kv.double().repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for kv in (keys, values))
    behind = torch.arange(total - new, total).unsqueeze(1) - torch.arange(total)
    hidden = (behind < 0) | (behind >= (window or total))
    scores = (query.double() @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
    return (torch.softmax(scores, -1) @ value).transpose(0, 1)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1), (18, 9)])
@pytest.mark.parametrize(
    ("new", "past"), [(1, 0), (1, 40), (1, 700), (5, 90), (31, 0), (33, 300), (128, 129), (300, 0), (300, 400)]
)
def test_every_way_of_computing_is_by_the_definition(
    new: int, past: int, heads: int, kv_heads: int, window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    """One token and many, with and without past, groups and windows, below and above all thresholds."""
    generator = torch.Generator().manual_seed(new + past)
    dim = 48
    query = torch.randn(heads, new, dim, generator=generator).to(dtype)
    # Longer than what is seen, as working KV is.
    keys, values = (torch.randn(past + new + 9, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
    keys, values = keys[: past + new], values[: past + new]
    found = attend(query, keys, values, Masks(), 0.2, window, None)
    assert found.shape == (new, heads, dim)
    torch.testing.assert_close(found.double(), _exact(query, keys, values, 0.2, window), atol=tolerance, rtol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 900, 1100])
def test_long_prompts_of_bfloat16_are_computed_in_float32_where_that_is_faster(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once, at the end."""
    monkeypatch.setattr(dense, "widens", lambda: True)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(6, 256, 48, generator=generator).bfloat16()
    keys, values = (torch.randn(1300, 2, 48, generator=generator).bfloat16() for _ in range(2))
    found = attend(query, keys, values, Masks(), 0.2, window, None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), _exact(query, keys, values, 0.2, window), atol=1e-5, rtol=2**-8)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_key_shows_to_those_who_see_it(dtype: torch.dtype) -> None:
    """Queries before it, and those whose window it has left, have their answers; the others' are none."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(4, 200, 48), torch.randn(260, 2, 48), torch.randn(260, 2, 48)
    keys[100, :, 7] = torch.nan  # the query at 40 is the first that sees it, with a window of 50 the one at 89 the last
    for window, last in ((None, 199), (50, 89)):
        found = attend(query.to(dtype), keys.to(dtype), values.to(dtype), Masks(), None, window, None)
        is_broken = found.isnan().flatten(1)
        assert torch.equal(is_broken.all(1), is_broken.any(1))
        assert is_broken.any(1).nonzero().flatten().tolist() == list(range(40, last + 1))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_the_largest_score_takes_all_where_scores_are_far_apart(dtype: torch.dtype, size: float) -> None:
    """No exponential overflows, and none that vanishes makes an answer of nothing."""
    torch.manual_seed(0)
    query, keys, values = torch.full((2, 64, 16), size), torch.randn(300, 1, 16), torch.randn(300, 1, 16)
    keys[:, 0] = torch.randperm(300).unsqueeze(1) - 300.0
    found = attend(query.to(dtype), keys.to(dtype), values.to(dtype), Masks(), None, None, None)
    for i in range(64):
        best = keys[: 237 + i, 0, 0].to(dtype).argmax()
        assert torch.equal(found[i, 0].to(dtype), values[best, 0].to(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 48), (4, 4, 12), (3, 1, 64), (8, 2, 128)])
def test_decoding_jobs_are_by_the_definition_and_write_their_kv(
    heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Jobs of all lengths in one call, the long ones cut among threads; more tokens behind theirs change nothing."""
    torch.manual_seed(heads)
    shape = KvShape(2, kv_heads, dim, dim, dtype, torch.device("cpu"), (window, window))
    assert takes(shape)
    buffers, kvs = Buffers(shape, 0), []
    for past in (0, 1, 255, 256, 257, 4000, 7):
        kv = buffers.new(past + 1)
        kv.begin(past, past // 64 * 64, past + 1)
        for x in (kv.keys, kv.values, kv.raw.keys):
            x.normal_()
        kvs.append(kv)
    decoding, others = Decoding(kvs), 3
    for layer in range(shape.layers):
        # As models give them: heads before tokens.
        query = torch.randn(heads, len(kvs) + others, dim).to(dtype).transpose(0, 1)
        key, value, raw = (torch.randn(kv_heads, len(kvs) + others, dim).to(dtype).transpose(0, 1) for _ in range(3))
        found = decoding.attend(layer, query, key, value, raw, 0.2, window)
        assert found.shape == (len(kvs), heads, dim)
        for i, kv in enumerate(kvs):
            past = kv.length
            assert torch.equal(kv.keys[layer, past], key[i])
            assert torch.equal(kv.values[layer, past], value[i])
            assert torch.equal(kv.raw.span(layer, past, past + 1)[0], raw[i])
            keys, values = kv.keys[layer, : past + 1], kv.values[layer, : past + 1]
            expected = _exact(query[i : i + 1].transpose(0, 1), keys, values, 0.2, window)
            torch.testing.assert_close(found[i : i + 1].double(), expected, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [12, 64, 128])
def test_decoding_jobs_are_rotated_as_the_model_does_it(dim: int, dtype: torch.dtype) -> None:
    """Keys to the bit, each at its own position, and queries too: the answer is that of rotated ones, to the bit."""
    torch.manual_seed(dim)
    shape = KvShape(1, 2, dim, dim, dtype, torch.device("cpu"))
    angles = torch.outer(torch.arange(600.0), 1e4 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
    rotary = Rotary([RotaryTable(apply_rotary_pos_emb, angles.cos().to(dtype), angles.sin().to(dtype))])
    turn = rotary.half_turn(0, shape)
    assert turn is not None
    pasts = (0, 1, 70, 599)
    query, key, value = (torch.randn(1, heads, len(pasts), dim).to(dtype) for heads in (6, 2, 2))
    key[0, 0, 0, 0] = torch.nan
    rotated = rotary.rotate(0, query, key, rotary.at(torch.tensor(pasts)))
    found = []
    for inputs, how in (((query, key), turn), (rotated, None)):
        buffers, kvs = Buffers(shape, 0), []
        for past in pasts:
            torch.manual_seed(past)
            kv = buffers.new(past + 1)
            kv.begin(past, past // 64 * 64, past + 1)
            kv.keys.normal_()
            kv.values.normal_()
            kvs.append(kv)
        rows = [x[0].transpose(0, 1) for x in (*inputs, value, key)]
        found.append(Decoding(kvs).attend(0, *rows, None, None, how))
        for i, kv in enumerate(kvs):
            own = kv.keys[0, kv.length]
            assert torch.equal(own.isnan(), rotated[1][0, :, i].isnan())
            assert torch.equal(own.nan_to_num(), rotated[1][0, :, i].nan_to_num())
            assert torch.equal(kv.raw.span(0, kv.length, kv.length + 1)[0].nan_to_num(), key[0, :, i].nan_to_num())
    assert torch.equal(found[0].isnan(), found[1].isnan())
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    beyond = buffers.new(601)
    beyond.begin(600, 576, 601)
    with pytest.raises(IndexError, match="position 600"):
        Decoding([beyond]).attend(0, *(x[:1] for x in rows), None, None, turn)


def test_decoding_shows_a_broken_model() -> None:
    """A score that is no number makes the answer none; other jobs have theirs."""
    shape = KvShape(1, 1, 16, 16, torch.float32, torch.device("cpu"))
    buffers = Buffers(shape, 0)
    kvs = [buffers.new(301) for _ in range(2)]
    for kv in kvs:
        kv.begin(300, 256, 301)
        kv.keys.normal_()
        kv.values.normal_()
    kvs[0].keys[0, 5, 0, 3] = torch.nan
    rows = [torch.randn(2, 1, 16) for _ in range(4)]
    found = Decoding(kvs).attend(0, *rows, None, None)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 500)), min_size=1, max_size=8), st.integers(1, 9))
def test_the_reading_is_shared_out_evenly(jobs: list[tuple[int, int]], threads: int) -> None:
    """Every token of every job once, in order; no thread reads over a token more than its share."""
    firsts, totals = [first for first, _ in jobs], [first + count for first, count in jobs]
    parts, bounds = share_out(firsts, totals, threads)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(parts), threads + 1)
    covered = [
        [range(first, end) for job, first, end in parts.tolist() if job == number] for number in range(len(jobs))
    ]
    for ranges, first, total in zip(covered, firsts, totals, strict=True):
        assert list(itertools.chain(*ranges)) == list(range(first, total))
        assert all(ranges)
    assert parts[:, 0].tolist() == sorted(parts[:, 0].tolist())
    tokens = sum(totals) - sum(firsts)
    for start, end in itertools.pairwise(bounds.tolist()):
        assert sum(parts[start:end, 2] - parts[start:end, 1]) <= tokens / threads + 1
