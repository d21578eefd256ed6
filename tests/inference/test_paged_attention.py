"""Attention over pages: what FlashAttention is told leads to the answer that plain attention gives.

FlashAttention itself runs in tests/gpu. Here a plain function stands in for it that does what torch documents of
`varlen_attn`, from the very arguments: block tables, sums of lengths, tokens used, windows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from inference.attention import paged
from inference.attention.paged import Flash, PagedStep, Part, flash_for, over_gathered, through_block_table, trial
from inference.paged_kv import PagedKv, Pages
from inference.working_kv import KvShape, new_context

SHAPE = KvShape(1, 2, 16, 16, torch.float32, torch.device("cpu"))
PAGE = 32


def documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn of torch 2.13 as its documentation says, job by job."""
    assert enable_gqa
    assert window_size[1] == 0
    for lengths in (cu_seq_q, cu_seq_k):
        assert lengths.dtype == torch.int32
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    out = torch.empty_like(query)
    for job in range(len(cu_seq_q) - 1):
        q = query[int(cu_seq_q[job]) : int(cu_seq_q[job + 1])]
        if block_table is None:
            k, v = (part[int(cu_seq_k[job]) : int(cu_seq_k[job + 1])] for part in (key, value))
        else:
            assert seqused_k is not None
            assert seqused_k.dtype == block_table.dtype == torch.int32
            assert int(seqused_k[job]) == int(cu_seq_k[job + 1] - cu_seq_k[job])
            k, v = (part[block_table[job].long()].flatten(0, 1)[: int(seqused_k[job])] for part in (key, value))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        at = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
        other = torch.arange(len(k)).unsqueeze(0)
        sees = other <= at
        if window_size[0] >= 0:
            sees &= other >= at - window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
        out[int(cu_seq_q[job]) : int(cu_seq_q[job + 1])] = torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v
        )
    return out


@pytest.fixture(autouse=True)
def _documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_varlen_attn", lambda: documented)


def parts_of(lengths: list[tuple[int, int]], shape: KvShape = SHAPE) -> list[Part]:
    """Jobs of so many new and all tokens, with random KV, in pages that are strewn over the pool."""
    pages = Pages(shape, PAGE, 200 * PAGE * shape.token_bytes)
    pages.keys.normal_()
    pages.values.normal_()
    kvs: list[PagedKv] = []
    for _ in lengths:
        kv = new_context(pages, 1, 0)
        assert isinstance(kv, PagedKv)
        kvs.append(kv)
    for size in range(PAGE, 400, PAGE):
        for kv, (_, total) in zip(kvs, lengths, strict=True):
            kv.ensure(min(size, total))
    for kv, (_, total) in zip(kvs, lengths, strict=True):
        kv.ensure(total)
    return [Part(kv, total - new, new) for kv, (new, total) in zip(kvs, lengths, strict=True)]


@pytest.mark.parametrize("flash", [through_block_table, over_gathered])
@pytest.mark.parametrize("window", [None, 1, 20, 64])
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(1, 300), (1, 17), (1, 64)],
        [(40, 300)],
        [(1, 33), (1, 300), (40, 300), (7, 7), (1, 90), (33, 65)],
    ],
    ids=["first token", "decode", "prompt", "mixed"],
)
def test_all_ways_agree(flash: Flash, window: int | None, heads: int, lengths: list[tuple[int, int]]) -> None:
    parts = parts_of(lengths)
    query = torch.randn(heads, sum(part.new for part in parts), 16)
    found, expected = (PagedStep(parts, way).attend(0, query, 0.3, window, None, None) for way in (flash, None))
    torch.testing.assert_close(found, expected)


def test_what_is_written_is_what_is_read() -> None:
    """A step writes to each job's own places, un-rotated keys only as far as they are kept."""
    parts = parts_of([(1, 33), (40, 300), (33, 65)])
    parts[1].kv.begin(260, 288, 300)
    step = PagedStep(parts, None)
    tokens = sum(part.new for part in parts)
    key, value, raw = (torch.randn(tokens, 2, 16) for _ in range(3))
    step.write(0, key, value, raw)
    start = 0
    for part in parts:
        for position in range(part.past, part.total):
            row = start + position - part.past
            assert torch.equal(part.kv.keys_at(0, position, position + 1)[0], key[row])
            assert torch.equal(part.kv.values_at(0, position, position + 1)[0], value[row])
            if position >= part.kv.raw.base:
                assert torch.equal(part.kv.raw.span(0, position, position + 1)[0], raw[row])
        start += part.new


@pytest.mark.parametrize("flash", [through_block_table, over_gathered])
def test_the_trial_tells_right_from_wrong(flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial(SHAPE, flash) < 1e-4

    def wrong(*args: object, window_size: tuple[int, int], **kwargs: object) -> torch.Tensor:
        kwargs["window_size"] = (window_size[0] + 1, 0) if window_size[0] >= 0 else window_size
        call: Callable[..., torch.Tensor] = documented
        return call(*args, **({"enable_gqa": True} | kwargs))

    monkeypatch.setattr(paged, "_varlen_attn", lambda: wrong)
    assert trial(SHAPE, flash) > 0.05


def test_the_cpu_does_without() -> None:
    assert flash_for(SHAPE) is None
