"""Positions, taken out of the model and applied by us (the paper's section 3.4, "decoupled positional encoding").

A model's rotary modules are replaced by stand-ins that answer cos = 1, sin = 0, so that its attention modules hand
over queries and keys as they were before rotation. Those keys are stored. Rotation happens here, by the model's
own `apply_rotary_pos_emb`, at positions that we choose, from tables that the model's own modules computed. Which
layer rotates what by which table is observed; see probe.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inference.working_kv import KvShape
from protocol.errors import UnsupportedModel

ApplyRotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Rows = tuple[torch.Tensor, torch.Tensor]  # of cos and sin
StepRows = tuple[torch.Tensor, ...]  # those, and what RotaryTable takes instead of them
# cos and sin [max_context, dim] by which head * cos + (second half | first half) * sin is the head rotated
HalfTurn = tuple[torch.Tensor, torch.Tensor]
KeyRotation = Callable[[int, torch.Tensor, torch.Tensor], None]  # layer; key, out: each [n, kv_heads, key_dim]
_TableRotation = Callable[[torch.Tensor, torch.Tensor], None]  # key, out


@dataclass(frozen=True, eq=False)
class Tabulated:
    """What a rotary module answers, for every position.  # cos, sin: each [max_context, width]"""

    apply: ApplyRotary
    cos: torch.Tensor
    sin: torch.Tensor
    depends_on_length: bool  # a shorter longest context would have given other rows

    def rows(self, positions: torch.Tensor) -> Rows:
        return self.cos[positions], self.sin[positions]

    def no_rotation(self, positions: torch.Tensor) -> Rows:
        shape = (*positions.shape, self.cos.shape[-1])
        one = self.cos.new_ones(())
        return one.expand(shape), torch.zeros_like(one).expand(shape)


class RotaryStandIn(nn.Module):
    """Takes a rotary module's place and rotates by nothing, unless `answer` says otherwise.

    A module that serves several kinds of layers is called with the kind, and has a table for each. A table is made at
    the first call for it, by the module itself and for the longest context at once: scaling that depends on the length
    (dynamic NTK, LongRoPE) is the same then for every length.
    """

    def __init__(self, module: nn.Module, max_context: int) -> None:
        super().__init__()
        self.tables: dict[tuple[object, ...], Tabulated] = {}
        self.answer: Callable[[Tabulated, torch.Tensor], Rows] = Tabulated.no_rotation
        self._module = (module,)  # in a tuple, it is no part of the model
        self._max_context = max_context

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *kind: object, **named: object) -> Rows:
        key = (*kind, *named.values())
        if key not in self.tables:
            if not all(isinstance(part, str) for part in key):
                raise UnsupportedModel(f"its rotary module is called with {key}, not just with a kind of layer")
            self.tables[key] = _tabulate(self._module[0], x, self._max_context, *kind, **named)
        return self.answer(self.tables[key], position_ids)


@torch.inference_mode()
def _tabulate(module: Any, x: torch.Tensor, max_context: int, *kind: object, **named: object) -> Tabulated:
    name = type(module).__module__
    apply = getattr(sys.modules[name], "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModel(f"{name} has no apply_rotary_pos_emb")

    def ask(like: torch.Tensor, positions: torch.Tensor) -> Rows:
        try:
            cos, sin = module(like, positions.unsqueeze(0), *kind, **named)
            return cos[0].contiguous(), sin[0].contiguous()
        except Exception as error:  # a rotary module of another shape: whatever it raises, we cannot use it
            raise UnsupportedModel(f"{type(module).__name__} cannot be tabulated: {error}") from error

    exact = x.new_zeros(1, 1, 1, dtype=torch.float32)
    # The module takes the largest position for the length.
    alone = ask(exact, torch.tensor([1], device=x.device))
    told = ask(exact, torch.tensor([1, max_context - 1], device=x.device))
    depends_on_length = not all(
        torch.allclose(one[0], other[0], rtol=1e-5, atol=0) for one, other in zip(alone, told, strict=True)
    )
    cos, sin = ask(x.new_zeros(1, 1, 1), torch.arange(max_context, device=x.device))
    if cos.dim() != 2 or cos.shape != sin.shape or not cos.is_floating_point():
        raise UnsupportedModel(f"{type(module).__name__} answers something else than cos and sin")
    return Tabulated(apply, cos, sin, depends_on_length)


def replace_rotary(model: nn.Module, max_context: int) -> list[RotaryStandIn]:
    """Put stand-ins where the rotary modules of `model` are. Raises UnsupportedModel: there are none."""
    homes = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding")
    ]
    if not homes:
        raise UnsupportedModel("the model has no rotary position embedding; keys without positions need one")
    stand_ins = []
    for parent, name, module in homes:
        stand_ins.append(RotaryStandIn(module, max_context))
        setattr(parent, name, stand_ins[-1])
    return stand_ins


