"""Least recently used, with a prefetch that never takes from a job to give to one behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice

from kvdaemon.placement.policy import Candidate, Fetch


class LeastRecentlyUsed:
    """The coldest chunk goes first, in both tiers. Stateless."""

    def plan_dram_eviction(
        self, resident: Iterable[Candidate], need: int, protected: AbstractSet[bytes], *, dirty_too: bool = False
    ) -> list[bytes]:
        if need < 1:
            return []
        clean: list[bytes] = []
        dirty: list[bytes] = []
        for chunk in resident:
            if chunk.leased or chunk.chunk_id in protected:
                continue
            (dirty if chunk.dirty else clean).append(chunk.chunk_id)
            if len(clean) == need:
                break
        return (clean + dirty)[:need] if dirty_too else clean

    def plan_ssd_eviction(self, stored: Iterable[Candidate], need_bytes: int) -> list[bytes]:
        victims: list[bytes] = []
        for chunk in stored:
            if need_bytes <= 0:
                break
            if not chunk.leased:
                victims.append(chunk.chunk_id)
                need_bytes -= chunk.size_bytes
        return victims

    def plan_prefetch(
        self,
        jobs: Sequence[Sequence[bytes]],
        on_ssd_only: AbstractSet[bytes],
        resident: Iterable[Candidate],
        free_slots: int,
        limit: int,
    ) -> list[Fetch]:
        """Victims: chunks that no waiting job wants, coldest first; then those of jobs behind, the last job's first."""
        first_job: dict[bytes, int] = {}
        for position, chunk_ids in enumerate(jobs):
            for chunk_id in chunk_ids:
                first_job.setdefault(chunk_id, position)
        evictable = [chunk.chunk_id for chunk in resident if not chunk.leased and not chunk.dirty]
        unwanted = [chunk_id for chunk_id in evictable if chunk_id not in first_job]
        wanted_later = sorted(
            (chunk_id for chunk_id in evictable if chunk_id in first_job), key=lambda c: first_job[c], reverse=True
        )
        victims = iter([*unwanted, *wanted_later])
        plan: list[Fetch] = []
        wanted = (chunk_id for chunk_id in first_job if chunk_id in on_ssd_only)  # in queue order, by insertion
        for chunk_id in islice(wanted, limit):
            if free_slots > 0:
                free_slots -= 1
                plan.append(Fetch(chunk_id))
                continue
            victim = next(victims, None)
            if victim is None or first_job.get(victim, len(jobs)) <= first_job[chunk_id]:
                break  # whatever is left is wanted sooner, and so is everything after it
            plan.append(Fetch(chunk_id, victim))
        return plan
