"""Loading into pages: bytes go straight from the arena to their places, and a layer's keys are rotated there at once.

A piece at a time costs nothing but its copies, which is what a device's copy engine wants; rotating takes a few
operations for thousands of tokens instead of for each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from inference.paged_kv import PagedKv, Rows
from inference.rotary import KeyRotation, Rotary
from protocol.arena import Arena

if TYPE_CHECKING:
    from inference.preload import Span

_ROTATED_TOKENS = 4096  # at once


@dataclass(frozen=True)
class PagedPiece:
    """One chunk's way into its page: views of both ends, by layer."""

    span: Span
    layer_bytes: int
    copies: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]  # to, from

    def load(self, layer: int) -> None:
        """Keys arrive as they are stored; see PageRotation."""
        for target, source in self.copies:
            target[layer].copy_(source[layer], non_blocking=True)


@dataclass(frozen=True)
class _Part:
    start: int  # position
    end: int
    rows: Sequence[Rows]  # by strip
    rotate: KeyRotation


class PageRotation:
    """Rotates keys that have arrived in their pages to their positions."""

    def __init__(self, kv: PagedKv, start: int, end: int, rotary: Rotary) -> None:
        self._pages = kv.pages
        self._parts = []
        for first in range(start, end, _ROTATED_TOKENS):
            last = min(first + _ROTATED_TOKENS, end)
            rows, rotate = kv.rows(np.arange(first, last)), rotary.key_rotation(first, last, kv.shape)
            self._parts.append(_Part(first, last, rows, rotate))

    def rotate(self, layer: int, start: int) -> None:
        """All from position `start` on. Nothing before it is written."""
        strip, at = self._pages.places[layer]
        memory = self._pages.keys[at]
        for part in self._parts:
            if start < part.end:
                rows = part.rows[strip]
                keys = memory[rows]
                rotated = torch.empty_like(keys)
                part.rotate(layer, keys, rotated)
                skipped = max(0, start - part.start)
                memory[tuple(index[skipped:] for index in rows)] = rotated[skipped:]


def cut_pages(
    kv: PagedKv, arena: Arena, spans: Sequence[Span], rotary: Rotary
) -> tuple[list[PagedPiece], PageRotation | None]:
    """The pieces of a load, and what is to be done when all pieces of a layer have arrived."""
    shape, chunk_tokens = kv.shape, arena.geometry.chunk_tokens
    stored_keys, stored_values = (
        torch.from_numpy(stored).view(shape.dtype).unflatten(2, (chunk_tokens, shape.kv_heads, dim))
        for stored, dim in ((arena.keys, shape.key_dim), (arena.values, shape.value_dim))
    )
    pieces = []
    for span in spans:
        start, end, slot = span.start, span.end, span.ref.slot
        used, tail = end - start, max(start, kv.raw.base)
        copies: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = [
            (kv.by_layer(kv.pages.keys, start, end), stored_keys[slot, :, :used].unbind()),
            (kv.by_layer(kv.pages.values, start, end), stored_values[slot, :, :used].unbind()),
        ]
        if tail < end:  # of a chunk that will be saved again, longer: its raw keys
            copies.append((kv.raw.by_layer(tail, end), stored_keys[slot, :, tail - start : used].unbind()))
        pieces.append(PagedPiece(span, used * shape.token_bytes // shape.layers, copies))
    rotation = PageRotation(kv, spans[0].start, spans[-1].end, rotary) if spans else None
    return pieces, rotation
