"""The engine proves itself at load: the stock forward and ours, over the same tokens, must agree.

Ours runs in pieces, the last one over keys that went the way of the store: taken out un-rotated and rotated
again into other working KV. Sliding windows are made smaller than that prompt for the while. Whatever a model does
that we do not know of shows up here and stops the start.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inference.decoupled import DecoupledModel, Segment
from inference.paged_kv import FLASH_PAGE_TOKENS, Pages
from inference.probe import detach_rotary
from inference.rotary import Tabulated
from inference.working_kv import Buffers, Kv, KvPool, KvShape, new_context
from protocol.errors import UnsupportedModel

_TOKENS = 48
_WINDOW = 16
# Difference of a token's logits, as a part of their spread. float32: two orders above what summation order alone gives;
# bfloat16 keeps 8 bits of mantissa and many sums.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 1e-1, torch.float16: 2e-2}
_EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class CheckedModel:
    model: DecoupledModel
    shape: KvShape
    depends_on_length: bool  # rotary scaling is that of this longest context: KV of another one is of no use
    difference: float  # see `_difference`


def take_over(model: nn.Module, vocabulary: int, max_context: int, *, paged: bool = False) -> CheckedModel:
    """Replace the positions and attention of `model`, prove that it answers as before, and tell its KV's shape.

    `model` comes with the stock eager attention and is ours afterwards. paged: prove it with working KV in pages.
    Raises UnsupportedModel: no rotary positions, layers without KV or with KV of several shapes, positions that come
    in otherwise, or logits that differ.
    """
    tokens = _check_tokens(vocabulary)[:max_context].to(next(model.parameters()).device)
    with _small_windows(model):
        stock = _stock_logits(model, tokens)
    detached = detach_rotary(model, max_context, tokens[:8])
    shape = detached.shape
    with _small_windows(model):
        if detached.depends_on_length:
            # The stock forward goes by the length of this prompt. Ours goes by the longest context: so must it.
            for stand_in in detached.stand_ins:
                stand_in.answer = Tabulated.rows
            model.set_attn_implementation("eager")  # type: ignore[operator]
            stock = _stock_logits(model, tokens)
            for stand_in in detached.stand_ins:
                stand_in.answer = Tabulated.no_rotation
        ours = DecoupledModel(model, detached.rotary)
        try:
            found = _our_logits(ours, _pool(shape, paged), tokens)
        except (RuntimeError, TypeError, AttributeError) as error:
            # KV that changes its shape from step to step, or a module that does not call us as others do.
            raise UnsupportedModel(f"{type(model).__name__}: our forward fails on it: {error}") from error
    difference = _difference(stock, found, shape.dtype)
    if not difference <= _TOLERANCE[shape.dtype]:  # also true for NaN
        raise UnsupportedModel(
            f"{type(model).__name__}: our forward differs from the stock one by {difference:.2g} of the logits' spread "
            f"(allowed {_TOLERANCE[shape.dtype]:.0e}); its attention does something that we would get wrong"
        )
    return CheckedModel(ours, shape, detached.depends_on_length, difference)


@contextlib.contextmanager
def _small_windows(model: Any) -> Iterator[None]:
    """Make the sliding windows smaller than the prompt of the check, wherever the model keeps their size."""
    homes = [
        (home, home.sliding_window)
        for home in (model.config.get_text_config(), *model.modules())
        if isinstance(getattr(home, "sliding_window", None), int) and home.sliding_window > _WINDOW
    ]
    try:
        for home, _ in homes:
            home.sliding_window = _WINDOW
        yield
    finally:
        for home, window in homes:
            home.sliding_window = window


def _difference(stock: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> float:
    """How far apart the logits of the worst token are, as a part of their spread; in half precision of the median one.

    There a rounding may send a token to another expert, which changes it, and some behind it, altogether. What we would
    get wrong changes most tokens.  # stock, found: [tokens, vocabulary]
    """
    apart = (stock - found).square().mean(1).sqrt() / stock.std(1).clamp(min=1e-6)
    return float(apart.max() if dtype in _EXACT else apart.median())


def _check_tokens(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (_TOKENS,), generator=generator)


@torch.inference_mode()
def _stock_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()
    return logits


def _pool(shape: KvShape, paged: bool) -> KvPool:
    if not paged:
        return Buffers(shape, 0)
    # Two contexts of a page, with their un-rotated keys.
    return Pages(shape, FLASH_PAGE_TOKENS, 4 * FLASH_PAGE_TOKENS * shape.token_bytes)


def _our_logits(model: DecoupledModel, pool: KvPool, tokens: torch.Tensor) -> torch.Tensor:
    kv = new_context(pool, len(tokens), 0)
    found = []
    cut = len(tokens) * 3 // 5
    for start, end in itertools.pairwise((0, cut, cut + 1, len(tokens))):
        if end == len(tokens):
            kv = _through_the_store(model, pool, kv)
        segment = Segment(kv, tokens[start:end])
        found.append(model.forward([segment], all_logits=True))
        model.commit([segment])
    return torch.cat(found)


def _through_the_store(model: DecoupledModel, pool: KvPool, source: Kv) -> Kv:
    shape, length = source.shape, source.length
    target = new_context(pool, _TOKENS, 0, length)
    rotate = model.rotary.key_rotation(0, length, shape)
    for layer in range(shape.layers):
        raw = source.raw.span(layer, 0, length)
        rotate(layer, raw, target.keys_at(layer, 0, length))
        target.values_at(layer, 0, length).copy_(source.values_at(layer, 0, length))
        target.raw.span(layer, 0, length).copy_(raw)
    return target
