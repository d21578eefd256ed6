"""Linear layers on the CPU by oneDNN, with weights in the order that its kernels read.

torch multiplies float32 by MKL, which uses half the width of the vectors of other makers' processors, and reads
bfloat16 weights at half the rate of memory for a single row (docs/experiments.md). There is one copy of each weight:
the plain one goes when it has been reordered.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TypeGuard

import torch
from torch import nn

# The order that oneDNN chooses depends on how many rows it is told to expect. What it chooses for so many is as good
# as any for one row and for thousands; what it chooses for one row is half as fast for eight.
_ROWS = 64


class Weight:
    """The weight and bias of one linear layer, or of several that read the same input and answer side by side."""

    def __init__(self, *linears: nn.Linear, keep_order: bool = False) -> None:
        """keep_order: leave it as it is, for somebody else reads it too."""
        plain = [linear.weight.detach() for linear in linears]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        whole = torch.cat(plain) if len(plain) > 1 else plain[0]
        self._weight = whole if keep_order else torch.ops.mkldnn._reorder_linear_weight(whole, _ROWS)

    def plain(self) -> torch.Tensor:
        """In the usual order; if need be a copy.  # [out_features, in_features]"""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def product(self, x: torch.Tensor, then: str = "none") -> torch.Tensor:
        """x weight^T + bias, then its "swish" if wanted.  # [..., in_features] -> [..., out_features]"""
        return product(x, self._weight, self.bias, then)

    def product_with(self, then: str, other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x weight^T + bias, then "add" other or "mul" by it.  # [..., out_features], [..., in_features]"""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self.bias, then)
        return found


class OneDnnLinear(nn.Module):
    """Stands in for an nn.Linear; equal to rounding."""

    def __init__(self, linear: nn.Linear, *, keep_order: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = Weight(linear, keep_order=keep_order)

    @property
    def weight(self) -> torch.Tensor:
        return self._weight.plain()

    @property
    def bias(self) -> torch.Tensor | None:
        return self._weight.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._weight.product(x)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, then: str = "none"
) -> torch.Tensor:
    """x weight^T + bias.  # x [..., k], weight [n, k] contiguous or reordered -> [..., n]"""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, then, [], "")
    return found


def replace_linears(model: nn.Module) -> None:
    """Replace every linear layer of `model` that oneDNN takes. Other modules and devices are left alone."""
    # Nothing here may hold on to a layer: its weight is to go before the next one is reordered.
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    homes = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if is_for_onednn(child)
    ]
    for parent, name in homes:
        linear = getattr(parent, name)
        setattr(parent, name, OneDnnLinear(linear, keep_order=owners[id(linear.weight)] > 1))


def is_for_onednn(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that oneDNN multiplies here."""
    if type(module) is not nn.Linear:  # its subclasses do something besides
        return False
    return multiplies(module.weight) and (module.bias is None or module.bias.dtype == module.weight.dtype)


def multiplies(like: torch.Tensor) -> bool:
    """Whether oneDNN multiplies tensors of this kind on this machine."""
    return like.device.type == "cpu" and _multiplies(like.dtype)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
