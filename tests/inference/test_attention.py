"""Attention over contiguous KV, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch

from inference.attention.dense import Masks, attend


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
