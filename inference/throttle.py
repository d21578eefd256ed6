"""A link slowed down on purpose (`--link-bandwidth`), so that measurements can show any ratio of load to compute."""

from __future__ import annotations

# What threads that wait for the link oversleep is made good by what follows; a pause longer than that is not.
_BURST_S = 0.01


class Throttle:
    """One direction of the link. For one thread, which asks before it copies and never sleeps here."""

    def __init__(self, bytes_per_s: int) -> None:
        """bytes_per_s: 0 for no limit."""
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    def busy_s(self, now_s: float) -> float:
        """For how long the transfers so far go on."""
        return max(0.0, self._free_s - now_s) if self._bytes_per_s else 0.0

    def transfer(self, nbytes: int, now_s: float) -> None:
        """Count a transfer that begins now, or when the last one is through."""
        if self._bytes_per_s:
            self._free_s = max(self._free_s, now_s - _BURST_S) + nbytes / self._bytes_per_s
