"""The engine proves itself at load: the stock forward and ours, over the same tokens, must agree.

Ours runs in pieces, the last one over keys that went the way of the store: taken out un-rotated and rotated
again into other working KV. Whatever a model does that we do not know of shows up here and stops the start.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inference.decoupled import DecoupledModel, Segment
from inference.rotary import detach_rotary
from inference.working_kv import Buffers, KvShape, WorkingKv
from protocol.errors import UnsupportedModel

_TOKENS = 48
_CUTS = (0, 29, 30, _TOKENS)
# Largest difference of logits, as a part of their spread. float32: two orders above what summation order alone
# gives (4e-7); bfloat16 keeps 8 bits of mantissa and many sums.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class CheckedModel:
    model: DecoupledModel
    shape: KvShape
    difference: float  # largest difference found, as a part of the logits' spread


def take_over(model: nn.Module, vocabulary: int, max_context: int) -> CheckedModel:
    """Replace the positions and attention of `model`, prove that it answers as before, and tell its KV's shape.

    `model` comes with the stock eager attention and is ours afterwards.
    Raises UnsupportedModel: no rotary positions, KV of several shapes, or logits that differ.
    """
    tokens = _check_tokens(vocabulary)
    device = next(model.parameters()).device
    stock = _stock_logits(model, tokens.to(device))
    rotary = detach_rotary(model, max_context)
    shape = _kv_shape(model, device)
    ours = DecoupledModel(model, rotary)
    try:
        found = _our_logits(ours, shape, tokens)
    except (RuntimeError, TypeError, AttributeError) as error:
        # KV of another shape than the configuration tells, or a module that does not call us as others do.
        raise UnsupportedModel(f"{type(model).__name__}: our forward fails on it: {error}") from error
    spread = float(stock.max() - stock.min())
    difference = float((stock - found).abs().max()) / max(spread, 1e-6)
    if not difference <= _TOLERANCE[shape.dtype]:  # also true for NaN
        raise UnsupportedModel(
            f"{type(model).__name__}: our forward differs from the stock one by {difference:.2g} of the logits' spread "
            f"(allowed {_TOLERANCE[shape.dtype]:.0e}); its attention does something that we would get wrong"
        )
    return CheckedModel(ours, shape, difference)


def _check_tokens(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (_TOKENS,), generator=generator)


@torch.inference_mode()
def _stock_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()
    return logits


def _our_logits(model: DecoupledModel, shape: KvShape, tokens: torch.Tensor) -> torch.Tensor:
    kv = WorkingKv(Buffers(shape, 0), _TOKENS)
    kv.begin(0, 0, _TOKENS)
    found = []
    for start, end in itertools.pairwise(_CUTS):
        if end == _TOKENS:
            kv = _through_the_store(model, shape, kv)
        segment = Segment(kv, tokens[start:end])
        found.append(model.forward([segment], all_logits=True))
        model.commit([segment])
    return torch.cat(found)


def _through_the_store(model: DecoupledModel, shape: KvShape, source: WorkingKv) -> WorkingKv:
    target = WorkingKv(Buffers(shape, 0), _TOKENS)
    target.begin(source.length, 0, _TOKENS)
    rotate = model.rotary.key_rotation(0, source.length, shape)
    for layer in range(shape.layers):
        raw = source.raw.span(layer, 0, source.length)
        rotate(raw, target.keys[layer, : source.length])
        target.values[layer, : source.length] = source.values[layer, : source.length]
        target.raw.span(layer, 0, source.length).copy_(raw)
    return target


def _kv_shape(model: Any, device: torch.device) -> KvShape:
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KvShape(config.num_hidden_layers, kv_heads, dim, dim, next(model.parameters()).dtype, device)
