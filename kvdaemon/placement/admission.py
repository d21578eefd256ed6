"""Admission to the SSD tier under a budget of written bytes: pure, the clock is an argument.

An SSD bears so many bytes written in its life. The budget is a bucket that fills evenly over the day, up to an hour's
worth. While it is at least half full, every chunk is admitted. Below that, only chunks that were used again since they
were saved; empty, none.

Why use decides: a written byte pays when it is read, and most conversations that end do so after their first turns. One
that has come back once comes back again more often than one that has not; its chunks are all used when it does, and are
then offered anew. Flash caches do the same and call it rejecting the first access (CacheLib). What is declined stays in
DRAM until it is evicted there.
"""

from __future__ import annotations

_DAY_S = 86_400.0
_BURST_S = 3_600.0
_LOW = 0.5


class WriteBudget:
    """Bytes that may be written. In any 24 hours they add up to no more than `bytes_per_day`, and one chunk."""

    def __init__(self, bytes_per_day: int, now_s: float) -> None:
        """Starts full: each start of a daemon grants an hour's worth. now_s: monotonic."""
        self._burst_bytes = bytes_per_day * _BURST_S / _DAY_S
        # A day that begins with a full bucket must add up too.
        self._bytes_per_s = (bytes_per_day - self._burst_bytes) / _DAY_S
        self._level_bytes = self._burst_bytes
        self._filled_s = now_s
        self._admitted_bytes = 0
        self._overhead_bytes = 0

    def admits(self, size_bytes: int, *, reused: bool, now_s: float) -> bool:
        """Whether a chunk of this size may be written; if so, it is paid for. reused: used since it was saved."""
        level = self.level_bytes(now_s)
        # The last chunk may be larger than what is left: what it overdraws is paid back before the next one.
        if level <= 0 or (level < self._burst_bytes * _LOW and not reused):
            return False
        self._admitted_bytes += size_bytes
        self._level_bytes -= size_bytes
        return True

    def wrote(self, total_bytes: int, now_s: float) -> None:
        """Pay for what was written beside the chunks: records, logs, files rewritten. total_bytes: all, ever since.

        Chunks are paid for when they are admitted and reach the disk later, so only a new maximum counts.
        """
        overhead = total_bytes - self._admitted_bytes
        if overhead > self._overhead_bytes:
            self._level_bytes = self.level_bytes(now_s) - (overhead - self._overhead_bytes)
            self._overhead_bytes = overhead

    def level_bytes(self, now_s: float) -> float:
        """What may be written now. Below 0: overdrawn."""
        filled = self._level_bytes + (now_s - self._filled_s) * self._bytes_per_s
        self._level_bytes, self._filled_s = min(self._burst_bytes, filled), now_s
        return self._level_bytes
