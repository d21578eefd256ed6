"""Attention over contiguous working KV by scaled_dot_product_attention.

Works wherever torch does; on the CPU it is the backend of choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Masks:
    """Causal masks of one step, made once per shape and shared by all layers."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, int | None, torch.dtype, torch.device], torch.Tensor] = {}

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
    mask, causal = None, False
    if new == total and window is None:
        causal = True
    elif new > 1:
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
