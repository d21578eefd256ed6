"""What each layer of a model does with its keys, found out by running it, not from its configuration.

Attention is replaced by a function that looks at what it is given and answers zero, so that no layer sees what the
ones before it rotated. The model runs twice: with rotary stand-ins that rotate by nothing, and with stand-ins that
answer cos = 2, 4, 8 ..., a number for each table, and sin = 0, at other positions. What a layer's keys are multiplied
by tells which dimensions it rotates, and by which table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from inference.rotary import Rotary, RotaryStandIn, RotaryTable, Rows, Tabulated, replace_rotary
from inference.working_kv import KvShape
from protocol.errors import UnsupportedModel

_names = itertools.count()
_KNOWN = ("s_aux", "position_ids")  # tensors that come with a call: attention sinks; what the model was called with


@dataclass(frozen=True)
class Detached:
    """A model without positions of its own, and what takes their place."""

    stand_ins: Sequence[RotaryStandIn]
    rotary: Rotary
    shape: KvShape
    depends_on_length: bool  # the tables hold for this longest context alone


@dataclass(frozen=True)
class _Seen:
    """What a layer gives to its attention."""

    key: torch.Tensor  # [kv_heads, tokens, key_dim]
    value: torch.Tensor  # [kv_heads, tokens, value_dim]
    window: int | None


def detach_rotary(model: Any, max_context: int, tokens: torch.Tensor) -> Detached:
    """Take the positions out of `model`, whose attention is nobody's afterwards.

    tokens: a few, to run it with.  # [n] int64
    Raises UnsupportedModel: layers that keep no KV, KV of several shapes, positions that come in otherwise.
    """
    stand_ins = replace_rotary(model, max_context)
    plain = _observe(model, tokens, 0)
    shape = _kv_shape(model, plain)
    tables = [table for stand_in in stand_ins for table in stand_in.tables.values()]
    marks = {table: 2.0 ** (1 + index) for index, table in enumerate(tables)}

    def marked(table: Tabulated, positions: torch.Tensor) -> Rows:
        cos, sin = table.no_rotation(positions)
        return cos * marks[table], sin

    for stand_in in stand_ins:
        stand_in.answer = marked
    turned = _observe(model, tokens, max_context - len(tokens))
    for stand_in in stand_ins:
        stand_in.answer = Tabulated.no_rotation

    made: dict[tuple[Tabulated, int], RotaryTable] = {}
    layers: list[RotaryTable | None] = []
    for layer in range(shape.layers):
        before, after = plain[layer], turned[layer]
        if not torch.equal(after.value, before.value):
            raise UnsupportedModel(f"the values of layer {layer} depend on positions")
        if torch.equal(after.key, before.key):
            layers.append(None)
            continue
        table, dims = _rotation(before.key, after.key, marks, layer)
        if (table, dims) not in made:
            made[table, dims] = RotaryTable(table.apply, table.cos, table.sin, dims)
        layers.append(made[table, dims])
    if not made:
        raise UnsupportedModel("the model has a rotary module, but no layer's keys show its work")
    return Detached(stand_ins, Rotary(layers), shape, any(table.depends_on_length for table in tables))


def _kv_shape(model: Any, seen: dict[int, _Seen]) -> KvShape:
    if not seen:
        raise UnsupportedModel(
            f"no layer of {type(model).__name__} leaves attention to transformers' AttentionInterface"
        )
    layers = model.config.get_text_config().num_hidden_layers
    if missing := sorted(set(range(layers)) - set(seen)):
        raise UnsupportedModel(f"layers {missing} keep no keys and values: linear attention, a convolution or the like")
    shapes = {(layer.key.shape[0], layer.key.shape[2], layer.value.shape[2]) for layer in seen.values()}
    if len(shapes) > 1:
        raise UnsupportedModel(f"KV of several shapes (heads, sizes of a key and a value): {sorted(shapes)}")
    like = next(model.parameters())
    windows = tuple(seen[layer].window for layer in range(layers))
    return KvShape(layers, *shapes.pop(), like.dtype, like.device, windows)


def _rotation(
    plain: torch.Tensor, turned: torch.Tensor, marks: dict[Tabulated, float], layer: int
) -> tuple[Tabulated, int]:
    """Which table the keys of a layer are rotated by, and how many of their dimensions."""
    last = int((plain != turned).any(0).any(0).nonzero().max())
    for table, mark in marks.items():
        width = table.cos.shape[1]
        dims = width if last < width else 2 * width  # twice where the model repeats the table itself
        if torch.equal(turned[..., :dims], plain[..., :dims] * mark):
            return table, dims
    raise UnsupportedModel(
        f"layer {layer} does not end with rotating the first dimensions of its keys: latent attention, "
        "a norm after the rotation, or positions of another kind"
    )


@torch.inference_mode()
def _observe(model: Any, tokens: torch.Tensor, start: int) -> dict[int, _Seen]:
    """Run `tokens` from position `start` on and tell what each layer gives to its attention."""
    seen: dict[int, _Seen] = {}

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sliding_window: int | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        strange = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in _KNOWN]
        if attention_mask is not None or strange:
            raise UnsupportedModel(f"{type(module).__name__} makes a mask or a bias of its own {strange or ''}".strip())
        seen[module.layer_idx] = _Seen(key[0], value[0], sliding_window)
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    name = f"cachedattention_probe_{next(_names)}"
    AttentionInterface.register(name, attention)
    model.set_attn_implementation(name)
    positions = torch.arange(start, start + len(tokens), device=tokens.device)
    try:
        model(input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False)
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError, ValueError) as error:
        raise UnsupportedModel(f"{type(model).__name__} cannot be run without its attention: {error}") from error
    return seen
