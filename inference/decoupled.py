"""The forward pass over working KV: any transformers model, many jobs, keys without positions.

The model sees one flat row of tokens, the new tokens of all jobs of a step one after another. It is fooled about
positions (see rotary.py) and about attention: the function registered here takes its un-rotated queries and
keys, rotates them at each token's own position, writes the new KV into each job's working KV and attends over it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from inference.attention.decode import Decoding, takes
from inference.attention.dense import Masks, attend
from inference.attention.paged import PagedStep, Part, flash_for, through_block_table
from inference.decode_graphs import DecodeGraphs, DecodeStep, Record
from inference.decoder_layer import replace_decoder_layers
from inference.linear import replace_linears
from inference.paged_kv import PagedKv, Pages
from inference.rotary import Rotary, RotaryTable, StepRows
from inference.working_kv import Kv, OutOfKv, WorkingKv, new_context
from monitoring.logs import get_logger
from protocol.errors import InternalError

log = get_logger(__name__)

_names = itertools.count()
# A recorded step against the same one: how far their logits may be apart, as a part of their spread. Other numbers of
# jobs have other products; what goes wrong shows as 1.
_TOLERANCE = 0.1
_TRIAL_TOKENS = (300, 17, 256)  # of each job's context


@dataclass
class Segment:
    """The new tokens of one job in a step.

    wait_layer(l) is called before layer l reads KV that may still be on its way; it raises what went wrong.
    layer_done(l) is called when the KV of layer l is whole: history arrived, new tokens written.
    """

    kv: Kv
    token_ids: torch.Tensor  # [n] int64
    wait_layer: Callable[[int], None] | None = None
    layer_done: Callable[[int], None] | None = None
    past: int = field(init=False)

    def __post_init__(self) -> None:
        self.past = self.kv.length

    @property
    def total(self) -> int:
        """Tokens of the context when this step is done."""
        return self.past + len(self.token_ids)

    def arrive_at(self, layer: int) -> None:
        """The new tokens' KV of that layer is written: see to the rest of it."""
        if self.wait_layer is not None:
            self.wait_layer(layer)
        if self.layer_done is not None:
            self.layer_done(layer)


@dataclass
class _Step:
    segments: Sequence[Segment]
    bounds: list[tuple[int, int]]  # of each segment in the flat row
    rotary: Rotary
    positions: torch.Tensor  # of each token, [tokens] int64
    masks: Masks
    paged: PagedStep | None  # where working KV lies in pages
    decoding: Decoding | None  # the first segments, where they have one token each

    @functools.cached_property
    def rows(self) -> dict[RotaryTable, StepRows]:
        return self.rotary.at(self.positions)


