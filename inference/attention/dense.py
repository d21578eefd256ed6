"""Attention over contiguous working KV by scaled_dot_product_attention.

Works wherever torch does; on the CPU it is the backend of choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from inference.kernels import softmax_kernel, take_threads
from inference.linear import multiplies, product, widens

_BLOCK = 128  # queries
_SCORES = 4 * 1024 * 1024  # so many at a time stay in the CPU's cache
_SCORES_PER_THREAD = 1 << 16  # softmax of fewer takes no longer than a thread to wake


class Masks:
    """What all layers of one step share: causal masks, made once per shape."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, int | None, torch.dtype, torch.device], torch.Tensor] = {}
        self._own_head: torch.Tensor | None = None

    def causal(self, new: int, total: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """0 where the i-th of the `new` last tokens sees the j-th of `total`, -inf elsewhere.  # [new, total]

        window: how many tokens, itself included, a token sees; None: all before it.
        """
        key = (new, total, window, like.dtype, like.device)
        if key not in self._made:
            query = torch.arange(total - new, total, device=like.device).unsqueeze(1)
            position = torch.arange(total, device=like.device).unsqueeze(0)
            hidden = position > query
            if window is not None:
                hidden |= position <= query - window
            mask = torch.zeros(new, total, dtype=like.dtype, device=like.device)
            self._made[key] = mask.masked_fill_(hidden, float("-inf"))
        return self._made[key]

    def own_head(self, kv_heads: int, like: torch.Tensor) -> torch.Tensor:
        """1 where the i-th of the KV heads is the j-th, 0 elsewhere.  # [kv_heads, kv_heads]"""
        if self._own_head is None or len(self._own_head) != kv_heads:
            self._own_head = torch.eye(kv_heads, dtype=like.dtype, device=like.device)
        return self._own_head


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    masks: Masks,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last n positions over all.

    query [heads, n, dim], rotated; keys and values [total, kv_heads, dim], keys rotated, the n new ones included;
    sinks [heads], the score of a place to look at that gives nothing.
    Returns [n, heads, dim].
    """
    new, total = query.shape[1], keys.shape[0]
    if window is not None and total > window + new - 1:
        # The oldest query sees window tokens back from itself; all before them are invisible to every query.
        keys, values = keys[total - window - new + 1 :], values[total - window - new + 1 :]
        total = keys.shape[0]
    if window is not None and total <= window:
        window = None
    key, value = keys.transpose(0, 1), values.transpose(0, 1)
    if softcap is not None or sinks is not None:
        return _attend_unfused(query, key, value, masks, scale, window, softcap, sinks)
    if _is_faster_in_blocks(query):
        if _is_faster_widened(query, total):
            return _attend_in_blocks(query.float(), key.float(), value.float(), scale, window).to(query.dtype)
        return _attend_in_blocks(query, key, value, scale, window)
    if _is_faster_as_one_product(query, keys):
        return _attend_in_one_product(query, keys, values, masks, scale)
    if new == 1:
        # The heads of a group see the same: as so many queries of one head they share its reading.
        folded = query.view(1, key.shape[0], -1, query.shape[2])
        out = F.scaled_dot_product_attention(folded, key.unsqueeze(0), value.unsqueeze(0), scale=scale)
        return out.view(1, query.shape[0], -1)
    mask, causal = None, False
    if new == total and window is None:
        causal = True
    else:
        mask = masks.causal(new, total, window, query)
    out = F.scaled_dot_product_attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out[0].transpose(0, 1)


def _is_faster_as_one_product(query: torch.Tensor, keys: torch.Tensor) -> bool:
    total, kv_heads, _ = keys.shape
    is_worth_it = query.shape[1] == 1 and total >= 512 and kv_heads <= 8
    return is_worth_it and query.dtype == torch.bfloat16 and multiplies(query)


def _attend_in_one_product(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masks: Masks, scale: float | None
) -> torch.Tensor:
    """The same for one new token: all heads in one product over whole rows of keys, as they lie in memory.

    A query is zero where the other heads' keys are. Those products are for nothing, and still it is twice as fast:
    it is reading that takes the time, and oneDNN reads whole rows at the rate of memory.
    """
    heads, _, dim = query.shape
    total, kv_heads, value_dim = values.shape
    group = heads // kv_heads
    query = query * (dim**-0.5 if scale is None else scale)
    alone = query.view(kv_heads, group, 1, dim) * masks.own_head(kv_heads, query).view(kv_heads, 1, kv_heads, 1)
    scores = torch.mm(alone.view(heads, kv_heads * dim), keys.view(total, kv_heads * dim).t())
    weights = torch.softmax(scores, -1, out=scores)
    found = torch.mm(weights, values.view(total, kv_heads * value_dim)).view(kv_heads, group, kv_heads, value_dim)
    return found.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(1, heads, value_dim)


def _is_faster_in_blocks(query: torch.Tensor) -> bool:
    new = query.shape[1]
    if not multiplies(query):
        return False
    return new >= 32 if query.dtype == torch.float32 else new > 1


def _is_faster_widened(query: torch.Tensor, total: int) -> bool:
    return query.dtype == torch.bfloat16 and query.shape[1] >= 256 and total >= 1024 and widens()


def _attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
) -> torch.Tensor:
    """The same by oneDNN's products: a block of queries at a time, over all that the block sees.

    The fused kernel multiplies at a third of the rate that the CPU has (docs/experiments.md).
    """
    heads, new, dim = query.shape
    kv_heads, total, value_dim = value.shape
    group = heads // kv_heads
    query = (query * (dim**-0.5 if scale is None else scale)).view(kv_heads, group, new, dim)
    key, value = key.contiguous(), _columns(value)
    out = query.new_empty(new, kv_heads, group, value_dim)
    for start in range(0, new, _BLOCK):
        rows = min(_BLOCK, new - start)
        position, seen = total - new + start, total - new + start + rows
        first = 0 if window is None else max(0, position - window + 1)
        at_once = 1 if query.dtype == torch.float32 else max(1, _SCORES // (group * rows * (seen - first)))
        for head in range(0, kv_heads, at_once):
            own, these = slice(head, head + at_once), slice(start, start + rows)
            scores = _product(query[own, :, these].reshape(-1, group * rows, dim), key[own, first:seen])
            shares = _soften(scores, rows, position - first + 1, window)
            found = _product(scores, value[own, :, first:seen]).mul_(shares.unsqueeze(-1))
            out[these, own] = found.view(-1, group, rows, value_dim).permute(2, 0, 1, 3)
    return out.view(new, heads, value_dim)


def _soften(scores: torch.Tensor, queries: int, seen: int, window: int | None) -> torch.Tensor:
    """Makes scores [heads, n, length] weights in place, not yet divided by their sum, whose reciprocal comes back
    [heads, n], float32. Row i is of query i % queries; the first one sees `seen` columns, each other one more than the
    one before it, and none more than the last `window` of them.
    """
    heads, n, length = scores.shape
    width, rows = scores.itemsize, heads * n
    threads = take_threads(1 + scores.numel() // _SCORES_PER_THREAD)
    shares = torch.empty(heads, n)
    sizes = (width, threads, rows, length, queries, seen, length if window is None else window)
    softmax_kernel(width)(*sizes, scores.data_ptr(), shares.data_ptr())
    return shares


def _columns(value: torch.Tensor) -> torch.Tensor:
    """value [kv_heads, total, dim] as [kv_heads, dim, total], in float32 contiguous."""
    kv_heads, total, dim = value.shape
    if value.dtype != torch.float32:
        return value.transpose(1, 2)
    # As a matrix of two dimensions, which alone torch turns quickly.
    flat = value.transpose(0, 1).reshape(total, kv_heads * dim)
    return flat.t().contiguous().view(kv_heads, dim, total)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [heads, n, k] and b [heads, m, k] give a b^T [heads, n, m]; in float32 heads is 1."""
    if a.dtype == torch.float32:  # bmm takes MKL for it
        return product(a[0], b[0].contiguous()).unsqueeze(0)
    return torch.bmm(a, b.transpose(1, 2))


def _attend_unfused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: Masks,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The same with what the fused kernel has no place for: scores bent by tanh (Gemma 2), sinks (gpt-oss)."""
    heads, new, dim = query.shape
    kv_heads, total, _ = key.shape
    group = heads // kv_heads
    folded = query.reshape(kv_heads, group * new, dim)
    scores = torch.matmul(folded, key.transpose(1, 2)) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(kv_heads, group, new, total) + masks.causal(new, total, window, query)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(kv_heads, group, 1, 1).expand(-1, -1, new, 1)), -1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :total].to(query.dtype)
    out = torch.matmul(weights.reshape(kv_heads, group * new, total), value)
    return out.view(heads, new, -1).transpose(0, 1)
