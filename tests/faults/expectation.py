"""What a store may and must still have: a record of pending and confirmed saves, kept beside it by who made them.

    save asked ──▶ PENDING ──acknowledged, or found──▶ SAVED ──not found──▶ LOST
                      ▲───a process is killed soon after───┘
    erasure asked ──▶ DOUBTFUL ──receipt──▶ ERASED

What is PENDING, DOUBTFUL or LOST may be there or not; where it is there, its bytes are the ones saved. What was never
saved, or is ERASED, must not be there. What is SAVED for longer than a flush interval should be.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from enum import Enum
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Fate(Enum):
    PENDING = "pending"
    SAVED = "saved"
    LOST = "lost"
    DOUBTFUL = "doubtful"
    ERASED = "erased"


class Expectation(Generic[K]):
    """Of chunks or of manifests, by their ids."""

    def __init__(self) -> None:
        self._fates: dict[K, Fate] = {}
        self._saved_s: dict[K, float] = {}

    def saving(self, key: K) -> None:
        if self._fates.get(key) is not Fate.SAVED:
            self._fates[key] = Fate.PENDING

    def saved(self, key: K) -> None:
        # Saved again, it is as old as the first time, unless it was lost meanwhile.
        if self._fates[key] is Fate.PENDING:
            self._fates[key] = Fate.SAVED
            self._saved_s[key] = time.monotonic()

    def killed(self, due_s: float) -> None:
        """A process was killed: what was saved after due_s may be lost, whether or not anybody looks at once."""
        for key, fate in self._fates.items():
            if fate is Fate.SAVED and self._saved_s[key] > due_s:
                self._fates[key] = Fate.PENDING

    def erasing(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._fates[key] = Fate.DOUBTFUL

    def erased(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._fates[key] = Fate.ERASED

    def found(self, key: K) -> None:
        """The store has it."""
        fate = self._fates.get(key)
        assert fate is not None, f"{key!r} was never saved"
        assert fate is not Fate.ERASED, f"{key!r} was erased and is back"
        if fate is Fate.PENDING:
            self.saved(key)

    def missed(self, key: K) -> None:
        """The store has it no more."""
        if self._fates.get(key) is Fate.SAVED:
            self._fates[key] = Fate.LOST

    def with_fate(self, fate: Fate) -> list[K]:
        return [key for key, known in self._fates.items() if known is fate]

    def is_due(self, key: K, due_s: float) -> bool:
        """Whether it was saved by then, and should be there. due_s: of the monotonic clock."""
        return self._fates.get(key) is Fate.SAVED and self._saved_s[key] <= due_s
