"""Linear layers on the CPU by oneDNN, with weights in the order that its kernels read.

torch multiplies float32 by MKL, which uses half the width of the vectors of other makers' processors, and reads
bfloat16 weights at half the rate of memory for a single row (docs/experiments.md). There is one copy of each weight:
the plain one goes when it has been reordered.

Some processors multiply bfloat16 at half their rate of float32. There, a weight is widened for each product of many
rows: bfloat16's products are exact in float32, and are summed in it either way.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import nn

from monitoring.logs import get_logger

log = get_logger(__name__)

# The order that oneDNN chooses depends on how many rows it is told to expect. What it chooses for so many is as good
# as any for one row and for thousands; what it chooses for one row is half as fast for eight.
_ROWS = 64

_WIDE_ROWS = 144  # with fewer of them, widening a weight takes as long as it saves
_WIDE_GAIN = 0.85  # of bfloat16's time, with four times as many; processors have 0.7 or more than 1


class Weight:
    """The weight and bias of one linear layer, or of several that read the same input and answer side by side."""

    def __init__(self, *linears: nn.Linear, keep_order: bool = False) -> None:
        """keep_order: leave it as it is, for somebody else reads it too."""
        plain = [linear.weight.detach() for linear in linears]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        whole = torch.cat(plain) if len(plain) > 1 else plain[0]
        self._weight = whole if keep_order else torch.ops.mkldnn._reorder_linear_weight(whole, _ROWS)

        self._is_widened = self._weight.dtype == torch.bfloat16 and widens()

    def plain(self) -> torch.Tensor:
        """In the usual order; if need be a copy.  # [out_features, in_features]"""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def product(self, x: torch.Tensor, then: str = "none") -> torch.Tensor:
        """x weight^T + bias, then its "swish" if wanted.  # [..., in_features] -> [..., out_features]"""
        if self._is_widened_for(x):
            return product(x.float(), *self._wide(), then).to(x.dtype)
        return product(x, self._weight, self.bias, then)

    def product_with(self, then: str, other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x weight^T + bias, then "add" other or "mul" by it.  # [..., out_features], [..., in_features]"""
        combined = torch.ops.mkldnn._linear_pointwise.binary
        found: torch.Tensor
        if self._is_widened_for(x):
            found = combined(x.float(), other.float(), *self._wide(), then).to(x.dtype)
        else:
            found = combined(x, other, self._weight, self.bias, then)
        return found

    def _is_widened_for(self, x: torch.Tensor) -> bool:
        return self._is_widened and x.shape[:-1].numel() >= _WIDE_ROWS

    def _wide(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        # By one pass of oneDNN, where there would be two by way of the plain weight.
        weight = self._weight.to_dense(dtype=torch.float32) if self._weight.is_mkldnn else self._weight.float()
        return weight, None if self.bias is None else self.bias.float()


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
    owners = _owners(model)
    homes = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if is_for_onednn(child)
    ]
    for parent, name in homes:
        linear = getattr(parent, name)
        setattr(parent, name, OneDnnLinear(linear, keep_order=owners[id(linear.weight)] > 1))


@torch.no_grad()
def take_out_of_files(model: nn.Module) -> None:
    """Give memory of its own to all that `replace_linears` will not reorder.

    Weights in the format that they are served in are loaded as views of mapped files. As long as one of them is, all
    of the file stays mapped, and in memory, beside the reordered weights.
    """
    owners = _owners(model)
    linears = [module for module in model.modules() if is_for_onednn(module)]
    reordered = {id(linear.weight) for linear in linears if owners[id(linear.weight)] == 1}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if id(tensor) not in reordered and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by id: tied ones have several."""
    return Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))


def is_for_onednn(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that oneDNN multiplies here."""
    if type(module) is not nn.Linear:  # its subclasses do something besides
        return False
    return multiplies(module.weight) and (module.bias is None or module.bias.dtype == module.weight.dtype)


@functools.cache
def widens() -> bool:
    """Whether this machine multiplies many rows of bfloat16 sooner in float32, widening included.

    Measured once, in a tenth of a second.
    """
    rows, size = 4 * _WIDE_ROWS, 1024
    x, plain = (torch.zeros(n, size, dtype=torch.bfloat16) for n in (rows, size))
    weight = torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)
    wide_s = _shortest_s(lambda: product(x.float(), weight.to_dense(dtype=torch.float32)).to(x.dtype))
    as_it_is_s = _shortest_s(lambda: product(x, weight))
    is_faster = wide_s <= _WIDE_GAIN * as_it_is_s
    log.info("products of many rows", computed_in="float32" if is_faster else "bfloat16", widened=wide_s / as_it_is_s)
    return is_faster


def _shortest_s(call: Callable[[], object], times: int = 6) -> float:
    def once() -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    return min(once() for _ in range(times))


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
