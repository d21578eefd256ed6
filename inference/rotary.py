"""Positions, taken out of the model and applied by us (the paper's section 3.4, "decoupled positional encoding").

The model's rotary module is replaced by one that answers cos = 1, sin = 0, so that its attention modules hand
over queries and keys as they were before rotation. Those keys are stored. Rotation happens here, by the model's
own `apply_rotary_pos_emb`, at positions that we choose, from tables that the model's own module computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from protocol.errors import UnsupportedModel

ApplyRotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class UnitRotary(nn.Module):
    """Stands in for a rotary module: rotates by nothing. Answers cos = 1 and sin = 0 of the table's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*position_ids.shape, self.width)
        one = torch.ones((), dtype=x.dtype, device=x.device)
        return one.expand(shape), torch.zeros_like(one).expand(shape)


class Rotary:
    """cos and sin of every position up to the longest context.  # each [max_context, rotary_dim], the model's dtype"""

    def __init__(self, apply: ApplyRotary, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._apply = apply
        self._cos = cos
        self._sin = sin

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Table rows for `positions`.  # [n] int64 -> each [1, n, rotary_dim]"""
        return self._cos[positions].unsqueeze(0), self._sin[positions].unsqueeze(0)

    def span(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Table rows of positions start..end-1, without a copy.  # each [1, n, rotary_dim]"""
        return self._cos[start:end].unsqueeze(0), self._sin[start:end].unsqueeze(0)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate both.  # query [1, heads, n, head_dim], key [1, kv_heads, n, head_dim]"""
        return self._apply(query, key, *table)

    def rotate_keys(self, key: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotate stored keys.  # [n, kv_heads, head_dim] -> the same shape, a new tensor"""
        heads_first = key.transpose(0, 1).unsqueeze(0)
        rotated = self._apply(heads_first[:, :0], heads_first, *table)[1]
        return rotated[0].transpose(0, 1)


def detach_rotary(model: nn.Module, max_context: int) -> Rotary:
    """Take the rotary module out of `model` and return what it did.

    Raises UnsupportedModel: the model has no rotary module, several of them, or no `apply_rotary_pos_emb`.
    """
    homes = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding")
    ]
    if not homes:
        raise UnsupportedModel("the model has no rotary position embedding; keys without positions need one")
    if len(homes) > 1:
        raise UnsupportedModel(f"the model has {len(homes)} rotary modules; one for all layers is supported")
    parent, name, rotary = homes[0]
    apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModel(f"{type(rotary).__module__} has no apply_rotary_pos_emb")
    rope_type = getattr(rotary, "rope_type", "default")
    if not isinstance(rope_type, str) or rope_type in ("dynamic", "longrope"):
        raise UnsupportedModel(f"rotary scaling {rope_type!r} depends on the length of each request or on the layer")
    like = next(model.parameters())
    positions = torch.arange(max_context, device=like.device).unsqueeze(0)
    with torch.inference_mode():
        try:
            cos, sin = rotary(like.new_zeros(1, 1, 1), positions)
        except Exception as error:  # a rotary module of another shape: whatever it raises, we cannot use it
            raise UnsupportedModel(f"the rotary module cannot be tabulated: {error}") from error
    setattr(parent, name, UnitRotary(cos.shape[-1]))
    return Rotary(apply, cos[0].contiguous(), sin[0].contiguous())