class RotaryTable:
    """cos and sin of every position up to the longest context, and the model's way to rotate by them.

    cos, sin: each [max_context, width]. The first `dims` dimensions of a head are rotated, the others stay as they are.
    """

    def __init__(self, apply: ApplyRotary, cos: torch.Tensor, sin: torch.Tensor, dims: int | None = None) -> None:
        """dims: the tables' width if not given; twice that where the model repeats the rows itself."""
        self._apply = apply
        self._cos = cos
        self._sin = sin
        self._dims = cos.shape[1] if dims is None else dims
        half = self._dims // 2
        self._whole_cos = cos if cos.shape[1] == self._dims else cos.repeat(1, 2)
        self._turning_sin = torch.cat((-sin[:, :half], sin[:, -half:]), 1)
        self._scratch = cos.new_empty(0)
        self._turns_halves = self._is_turning_halves()

    def at(self, positions: torch.Tensor) -> StepRows:
        """Table rows for `positions`.  # [n] int64 -> each [1, n, width]"""
        tables: StepRows = (self._cos, self._sin)
        if self._turns_halves:
            tables += (self._whole_cos, self._turning_sin)
        return tuple(table[positions].unsqueeze(0) for table in tables)

    def rotate(self, query: torch.Tensor, key: torch.Tensor, rows: StepRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate both.  # query [1, heads, n, head_dim], key [1, kv_heads, n, head_dim]"""
        if self._turns_halves and self._dims == key.shape[-1] and key.dtype == self._cos.dtype:
            _, _, cos, sin = rows
            both = torch.cat((query, key), 1)
            turned = both.roll(self._dims // 2, -1).mul_(sin.unsqueeze(1))
            turned_query, turned_key = both.mul_(cos.unsqueeze(1)).add_(turned).split((query.shape[1], key.shape[1]), 1)
            return turned_query, turned_key
        return self._rotate_as_model(query, key, (rows[0], rows[1]))

    def _rotate_as_model(self, query: torch.Tensor, key: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        dims = self._dims
        if dims == key.shape[-1]:
            return self._apply(query, key, *rows)
        turned_query, turned_key = self._apply(query[..., :dims], key[..., :dims], *rows)
        return torch.cat((turned_query, query[..., dims:]), -1), torch.cat((turned_key, key[..., dims:]), -1)

    def half_turn(self, shape: KvShape) -> HalfTurn | None:
        """The whole tables, where that is how heads are rotated; None: partly, or otherwise."""
        is_so = self._turns_halves and self._dims == shape.key_dim and shape.dtype == self._cos.dtype
        return (self._whole_cos, self._turning_sin) if is_so else None

    def key_rotation(self, start: int, end: int, shape: KvShape) -> _TableRotation:
        """What rotates stored keys to positions start..end-1, to the bit as the model does it.

        The rotations of one table share memory: they are for one thread at a time.
        """
        # Some models rotate in float32 whatever they compute in: that is left to them.
        if self._turns_halves and shape.dtype == self._cos.dtype:
            return self._half_turn(start, end, shape)
        return self._own_rotation(start, end)

    def _own_rotation(self, start: int, end: int) -> _TableRotation:
        """By the model's own function."""
        rows = self._cos[start:end].unsqueeze(0), self._sin[start:end].unsqueeze(0)

        def rotate(key: torch.Tensor, out: torch.Tensor) -> None:
            heads_first = key.transpose(0, 1).unsqueeze(0)
            out.copy_(self._rotate_as_model(heads_first[:, :0], heads_first, rows)[1][0].transpose(0, 1))

        return rotate

    def _half_turn(self, start: int, end: int, shape: KvShape) -> _TableRotation:
        """What most models do, key * cos + (-second half | first half) * sin, in fewer passes over memory."""
        dims, is_partial = self._dims, self._dims < shape.key_dim
        cos = self._whole_cos[start:end].unsqueeze(1)
        low_sin, high_sin = self._turning_sin[start:end].unsqueeze(1).chunk(2, -1)
        turned = self._scratch_for(end - start, shape.kv_heads)
        turned_low, turned_high = turned.chunk(2, -1)

        def rotate(key: torch.Tensor, out: torch.Tensor) -> None:
            if is_partial:
                out[..., dims:] = key[..., dims:]
                key, out = key[..., :dims], out[..., :dims]
            low, high = key.chunk(2, -1)
            # Whole rows first, that they are in the cache for what follows: half rows come from memory at a quarter
            # of the speed.
            torch.mul(key, cos, out=out)
            torch.mul(high, low_sin, out=turned_low)
            torch.mul(low, high_sin, out=turned_high)
            out.add_(turned)

        return rotate

    def _scratch_for(self, tokens: int, heads: int) -> torch.Tensor:
        """The same memory for all, so that it stays in the CPU's cache.  # [tokens, heads, dims]"""
        wanted = tokens * heads * self._dims
        if self._scratch.numel() < wanted:
            with torch.inference_mode(False):  # usable in that mode and outside of it
                self._scratch = self._cos.new_empty(wanted)
        return self._scratch[:wanted].view(tokens, heads, -1)

    @torch.no_grad()
    def _is_turning_halves(self) -> bool:
        """Whether that is what the model's function does, found out by trying."""
        positions, dims = self._cos.shape[0], self._dims
        if dims % 2:
            return False
        start = max(0, positions - 64)
        generator = torch.Generator().manual_seed(0)
        key = torch.randn(positions - start, 2, dims, generator=generator).to(self._cos)
        own, ours = torch.empty_like(key), torch.empty_like(key)
        self._own_rotation(start, positions)(key, own)
        self._half_turn(start, positions, KvShape(1, 2, dims, dims, key.dtype, key.device))(key, ours)
        return torch.equal(own, ours)


class Rotary:
    """The rotation of every layer: by a table, which layers of a kind share, or none where a layer has no positions."""

    def __init__(self, layers: Sequence[RotaryTable | None]) -> None:
        self._layers = tuple(layers)
        self._tables = {table for table in layers if table is not None}

    def at(self, positions: torch.Tensor) -> dict[RotaryTable, StepRows]:
        """What `rotate` needs for tokens at `positions`.  # [n] int64"""
        return {table: table.at(positions) for table in self._tables}

    def rotate(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, rows: dict[RotaryTable, StepRows]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate both as layer `layer` does.  # query [1, heads, n, head_dim], key [1, kv_heads, n, head_dim]"""
        table = self._layers[layer]
        return (query, key) if table is None else table.rotate(query, key, rows[table])

    def half_turn(self, layer: int, shape: KvShape) -> HalfTurn | None:
        table = self._layers[layer]
        return None if table is None else table.half_turn(shape)

    def key_rotation(self, start: int, end: int, shape: KvShape) -> KeyRotation:
        """What rotates stored keys to positions start..end-1, to the bit as the model does it in that layer.

        The rotations of one Rotary share memory: they are for one thread at a time.
        """
        by_table = {table: table.key_rotation(start, end, shape) for table in self._tables}
        by_layer = [_keep if table is None else by_table[table] for table in self._layers]

        def rotate(layer: int, key: torch.Tensor, out: torch.Tensor) -> None:
            by_layer[layer](key, out)

        return rotate


def _keep(key: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(key)
