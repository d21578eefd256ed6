"""Linear layers by oneDNN."""

from __future__ import annotations

import copy
import gc
import weakref

import psutil
import pytest
import torch
from torch import nn

from inference import linear
from inference.linear import OneDnnLinear, multiplies, replace_linears

pytestmark = pytest.mark.skipif(not multiplies(torch.empty(0)), reason="torch without oneDNN")


def _layers(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules).requires_grad_(False)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_the_stock_layer_to_rounding(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    """For one row, a few and many; and the weight can still be looked at, to the bit."""
    stock = nn.Linear(96, 200, bias=bias).to(dtype)
    exact = copy.deepcopy(stock).double()
    weight = stock.weight.clone()
    model = _layers(stock)
    replace_linears(model)
    assert isinstance(model[0], OneDnnLinear)
    assert torch.equal(model[0].weight, weight)
    for shape in ((1, 1, 96), (7, 96), (1, 300, 96), (0, 96)):
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(model(x).double(), exact(x.double()), atol=tolerance, rtol=tolerance)


def test_weights_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain weight goes before the next one is reordered: no more than one of them is in memory twice."""
    size_bytes, count = 32 * 1024 * 1024, 8
    model = _layers(*(nn.Linear(4096, size_bytes // 4096 // 4, bias=False) for _ in range(count)))
    weights = [weakref.ref(layer.weight) for layer in model]
    plain: list[int] = []

    def watched(layer: nn.Linear, *, keep_order: bool) -> OneDnnLinear:
        plain.append(sum(weight() is not None for weight in weights))
        return OneDnnLinear(layer, keep_order=keep_order)

    monkeypatch.setattr(linear, "OneDnnLinear", watched)
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    replace_linears(model)
    assert plain == list(range(count, 0, -1))
    assert all(weight() is None for weight in weights)
    assert process.memory_info().rss - before < 2 * size_bytes


def test_a_weight_that_others_read_stays_where_it_is() -> None:
    """Tied embeddings: the output layer reads the embedding's own memory."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied().requires_grad_(False)
    replace_linears(model)
    assert isinstance(model.head, OneDnnLinear)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    rows = torch.randn(3, 16)
    torch.testing.assert_close(model.head(rows), rows @ model.embedding.weight.T)


def test_what_is_not_a_plain_linear_layer_is_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    for module in (Doubled(8, 8), nn.Linear(8, 8).double(), nn.Bilinear(8, 8, 8)):
        model = _layers(module)
        replace_linears(model)
        assert model[0] is module
