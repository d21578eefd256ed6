"""Stored keys are rotated to the bit as the model rotates its own, by whichever way."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from inference.rotary import Rotary, RotaryTable
from inference.working_kv import KvShape

POSITIONS, HEADS = 300, 3


def made(family: str, dtype: torch.dtype, rotary_dim: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A family's own function, and tables as its rotary module makes them: halves repeated."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    frequencies = 1e4 ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    angles = torch.outer(torch.arange(POSITIONS).float(), frequencies).repeat(1, 2)
    if family == "gpt_oss":  # which repeats them in its function
        angles = angles[:, : rotary_dim // 2]
    return module.apply_rotary_pos_emb, angles.cos().to(dtype), angles.sin().to(dtype)


# llama turns halves; cohere turns neighbours; phi3 leaves part of a head as it is, phi does so in its attention module;
# gpt_oss has tables of half the width.
@pytest.mark.parametrize(
    ("family", "rotary_dim"), [("llama", 64), ("cohere", 64), ("phi3", 48), ("phi", 48), ("gpt_oss", 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_keys_are_rotated_as_the_model_does(family: str, rotary_dim: int, dtype: torch.dtype) -> None:
    apply, cos, sin = made(family, dtype, rotary_dim)
    table = RotaryTable(apply, cos, sin, rotary_dim)
    rotary = Rotary([None, table])
    shape = KvShape(1, HEADS, 64, 64, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for start, end in ((0, 256), (256, 300), (7, 8)):
        key = torch.randn(end - start, HEADS, 64, generator=generator).to(dtype)
        out = torch.full((end - start, HEADS, 64), torch.nan, dtype=dtype)
        heads_first = key.transpose(0, 1).unsqueeze(0)
        rows = table.at(torch.arange(start, end))
        expected = key.clone()
        turning = heads_first[..., :rotary_dim]
        expected[..., :rotary_dim] = apply(turning, turning, *rows[:2])[1][0].transpose(0, 1)
        rotation = rotary.key_rotation(start, end, shape)
        rotation(1, key, out)
        assert torch.equal(out, expected)
        assert torch.equal(table.rotate(heads_first, heads_first, rows)[1][0].transpose(0, 1), expected)
        rotation(0, key, out)  # a layer without positions
        assert torch.equal(out, key)


@pytest.mark.parametrize(("family", "turns_halves"), [("llama", True), ("cohere", False), ("gpt_oss", True)])
def test_how_a_model_rotates_is_found_by_trying(family: str, turns_halves: bool) -> None:
    assert RotaryTable(*made(family, torch.bfloat16, 64), dims=64)._turns_halves is turns_halves
