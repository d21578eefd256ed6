"""When conversations come back: life tables, and what they say a run is worth per second kept.

After a turn has ended a conversation is *at risk* of going on. Ages are cut into bins that grow by half an octave; per
kind of conversation and bin it is counted how many reached the bin and how many returned in it, whether or not their
KV was still there. A kind with few observations leans on the kind above it.

The worth of keeping what has waited for so long is the Gittins index of that hazard: the best ratio, over all times to
hold on, of the chance that it returns to the time for which it is then held. It is the right rank for jobs that
compete for one resource and whose remaining time is random, and it does what neither LRU nor a fixed timeout does:
where people need half a minute to read, who left ten seconds ago is worth less than who left one minute ago.
"""

from __future__ import annotations

import bisect
import itertools

_FIRST_S = 0.5
BINS = 44  # the last one begins at 19 days
EDGES_S = (0.0, *(_FIRST_S * 2 ** (i / 2) for i in range(BINS - 1)))  # where each bin begins
_WIDTHS_S = (*(b - a for a, b in itertools.pairwise(EDGES_S)), EDGES_S[-1])

# Before anything is known, a conversation returns in each bin with this probability: the longer it is away the less
# is it worth per second, which is LRU.
_PRIOR_HAZARD = 0.06
_PRIOR_WEIGHT = 8.0  # observations
_STALE_GROWTH = 1.05  # the index is computed anew after so much more was seen


def bin_of(age_s: float) -> int:
    """The bin in which an age falls."""
    return max(0, bisect.bisect_right(EDGES_S, age_s) - 1)


class LifeTable:
    """Counts of one kind of conversation. `above`: the wider kind it belongs to."""

    def __init__(self, above: LifeTable | None = None) -> None:
        self.above = above
        self._reached = [0.0] * BINS
        self._returned = [0.0] * BINS
        self._seen = 0
        self._stale_at = 0.0
        self._hazards: list[float] = []
        self._index: list[float] = []

    def reached(self, age_bin: int) -> None:
        """A conversation of this kind has waited until this bin."""
        table: LifeTable | None = self
        while table is not None:
            table._reached[age_bin] += 1
            table._seen += 1
            table = table.above

    def returned(self, age_bin: int) -> None:
        """A conversation of this kind went on, in a bin that was reached."""
        table: LifeTable | None = self
        while table is not None:
            table._returned[age_bin] += 1
            table._seen += 1
            table = table.above

    def hazards(self) -> list[float]:
        """Per bin, the probability that who reached it returns in it. Computed anew after enough more was seen."""
        self._refresh()
        return self._hazards

    def index(self) -> list[float]:
        """Per bin, the worth of keeping who has reached it: returns per second held, at best."""
        self._refresh()
        return self._index

    def _refresh(self) -> None:
        if self._seen < self._stale_at:
            return
        prior = self.above.hazards() if self.above is not None else [_PRIOR_HAZARD] * BINS
        self._hazards = [
            (returned + _PRIOR_WEIGHT * p) / (reached + _PRIOR_WEIGHT)
            for returned, reached, p in zip(self._returned, self._reached, prior, strict=True)
        ]
        self._index = gittins_index(self._hazards)
        self._stale_at = max(self._seen + 32, self._seen * _STALE_GROWTH)


def gittins_index(hazards: list[float]) -> list[float]:
    """For each bin the largest, over all later ends, of P(return until then) / E[time until return or then]. 1/s."""
    index = []
    for begin in range(BINS):
        best, surviving, returned, held_s = 0.0, 1.0, 0.0, 0.0
        for hazard, width_s in zip(hazards[begin:], _WIDTHS_S[begin:], strict=True):
            now = surviving * hazard
            returned += now
            held_s += (surviving - now / 2) * width_s  # who returns does so in mid-bin
            surviving -= now
            best = max(best, returned / held_s)
            if surviving < 0.01:
                break
        index.append(best)
    return index