class DecoupledModel:
    """A causal language model whose positions we own. One thread runs it."""

    def __init__(self, model: Any, rotary: Rotary) -> None:
        self._model = model
        self.rotary = rotary
        self.device = next(model.parameters()).device
        self._step: _Step | None = None
        self._recorded: DecodeGraphs | None = None
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
        row = torch.cat([s.token_ids for s in segments])
        try:
            if self._recorded is not None and not all_logits and all(map(_is_one_token, segments)):
                logits = self._recorded.step(row, _parts(segments))
                if logits is not None:
                    return logits.to(torch.float32, copy=True)  # the next step overwrites them
            positions = torch.cat([torch.arange(s.past, s.past + len(s.token_ids)) for s in segments]).to(self.device)
            wanted = torch.arange(end) if all_logits else torch.tensor([b[1] - 1 for b in bounds])
            step = _Step(segments, bounds, self.rotary, positions, Masks(), _paged(segments), _decoding(segments))
            return self._run(step, row.to(self.device), wanted.to(self.device)).float()
        finally:
            if self.device.type == "cuda":
                # Steps are measured; and what they read may be given to others when they are over.
                torch.cuda.current_stream(self.device).synchronize()

    def _run(self, step: _Step, token_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Logits of the wanted tokens.  # token_ids [tokens], wanted [n], int64 -> [n, vocabulary]"""
        self._step = step
        try:
            out = self._model(
                input_ids=token_ids.unsqueeze(0),
                # Not for rotation: some models scale queries by them.
                position_ids=step.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=wanted,
                return_dict=True,
            )
        finally:
            self._step = None
        logits: torch.Tensor = out.logits[0]
        return logits

    @torch.inference_mode()
    def record_decoding(self, pages: Pages, longest: int, sizes: Sequence[int], record: Record) -> bool:
        """Record decode steps for so many jobs, to take them so from now on. False: they are taken as before.

        longest: tokens of a context. Whether recordings answer as the model does is tried out.
        """
        if flash_for(pages.shape) is not through_block_table:
            return False

        def run(step: DecodeStep) -> torch.Tensor:
            token_ids, positions = step.tokens
            return self._run(_Step((), [], self.rotary, positions, Masks(), step.paged, None), token_ids, step.wanted)

        try:
            recorded = DecodeGraphs(pages, longest, sizes, run, record)
            difference = self._trial(recorded, pages, min(longest - 2, max(_TRIAL_TOKENS)), max(sizes))
        except (RuntimeError, InternalError, OutOfKv) as error:  # experts, gathered keys, no memory
            log.info("decode steps are not recorded", reason=str(error))
            return False
        if not difference <= _TOLERANCE:  # also true for NaN
            log.warning("recorded decode steps give wrong answers here", difference=difference)
            return False
        log.info("decode steps are recorded", jobs=sorted(sizes), difference=f"{difference:.1e}")
        self._recorded = recorded
        return True

    def _trial(self, recorded: DecodeGraphs, pages: Pages, longest: int, most: int) -> float:
        """How far `recorded` is from the model over two steps, of one job and of several."""
        lengths = [min(length, longest) for length in _TRIAL_TOKENS[:most]]
        by_way = []
        for way in (None, recorded):
            self._recorded = None
            kvs = [new_context(pages, length + 2, 0) for length in lengths]
            prompts = [Segment(kv, torch.arange(length) % 7) for kv, length in zip(kvs, lengths, strict=True)]
            self.forward(prompts)
            self.commit(prompts)
            self._recorded = way
            try:
                answers = []
                for kvs_of_step in (kvs, kvs[:1]):
                    segments = [Segment(kv, torch.tensor([index])) for index, kv in enumerate(kvs_of_step)]
                    answers.append(self.forward(segments))
                    self.commit(segments)
            finally:
                self._recorded = None
            by_way.append(torch.cat(answers))
        if recorded.steps < len(answers):
            raise InternalError("a step was not taken from its recording")
        stock, found = by_way
        return float(((found - stock).square().mean(1).sqrt() / stock.std(1).clamp(min=1e-6)).max())

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
        decoding = step.decoding if softcap is None and s_aux is None else None
        if decoding is not None and decoding.count == len(step.segments):
            turn = self.rotary.half_turn(layer, decoding.shape)
            if turn is not None:
                q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
                return decoding.attend(layer, q, k, v, k, scaling, sliding_window, turn).unsqueeze(0), None
        rotated_query, rotated_key = self.rotary.rotate(layer, query, key, step.rows)
        raw, rotated, values = key[0].transpose(0, 1), rotated_key[0].transpose(0, 1), value[0].transpose(0, 1)
        if step.paged is not None:
            step.paged.write(layer, rotated, values, raw)
            for segment in step.segments:
                segment.arrive_at(layer)
            found = step.paged.attend(layer, rotated_query[0], scaling, sliding_window, softcap, s_aux)
            return found.unsqueeze(0), None
        pieces, first = [], 0
        if decoding is not None:
            first = decoding.count
            by_token = rotated_query[0].transpose(0, 1)
            pieces.append(decoding.attend(layer, by_token, rotated, values, raw, scaling, sliding_window))
        for segment, (start, end) in zip(step.segments[first:], step.bounds[first:], strict=True):
            kv, total = segment.kv, segment.total
            assert isinstance(kv, WorkingKv), "one step, one kind of working KV"
            kv.write(layer, segment.past, rotated[start:end], values[start:end], raw[start:end])
            segment.arrive_at(layer)
            keys, seen_values = kv.seen(layer, segment.past, total)
            pieces.append(
                attend(
                    rotated_query[0, :, start:end],
                    keys,
                    seen_values,
                    step.masks,
                    scaling,
                    sliding_window,
                    softcap,
                    s_aux,
                )
            )
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return out.unsqueeze(0), None


def _decoding(segments: Sequence[Segment]) -> Decoding | None:
    found = [segment.kv for segment in itertools.takewhile(_is_decoding, segments) if isinstance(segment.kv, WorkingKv)]
    return Decoding(found) if found and takes(found[0].shape) else None


def _is_decoding(segment: Segment) -> bool:
    return _is_one_token(segment) and isinstance(segment.kv, WorkingKv)


def _is_one_token(segment: Segment) -> bool:
    """And nobody to wait for or to tell."""
    return len(segment.token_ids) == 1 and segment.wait_layer is None and segment.layer_done is None


def _parts(segments: Sequence[Segment]) -> list[Part]:
    return [Part(s.kv, s.past, len(s.token_ids)) for s in segments if isinstance(s.kv, PagedKv)]


def _paged(segments: Sequence[Segment]) -> PagedStep | None:
    parts = _parts(segments)
    return PagedStep(parts, flash_for(parts[0].kv.shape)) if parts else None
