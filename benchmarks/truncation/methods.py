"""Ways of making a long text fit the window, behind one interface, in a model that reads it.

    CA     what is left keeps its KV, and its keys are rotated to where they stand now: what we do
    TT     the tokens are truncated, and what is left is computed again
    NKVT   what is left keeps its KV and its keys' old rotation: naive truncation of KV with positions in it

The fourth of the paper, OF, whose overflow throws the cache away, computes what TT computes; it differs in time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from inference.decoupled import DecoupledModel, Segment
from inference.model import LoadedModel
from inference.truncation import Window, plan_truncation, truncate
from inference.working_kv import Buffers, WorkingKv
from protocol.lineage import Truncation, kept_ranges, kept_tokens

_PIECE_TOKENS = 512
Ranges = Sequence[tuple[int, int]]  # of positions


@dataclass(frozen=True)
class Told:
    """What a model said of tokens before it saw them. Each [tokens]."""

    nats: torch.Tensor  # of surprise
    is_best: torch.Tensor  # whether greedy decoding would have said the same


class Reader:
    """Reads one text, piece by piece, as the turns of a conversation come."""

    def __init__(self, model: LoadedModel, window: Window, method: Method, head: int = 0) -> None:
        """head: so many tokens at the beginning stay."""
        self.model: DecoupledModel = model.checked.model
        self.truncations: tuple[Truncation, ...] = ()
        self.ids: list[int] = []
        self._window = window
        self._method = method
        self._head = head
        self._buffers = Buffers(model.checked.shape, 1 << 30)
        self._kv = self.empty()
        self._logits: torch.Tensor | None = None  # behind the last token  # [vocabulary]

    def empty(self) -> WorkingKv:
        kv = self._buffers.new(self._window.tokens)
        kv.begin(0, 0, self._window.tokens)
        return kv

    def left(self, length: int) -> list[int]:
        """Places in the text of what the context still holds."""
        return [place for start, end in kept_ranges(length, self.truncations) for place in range(start, end)]

    def read(self, ids: list[int]) -> Told:
        """Read a turn's tokens, and tell how they were expected. Raises ValueError: they do not fit."""
        before, length = len(self.ids), len(self.ids) + len(ids)
        dropped = plan_truncation(self._window, length, self.truncations, room=0, head=self._head, tail=before)
        if dropped is None:
            raise ValueError(f"a turn of {len(ids)} tokens does not fit the window of {self._window.tokens}")
        if dropped:
            positions = [
                (kept_tokens(start, self.truncations), kept_tokens(end, self.truncations)) for start, end in dropped
            ]
            kept, start = [], 0
            for first, last in [*positions, (self._kv.length, self._kv.length)]:
                if start < first:
                    kept.append((start, first))
                start = last
            places = self.left(before)
            self.truncations = truncate(self.truncations, dropped, before)
            left = [self.ids[place] for first, last in kept for place in places[first:last]]
            self._kv = self._method(self, self._kv, kept, left)
        self.ids += ids
        logits = self.compute(self._kv, ids)
        expected = logits[:-1] if self._logits is None else torch.cat([self._logits.unsqueeze(0), logits[:-1]])
        self._logits = logits[-1]
        said = torch.tensor(ids[len(ids) - len(expected) :])
        nats = torch.nn.functional.cross_entropy(expected, said, reduction="none")
        return Told(nats, expected.argmax(-1) == said)

    def compute(self, kv: WorkingKv, ids: list[int]) -> torch.Tensor:
        """Logits behind each token, whose KV joins kv.  # [tokens, vocabulary]"""
        found = []
        for start in range(0, len(ids), _PIECE_TOKENS):
            segments = [Segment(kv, torch.tensor(ids[start : start + _PIECE_TOKENS]))]
            found.append(self.model.forward(segments, all_logits=True))
            self.model.commit(segments)
        return torch.cat(found)


Method = Callable[[Reader, WorkingKv, Ranges, list[int]], WorkingKv]  # (reader, KV so far, what is left, its ids)


def keep(reader: Reader, old: WorkingKv, kept: Ranges, ids: list[int]) -> WorkingKv:
    return _slice(reader, old, kept, is_rotated_anew=True)


def naive(reader: Reader, old: WorkingKv, kept: Ranges, ids: list[int]) -> WorkingKv:
    return _slice(reader, old, kept, is_rotated_anew=False)


def recompute(reader: Reader, old: WorkingKv, kept: Ranges, ids: list[int]) -> WorkingKv:
    kv = reader.empty()
    reader.compute(kv, ids)
    return kv


METHODS: dict[str, Method] = {"CA": keep, "TT": recompute, "NKVT": naive}


@torch.inference_mode()
def _slice(reader: Reader, old: WorkingKv, kept: Ranges, *, is_rotated_anew: bool) -> WorkingKv:
    new = reader.empty()
    at = 0
    for start, end in kept:
        to = at + end - start
        new.values[:, at:to] = old.values[:, start:end]
        new.raw.keys[:, at:to] = old.raw.keys[:, start:end]
        new.keys[:, at:to] = old.keys[:, start:end]
        if is_rotated_anew:
            rotate = reader.model.rotary.key_rotation(at, to, old.shape)
            for layer in range(old.shape.layers):
                rotate(layer, old.raw.keys[layer, start:end], new.keys[layer, at:to])
        at = to
    new.length = at
    return new
