"""Decoder layers in few operations: which are replaced, and that the answer stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from inference.decoder_layer import DecoderLayer, RmsNorm
from inference.decoupled import Segment
from inference.linear import multiplies
from inference.selfcheck import CheckedModel, take_over
from inference.working_kv import Buffers, WorkingKv

pytestmark = pytest.mark.skipif(not multiplies(torch.empty(0)), reason="torch without oneDNN")

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _model(family: str, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**_SIZES | values)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # as they are made, ones and zeros hide mistakes
            parameter.add_(torch.randn_like(parameter) / 10)
    return model.to(dtype)


def _logits(checked: CheckedModel, row: torch.Tensor) -> torch.Tensor:
    kv = WorkingKv(Buffers(checked.shape, 0), len(row))
    kv.begin(0, 0, len(row))
    return checked.model.forward([Segment(kv, row)], all_logits=True)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Mistral", {"sliding_window": None}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_layers_of_the_common_kind_are_replaced_and_answer_as_before(
    family: str, values: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    row = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(1))
    model = _model(family, dtype, **values)
    with torch.inference_mode():
        expected = model(input_ids=row.unsqueeze(0)).logits[0].float()
    checked = take_over(model, 300, 512)
    assert all(isinstance(layer, DecoderLayer) for layer in model.model.layers)
    difference = (_logits(checked, row) - expected).abs().max()
    assert difference <= tolerance * (expected.max() - expected.min())


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("Llama", {"hidden_act": "gelu"}),
        ("Granite", {"residual_multiplier": 0.9}),
        ("Mistral", {"sliding_window": 64}),  # which a layer has to tell attention
        ("Olmo2", {}),
        ("Gemma", {"head_dim": 16}),
    ],
)
def test_other_layers_are_left_alone(family: str, values: dict[str, Any]) -> None:
    """Some differ in what they are made of, some in what they do with the same parts."""
    model = _model(family, **values)
    take_over(model, 300, 512)
    assert not any(isinstance(layer, DecoderLayer) for layer in model.model.layers)
    assert next(model.parameters()).dtype == torch.float32


def test_layers_that_treat_late_tokens_differently_are_left_alone() -> None:
    """The same parts, and the same answer up to some position: queries grow after it."""
    model = _model("Llama")
    attention = type(model.model.layers[0].self_attn)

    class Growing(attention):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
            assert position_ids is not None
            late = 1 + (position_ids >= 100).to(hidden_states.dtype).unsqueeze(-1)
            with self.q_proj.register_forward_hook(lambda module, inputs, queries: queries * late):
                return super().forward(hidden_states, position_ids=position_ids, **kwargs)

    for layer in model.model.layers:
        layer.self_attn.__class__ = Growing
    take_over(model, 300, 512)
    assert not any(isinstance(layer, DecoderLayer) for layer in model.model.layers)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "length"), [(1, 768), (7, 48), (64, 128), (65, 128), (513, 128), (3, 40)])
def test_norms_are_those_of_the_model(rows: int, length: int, dtype: torch.dtype) -> None:
    """Of few rows and of many, of lengths that the kernel takes and that it does not; NaN stays in its row."""
    torch.manual_seed(length)
    norm = LlamaRMSNorm(length, eps=1e-5).to(dtype)
    norm.weight.normal_()
    x = (torch.randn(1, rows, length) * torch.logspace(-4, 4, rows).view(-1, 1)).to(dtype)
    expected, found = norm(x).float(), RmsNorm(norm)(x)
    assert found.dtype == dtype
    # The mean may differ in its last bit, which a rounding to bfloat16 then shows as one of its own.
    torch.testing.assert_close(found.float(), expected, rtol=1e-6 if dtype == torch.float32 else 1 / 127, atol=0)
    if dtype == torch.bfloat16:
        assert (found.float() == expected).float().mean() > 0.995
    x[0, 0, 5] = torch.nan
    found = RmsNorm(norm)(x)
    assert found[0, 0].isnan().all()
    assert found[0, 1:].isfinite().all()
