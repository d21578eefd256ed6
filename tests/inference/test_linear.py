"""Linear layers by oneDNN."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from inference import linear
from inference.linear import OneDnnLinear, multiplies, replace_linears
from inference.model import load_model
from tests.inference.harness import config_for, make_model

pytestmark = pytest.mark.skipif(not multiplies(torch.empty(0)), reason="torch without oneDNN")


def _layers(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules).requires_grad_(False)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "widened", "tolerance"),
    [(torch.float32, False, 2e-6), (torch.bfloat16, False, 2e-2), (torch.bfloat16, True, 2e-2)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_the_stock_layer_to_rounding(
    dtype: torch.dtype, widened: bool, tolerance: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one row, a few and many; and the weight can still be looked at, to the bit."""
    monkeypatch.setattr(linear, "widens", lambda: widened)
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


@torch.inference_mode()
@pytest.mark.parametrize("rows", [143, 144])
def test_many_rows_of_bfloat16_are_multiplied_in_float32_where_that_is_faster(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several weights side by side, and each end of a product: rounded once, from what float32 gives."""
    stock = _layers(nn.Linear(96, 72), nn.Linear(96, 56)).bfloat16()
    weight, bias = (torch.cat([getattr(layer, name).float() for layer in stock]) for name in ("weight", "bias"))
    x, other = torch.randn(rows, 96).bfloat16(), torch.randn(rows, 128).bfloat16()
    exact = nn.functional.linear(x.float(), weight, bias)
    monkeypatch.setattr(linear, "widens", lambda: True)
    given: list[torch.dtype] = []
    multiply = linear.product
    monkeypatch.setattr(linear, "product", lambda x, *rest: (given.append(x.dtype), multiply(x, *rest))[1])
    ours = linear.Weight(*stock)
    for found, expected in (
        (ours.product(x), exact),
        (ours.product(x, "swish"), nn.functional.silu(exact)),
        (ours.product_with("add", other, x), exact + other),
        (ours.product_with("mul", other, x), exact * other),
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=2**-8)
    assert given == 2 * [torch.float32 if rows >= 144 else torch.bfloat16]


@pytest.mark.parametrize(("wide_s", "plain_s", "widens"), [(0.6, 1.0, True), (0.9, 1.0, False), (2.0, 1.0, False)])
def test_what_is_faster_is_measured(
    wide_s: float, plain_s: float, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter((wide_s, plain_s))
    called: list[torch.Tensor] = []

    def shortest_s(call: Callable[[], torch.Tensor]) -> float:
        called.append(call())
        return next(seconds)

    monkeypatch.setattr(linear, "_shortest_s", shortest_s)
    assert linear.widens.__wrapped__() is widens
    assert called[0].dtype == called[1].dtype == torch.bfloat16


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_no_file_of_weights_stays_mapped(dtype: str, tied: bool, tmp_path: Path) -> None:
    """Nor in memory, then: weights that are served as they are saved were there twice."""
    directory = make_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    if dtype != "float32":
        AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).save_pretrained(directory)
    weights = str(directory / "model.safetensors")
    loaded = load_model(config_for(directory, tmp_path / "run", dtype=dtype))
    assert loaded.checked.shape.dtype is getattr(torch, dtype)
    gc.collect()
    assert all(mapped.path != weights for mapped in psutil.Process().memory_maps())


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
