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

from inference.working_kv import KvShape
from protocol.errors import UnsupportedModel

ApplyRotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]
KeyRotation = Callable[[torch.Tensor, torch.Tensor], None]  # key, out: each [n, kv_heads, key_dim]


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
        half = sin.shape[-1] // 2
        self._halves = (-sin[:, :half], sin[:, half:])
        self._scratch = cos.new_empty(0)
        self._turns_halves = self._is_turning_halves()

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Table rows for `positions`.  # [n] int64 -> each [1, n, rotary_dim]"""
        return self._cos[positions].unsqueeze(0), self._sin[positions].unsqueeze(0)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate both.  # query [1, heads, n, head_dim], key [1, kv_heads, n, head_dim]"""
        return self._apply(query, key, *table)

    def key_rotation(self, start: int, end: int, shape: KvShape) -> KeyRotation:
        """What rotates stored keys to positions start..end-1, in any layer, to the bit as the model does it.

        The rotations of one Rotary share memory: they are for one thread at a time.
        """
        if self._turns_halves and shape.key_dim == self._cos.shape[1]:
            return self._half_turn(start, end, shape.kv_heads)
        return self._own_rotation(start, end)

    def _own_rotation(self, start: int, end: int) -> KeyRotation:
        """By the model's own function."""
        cos, sin = self._cos[start:end].unsqueeze(0), self._sin[start:end].unsqueeze(0)

        def rotate(key: torch.Tensor, out: torch.Tensor) -> None:
            heads_first = key.transpose(0, 1).unsqueeze(0)
            out.copy_(self._apply(heads_first[:, :0], heads_first, cos, sin)[1][0].transpose(0, 1))

        return rotate

    def _half_turn(self, start: int, end: int, heads: int) -> KeyRotation:
        """What most models do, key * cos + (-second half | first half) * sin, in fewer passes over memory."""
        cos = self._cos[start:end].unsqueeze(1)
        low_sin, high_sin = (half[start:end].unsqueeze(1) for half in self._halves)
        turned = self._scratch_for(end - start, heads)
        turned_low, turned_high = turned.chunk(2, -1)

        def rotate(key: torch.Tensor, out: torch.Tensor) -> None:
            low, high = key.chunk(2, -1)
            # Whole rows first, that they are in the cache for what follows: half rows come from memory at a quarter
            # of the speed.
            torch.mul(key, cos, out=out)
            torch.mul(high, low_sin, out=turned_low)
            torch.mul(low, high_sin, out=turned_high)
            out.add_(turned)

        return rotate

    def _scratch_for(self, tokens: int, heads: int) -> torch.Tensor:
        """The same memory for all, so that it stays in the CPU's cache.  # [tokens, heads, rotary_dim]"""
        wanted = tokens * heads * self._cos.shape[1]
        if self._scratch.numel() < wanted:
            with torch.inference_mode(False):  # usable in that mode and outside of it
                self._scratch = self._cos.new_empty(wanted)
        return self._scratch[:wanted].view(tokens, heads, -1)

    @torch.no_grad()
    def _is_turning_halves(self) -> bool:
        """Whether that is what the model's function does, found out by trying."""
        positions, width = self._cos.shape
        if width % 2:
            return False
        start = max(0, positions - 64)
        generator = torch.Generator().manual_seed(0)
        key = torch.randn(positions - start, 2, width, generator=generator).to(self._cos)
        own, ours = torch.empty_like(key), torch.empty_like(key)
        self._own_rotation(start, positions)(key, own)
        self._half_turn(start, positions, 2)(key, ours)
        return torch.equal(own, ours)


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
