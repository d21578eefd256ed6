"""Layers by how far back they see, and what working KV keeps for each kind. Pure.

Layers with the same sliding window form a group (vLLM's KV cache group). All layers of a group keep the same tokens:
those that the next one sees, whole chunks of them, and what somebody still copies. A model whose layers all see
everything is one group that keeps everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

GRAIN_TOKENS = 256  # the smallest buffer
_NEVER = 1 << 62


@dataclass(frozen=True)
class LayerGroup:
    window: int | None  # how many tokens, itself included, a token sees; None: all before it
    layers: tuple[int, ...]

    def hidden_before(self, position: int) -> int:
        """How many leading tokens the one at `position` does not see, nor do those behind it."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def kept_from(self, position: int, chunk_tokens: int) -> int:
        """The first token of those that what comes from `position` on needs: the beginning of a chunk."""
        return self.hidden_before(position) // chunk_tokens * chunk_tokens

    def whole_from(self, first: int) -> int:
        """The first position that sees nothing before `first`."""
        return 0 if self.window is None or first == 0 else first + self.window - 1

    def settled_tokens(self, chunk_tokens: int) -> int:
        """Room in which a context of any length can go on: when it is full, an eighth of it or more is let go."""
        # Kept is the window, from the beginning of a chunk on, and a chunk more; see held_from.
        return _NEVER if self.window is None else self.window + 2 * chunk_tokens + max(chunk_tokens, self.window // 8)

    def size_for(self, tokens: int, chunk_tokens: int) -> int:
        """Tokens in a buffer for that many: a size of round_up's, or the one in which the window slides."""
        size, settled = round_up(tokens), self.settled_tokens(chunk_tokens)
        return settled if tokens <= settled < size else size


@dataclass(eq=False)
class Hold:
    """Somebody reads or writes working KV from position `start` on, and moves that on as it goes. None of it goes."""

    start: int

    @property
    def is_released(self) -> bool:
        return self.start == _NEVER

    def release(self) -> None:
        self.start = _NEVER


class Holds:
    """Those on one context. Whoever iterates sees them as they were then, whatever another thread adds."""

    def __init__(self) -> None:
        self._held: list[Hold] = []

    def __iter__(self) -> Iterator[Hold]:
        return iter(self._held)

    def add(self, start: int) -> Hold:
        added = Hold(start)
        self._held = [*(hold for hold in self._held if not hold.is_released), added]
        return added


def held_from(group: LayerGroup, length: int, holds: Iterable[Hold], chunk_tokens: int) -> int:
    """The first token that a context of `length` tokens keeps. A chunk more than it needs, so that what branches off
    a little before its end finds what it sees."""
    kept = group.kept_from(max(0, length - chunk_tokens), chunk_tokens)
    return min([kept, *(hold.start for hold in holds)]) // chunk_tokens * chunk_tokens


def unsaved_from(length: int, holds: Iterable[Hold], chunk_tokens: int) -> int:
    """The first token whose un-rotated key may still be wanted: that of the last, partial chunk, or of what is held."""
    return min([length, *(hold.start for hold in holds)]) // chunk_tokens * chunk_tokens


def layer_groups(layers: int, windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """windows: by layer; empty: none has one."""
    by_window: dict[int | None, list[int]] = {}
    for layer in range(layers):
        by_window.setdefault(windows[layer] if windows else None, []).append(layer)
    return tuple(LayerGroup(window, tuple(own)) for window, own in by_window.items())


def places_of(groups: Sequence[LayerGroup]) -> tuple[tuple[int, int], ...]:
    """By layer: its group, and which layer of the group it is."""
    found = {layer: (number, at) for number, group in enumerate(groups) for at, layer in enumerate(group.layers)}
    return tuple(found[layer] for layer in range(len(found)))


def round_up(tokens: int) -> int:
    """The next size of 256 times 1, 1.5, 2, 3, 4, 6, 8 ...: few sizes, so that a growing context finds spare memory."""
    size = GRAIN_TOKENS
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
