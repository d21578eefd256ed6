"""Context overflow (the paper's section 3.4): which part of a context is dropped when it outgrows the window. Pure.

The oldest part goes, whole chunks of it, and always as much at a time: `ratio` of the window. So what is left depends
on how long the transcript is, and not on how it came to be so: turn by turn, all at once, or after an attempt that
died. All places are those of the transcript, from which nothing is ever dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.lineage import Truncation, kept_ranges, kept_tokens


@dataclass(frozen=True)
class Window:
    """What a context may grow to, and how it shrinks."""

    tokens: int
    chunk_tokens: int
    ratio: float = 0.5

    @property
    def step(self) -> int:
        """So many tokens go at a time, whole chunks."""
        return max(1, round(self.ratio * self.tokens / self.chunk_tokens)) * self.chunk_tokens

    def whole(self, tokens: int) -> int:
        """So many tokens or more, whole chunks."""
        return -(-tokens // self.chunk_tokens) * self.chunk_tokens


def plan_truncation(
    window: Window, length: int, truncations: Sequence[Truncation], *, room: int, head: int, tail: int
) -> tuple[tuple[int, int], ...] | None:
    """Ranges to drop so that what is left of `length` tokens, and `room` more, fit the window. None: they never do.

    head: so many tokens stay in front, rounded up to whole chunks. tail: the place from which on all stays.
    """
    excess = kept_tokens(length, truncations) + room - window.tokens
    if excess <= 0:
        return ()
    first, last = window.whole(head), tail // window.chunk_tokens * window.chunk_tokens
    wanted = -(-excess // window.step) * window.step
    ranges: list[tuple[int, int]] = []
    for start, end in kept_ranges(length, truncations):
        start = max(start, first)
        end = min(end, last, start + wanted)
        if start < end:
            ranges.append((start, end))
            wanted -= end - start
            excess -= end - start
    return tuple(ranges) if excess <= 0 else None


def truncate(
    truncations: Sequence[Truncation], ranges: Sequence[tuple[int, int]], computed: int
) -> tuple[Truncation, ...]:
    """Also drop `ranges`, now that the first `computed` tokens of the transcript have their KV."""
    return (*truncations, *(Truncation(max(computed, end), start, end) for start, end in ranges))


def recompute_from(truncations: Sequence[Truncation], place: int) -> tuple[Truncation, ...]:
    """The same context where all from `place` on is computed again, and does not see what is dropped by now."""
    return tuple(one._replace(at=min(one.at, max(place, one.end))) for one in truncations)
