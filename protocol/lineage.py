"""The lineage of contexts that outgrew the window: what is left of a transcript, and the ids of its chunks. Pure.

Keys are stored without positions, so a truncation drops chunks and renumbers the rest, whose KV stays as it is (the
paper's section 3.4). Everything here counts in tokens of the transcript, which nothing is ever dropped from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from protocol.fields import Count
from protocol.ids import ROOT, TokenArray, chunk_id, digest


class Truncation(NamedTuple):
    """Tokens start..end-1 are dropped, whole chunks: none from `at` on sees them. Those before may have; at >= end."""

    at: Count
    start: Count
    end: Count


def kept_ranges(length: int, truncations: Sequence[Truncation]) -> tuple[tuple[int, int], ...]:
    """What is left of a transcript of `length` tokens, oldest first. Positions count through these ranges."""
    kept: list[tuple[int, int]] = []
    start = 0
    for dropped_from, dropped_to in sorted((one.start, one.end) for one in truncations):
        if start < min(dropped_from, length):
            kept.append((start, min(dropped_from, length)))
        start = max(start, dropped_to)
    return (*kept, (start, length)) if start < length else tuple(kept)


def kept_tokens(length: int, truncations: Sequence[Truncation]) -> int:
    """How many tokens are left of a transcript of `length` tokens."""
    return sum(end - start for start, end in kept_ranges(length, truncations))


def place_of(position: int, length: int, truncations: Sequence[Truncation]) -> int:
    """Where the token at a position of the context stands in the transcript; behind the last one, its end."""
    for start, end in kept_ranges(length, truncations):
        if position < end - start:
            return start + position
        position -= end - start
    return length


class Lineage(NamedTuple):
    """Chunk ids, oldest first. The last one of a context may be partial.

    chunk_ids: of what is left. dropped_ids: of the rest. links: what a chunk's id is chained on, by its place in
    chunk_ids, where that is not the id before it.
    """

    chunk_ids: tuple[bytes, ...]
    dropped_ids: tuple[bytes, ...]
    links: dict[int, bytes]


def lineage_of(
    namespace: bytes, token_ids: TokenArray, chunk_tokens: int, truncations: Sequence[Truncation] = ()
) -> Lineage:
    """The ids of a transcript's chunks; without truncations, those of ids.lineage.

    An id covers all tokens before the chunk's end, dropped ones too, and every truncation before it. That is what the
    chunk's KV depends on; where its context stands by now is not part of it.
    """
    kept: list[bytes] = []
    dropped: list[bytes] = []
    links: dict[int, bytes] = {}
    parent = ROOT
    for start in range(0, len(token_ids), chunk_tokens):
        end = min(start + chunk_tokens, len(token_ids))
        for truncation in truncations:
            if start <= truncation.at < end:
                parent = digest("truncation", namespace, parent, *(one.to_bytes(8, "little") for one in truncation))
        link, parent = parent, chunk_id(namespace, parent, token_ids[start:end])
        if any(truncation.start <= start < truncation.end for truncation in truncations):
            dropped.append(parent)
            continue
        if link != (kept[-1] if kept else ROOT):
            links[len(kept)] = link
        kept.append(parent)
    return Lineage(tuple(kept), tuple(dropped), links)
