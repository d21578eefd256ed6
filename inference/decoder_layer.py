"""The decoder layer that most models share, in few operations.

    n = norm(x);  x = x + o(attention(q(n), k(n), v(n)))
    n = norm(x);  x = x + down(silu(gate(n)) * up(n))

Llama, Qwen, Mistral and many after them. For one token, transformers' own Python takes as long as the products. Here
queries, keys and values are one product, and the activation, the gate and the residuals are the ends of others. Names
do not prove that a layer is such a one: it is replaced if ours answers as it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from inference.kernels import NORM_BLOCK, norm_kernel, take_threads
from inference.linear import Weight, is_for_onednn, multiplies

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}

_PROBE = "cachedattention_probe"
_PROBE_SIZE = 0.01  # of the input: so small that what the layer adds to it is nearly all of its answer
# Largest difference of the answers, as a part of their spread: beyond rounding, below what any other layer gives.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}

_ROWS_PER_THREAD = 64  # fewer are done before another thread is awake

Attention = Callable[..., tuple[torch.Tensor, Any]]  # as transformers' AttentionInterface registers them


class DecoderLayer(nn.Module):
    """Stands in for such a layer."""

    def __init__(self, layer: Any, attention: Attention, scaling: float | None) -> None:
        super().__init__()
        own, mlp = layer.self_attn, layer.mlp
        self.layer_idx: int = own.layer_idx
        self.attention = attention
        self.attention_type = getattr(layer, "attention_type", None)  # some models choose the mask by it
        self._scaling, self._head_dim = scaling, own.head_dim
        self._heads = [linear.out_features // own.head_dim for linear in (own.q_proj, own.k_proj, own.v_proj)]
        self._input_norm, self._mlp_norm = RmsNorm(layer.input_layernorm), RmsNorm(layer.post_attention_layernorm)
        self._query_norm = RmsNorm(own.q_norm) if hasattr(own, "q_norm") else None
        self._key_norm = RmsNorm(own.k_norm) if hasattr(own, "k_norm") else None
        self._qkv, self._out = Weight(own.q_proj, own.k_proj, own.v_proj), Weight(own.o_proj)
        self._gate, self._up, self._down = Weight(mlp.gate_proj), Weight(mlp.up_proj), Weight(mlp.down_proj)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states [1, tokens, hidden]. What else a layer is given is for other kinds of attention."""
        x = hidden_states
        rows = self._qkv.product(self._input_norm(x)).unflatten(-1, (-1, self._head_dim))
        query, key, value = rows.split(self._heads, 2)
        if self._query_norm is not None:
            query = self._query_norm(query)
        if self._key_norm is not None:
            key = self._key_norm(key)
        found, _ = self.attention(
            self, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, scaling=self._scaling
        )
        x = self._out.product_with("add", x, found.flatten(2))
        n = self._mlp_norm(x)
        gated = self._up.product_with("mul", self._gate.product(n, "swish"), n)
        return self._down.product_with("add", x, gated)


class RmsNorm:
    """As Llama's, with its roundings: in bfloat16 their order shows."""

    def __init__(self, norm: Any) -> None:
        self._weight, self._epsilon = norm.weight.detach(), norm.variance_epsilon
        is_whole = len(self._weight) % NORM_BLOCK == 0 and self._weight.is_contiguous()
        self._kernel = norm_kernel(self._weight.itemsize) if is_whole and multiplies(self._weight) else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernel is not None and x.is_contiguous() and x.dtype == self._weight.dtype:
            out, length = torch.empty_like(x), len(self._weight)
            rows = x.numel() // length
            sizes = self._weight.itemsize, take_threads(1 + rows // _ROWS_PER_THREAD), rows, length
            self._kernel(*sizes, x.data_ptr(), self._weight.data_ptr(), out.data_ptr(), self._epsilon)
            return out
        exact = x.float()
        scale = exact.square().mean(-1, keepdim=True).add_(self._epsilon).rsqrt_()
        return (exact * scale).to(x.dtype).mul_(self._weight)


class _Probe:
    """Attention for a trial: takes down how each layer calls it, and answers with what shows all that it was given."""

    def __init__(self) -> None:
        self.scalings: dict[int, float | None] = {}  # by layer, where nothing but the scaling is asked for

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **asked: Any,
    ) -> tuple[torch.Tensor, None]:
        if all(asked.get(name) is None for name in ("sliding_window", "softcap", "s_aux")):
            self.scalings[module.layer_idx] = scaling
        group = query.shape[1] // key.shape[1]
        return (query + (key.flip(2) + 2 * value).repeat_interleave(group, 1)).transpose(1, 2), None


@torch.inference_mode()
def replace_decoder_layers(model: Any, attention: Attention) -> None:
    """Replace those layers of `model` that are such decoder layers. Its rotary modules must rotate by nothing.

    Leaves `model` with another attention implementation.
    """
    homes = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if _has_the_parts(child)
    ]
    if not homes:
        return
    given: dict[int, dict[str, Any]] = {}  # to each layer besides its input
    hooks = [
        getattr(parent, name).register_forward_pre_hook(
            lambda layer, _, kwargs: given.update({id(layer): kwargs}), with_kwargs=True
        )
        for parent, name in homes
    ]
    probe = _Probe()
    AttentionInterface.register(_PROBE, probe)
    model.set_attn_implementation(_PROBE)
    # Far apart, for some models treat tokens differently by how late they come.
    last = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096
    positions = torch.tensor([[0, 1, last // 4, last // 2, last - 1]])
    model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    for hook in hooks:
        hook.remove()
    # Nothing here may hold on to a layer: its weights are to go before those of the next one are reordered.
    for parent, name in homes:
        layer = getattr(parent, name)
        if id(layer) in given and layer.self_attn.layer_idx in probe.scalings:
            ours = DecoderLayer(layer, probe, probe.scalings[layer.self_attn.layer_idx])
            if _difference(layer, ours, given[id(layer)]) <= _TOLERANCE[layer.input_layernorm.weight.dtype]:
                ours.attention = attention
                setattr(parent, name, ours)


def _has_the_parts(module: nn.Module) -> bool:
    parts = dict(module.named_children())
    if set(parts) != _PARTS:
        return False
    own, mlp = (dict(parts[name].named_children()) for name in ("self_attn", "mlp"))
    if set(own) - _HEAD_NORMS != _ATTENTION_PARTS or set(mlp) != _MLP_PARTS:
        return False
    linears = [part for name, part in (own | mlp).items() if name.endswith("_proj")]
    norms = [part for name, part in (parts | own).items() if name.endswith("norm")]
    return (
        all(is_for_onednn(linear) for linear in linears)
        and len({own[name].bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and hasattr(parts["self_attn"], "head_dim")
    )


def _difference(stock: Any, ours: DecoderLayer, given: dict[str, Any]) -> float:
    weight = stock.input_layernorm.weight
    tokens = given["position_ids"].shape[1]
    x = torch.randn(1, tokens, len(weight), generator=torch.Generator().manual_seed(0)) * _PROBE_SIZE
    given = {name: value for name, value in given.items() if name != "hidden_states"}
    expected, found = (layer(x.to(weight.dtype), **given).float() for layer in (stock, ours))
    return float((found - expected).abs().max() / (expected.max() - expected.min()))
