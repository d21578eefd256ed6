"""What a placement policy decides, from what, as plain values.

A policy sees chunks as `Candidate`s in order of last use and answers with chunk ids. It changes nothing and asks
nobody: the store executes a plan and records what came of it. First-in-first-out or scheduler-aware placement is
another class with these three methods (Paper: section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """A chunk as a policy sees it.

    leased: somebody reads it, or it is on its way in or out; it must stay. dirty: it exists in DRAM only.
    """

    chunk_id: bytes
    size_bytes: int
    leased: bool = False
    dirty: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring `chunk_id` from SSD into DRAM; `victim`, where there is one, leaves its slot for it."""

    chunk_id: bytes
    victim: bytes | None = None


class Placement(Protocol):
    def plan_dram_eviction(
        self, resident: Iterable[Candidate], need: int, protected: AbstractSet[bytes], *, dirty_too: bool = False
    ) -> list[bytes]:
        """Which chunks leave DRAM, best victim first: `need` of them, or fewer where there are not so many.

        resident: coldest first; read only as far as needed. protected: chunks that must stay though unleased.
        dirty_too: dirty chunks may go as well, after all clean ones.
        """
        ...

    def plan_ssd_eviction(self, stored: Iterable[Candidate], need_bytes: int) -> list[bytes]:
        """Which chunks leave the SSD, best victim first, until they add up to need_bytes or nothing is left.

        stored: coldest first.
        """
        ...

    def plan_prefetch(
        self,
        jobs: Sequence[Sequence[bytes]],
        on_ssd_only: AbstractSet[bytes],
        resident: Iterable[Candidate],
        free_slots: int,
        limit: int,
    ) -> list[Fetch]:
        """Which chunks of the waiting jobs to fetch now, for the head of the queue first, at most `limit`.

        jobs: the chunk ids of each waiting job, head first. resident: coldest first.
        """
        ...
