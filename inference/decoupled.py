"""The forward pass over working KV: any transformers model, many jobs, keys without positions.

The model sees one flat row of tokens, the new tokens of all jobs of a step one after another. It is fooled about
positions (see rotary.py) and about attention: the function registered here takes its un-rotated queries and
keys, rotates them at each token's own position, writes the new KV into each job's working KV and attends over it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from inference.attention.dense import Masks, attend
from inference.decoder_layer import replace_decoder_layers
from inference.linear import replace_linears
from inference.rotary import Rotary, RotaryTable, Rows
from inference.working_kv import WorkingKv
from protocol.errors import InternalError

_names = itertools.count()


@dataclass
class Segment:
    """The new tokens of one job in a step.

    wait_layer(l) is called before layer l reads KV that may still be on its way; it raises what went wrong.
    layer_done(l) is called when the KV of layer l is whole: history arrived, new tokens written.
    """

    kv: WorkingKv
    token_ids: torch.Tensor  # [n] int64
    wait_layer: Callable[[int], None] | None = None
    layer_done: Callable[[int], None] | None = None
    past: int = field(init=False)

    def __post_init__(self) -> None:
        self.past = self.kv.length


@dataclass
class _Step:
    segments: Sequence[Segment]
    bounds: list[tuple[int, int]]  # of each segment in the flat row
    rows: dict[RotaryTable, Rows]
    masks: Masks


class DecoupledModel:
    """A causal language model whose positions we own. One thread runs it."""

    def __init__(self, model: Any, rotary: Rotary) -> None:
        self._model = model
        self.rotary = rotary
        self.device = next(model.parameters()).device
        self._step: _Step | None = None
        replace_decoder_layers(model, self._attention)
        replace_linears(model)
        # A name of its own per instance: the registry of transformers is global, our step is not.
        name = f"cachedattention_{next(_names)}"
        AttentionInterface.register(name, self._attention)
        self._model.set_attn_implementation(name)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], *, all_logits: bool = False) -> torch.Tensor:
        """Run the segments' tokens. Writes their KV behind each `kv.length` and does not move it; see `commit`.

        Returns the logits of each segment's last token  # [len(segments), vocabulary] float32
        or of every token with all_logits  # [tokens, vocabulary] float32.
        Raises what a wait_layer raises; nothing is changed then that a second try would not overwrite.
        """
        bounds: list[tuple[int, int]] = []
        end = 0
        for segment in segments:
            start, end = end, end + len(segment.token_ids)
            segment.kv.ensure(segment.past + end - start)
            bounds.append((start, end))
        positions = torch.cat([torch.arange(s.past, s.past + len(s.token_ids)) for s in segments]).to(self.device)
        row = torch.cat([s.token_ids for s in segments]).to(self.device)
        wanted = torch.arange(end) if all_logits else torch.tensor([b[1] - 1 for b in bounds])
        self._step = _Step(segments, bounds, self.rotary.at(positions), Masks())
        try:
            out = self._model(
                input_ids=row.unsqueeze(0),
                # Not for rotation: some models scale queries by them.
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=wanted.to(self.device),
                return_dict=True,
            )
        finally:
            self._step = None
        return out.logits[0].float()

    @staticmethod
    def commit(segments: Sequence[Segment]) -> None:
        """Count the segments' tokens as part of their contexts."""
        for segment in segments:
            segment.kv.length = segment.past + len(segment.token_ids)

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,  # [1, heads, tokens, dim], not rotated
        key: torch.Tensor,  # [1, kv_heads, tokens, dim], not rotated
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        step = self._step
        if step is None:
            raise InternalError("attention called outside a step")
        layer: int = module.layer_idx
        rotated_query, rotated_key = self.rotary.rotate(layer, query, key, step.rows)
        raw, rotated, values = key[0].transpose(0, 1), rotated_key[0].transpose(0, 1), value[0].transpose(0, 1)
        pieces = []
        for segment, (start, end) in zip(step.segments, step.bounds, strict=True):
            kv, total = segment.kv, segment.past + end - start
            kv.write(layer, segment.past, rotated[start:end], values[start:end], raw[start:end])
            if segment.wait_layer is not None:
                segment.wait_layer(layer)
            if segment.layer_done is not None:
                segment.layer_done(layer)
            pieces.append(
                attend(
                    rotated_query[0, :, start:end],
                    kv.keys[layer, :total],
                    kv.values[layer, :total],
                    step.masks,
                    scaling,
                    sliding_window,
                    softcap,
                    s_aux,
                )
            )
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return out.unsqueeze(0), None
