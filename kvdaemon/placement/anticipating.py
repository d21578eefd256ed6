"""Our policy: the paper's look-ahead, and for conversations between turns the return times learned so far.

The paper knows nothing of a conversation until its next turn waits in the queue, and real queues are short. What is
known before is who speaks next, how often the conversation went on already and how fast, how much was just said, and
how long others took. Runs are ranked by what keeping them saves per second:

    Gittins index of the age, for who speaks next (return_times.py)     returns per second held
    x the conversation's own factor                                     it returns so much likelier than others
    x the share of the chunk that a return uses                         tokens saved per byte
    x how much longer a token takes to compute behind a long context    time saved per token

Somebody who said when the next turn comes is believed instead, until well after that time.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from kvdaemon.placement.policy import IsCurrent, Order, Rank, TurnEnd
from kvdaemon.placement.return_times import BINS, EDGES_S, LifeTable, bin_of
from kvdaemon.placement.runs import Run, Worth

_FACTOR_WEIGHT = 20.0  # returns that were expected before a factor counts half of what was seen
_FACTOR_RANGE = 8.0
_LEVELS = 4  # of worth, per octave
_LOOK_S = 0.25  # ages are looked at this often
_OBSERVED = 65_536  # conversations whose return is waited for
_HINT_TRUST = 0.8  # probability that somebody comes when they are expected
_OVERDUE_S = 60.0  # who is later than that is not expected any more

_FORKED = "forked"  # instead of who speaks next

_Feature = tuple[str, int]
_Bucket = tuple[str, int, int]  # who speaks next, level of worth, bin of the age


@dataclass(slots=True, eq=False)
class _Wait:
    """A conversation between turns, as the life tables see it."""

    ended_s: float
    speaker: str
    features: tuple[_Feature, ...]
    age_bin: int = 0
    is_over: bool = False


class _Factor:
    """How much likelier conversations with one feature return than all do: seen over expected, drawn to 1."""

    __slots__ = ("expected", "seen")

    def __init__(self) -> None:
        self.seen = self.expected = 0.0

    @property
    def value(self) -> float:
        return (self.seen + _FACTOR_WEIGHT) / (self.expected + _FACTOR_WEIGHT)


class Anticipating:
    """Scheduler-aware, and by expected return where nothing is scheduled.

    attention_chunks: the length of context at which attending to it takes as long as all else that a token needs.
    """

    looks_ahead = True

    def __init__(self, attention_chunks: float = 1024.0) -> None:
        self._attention_chunks = attention_chunks
        self._root = LifeTable()
        self._tables: dict[str, LifeTable] = {}
        self._factors: dict[_Feature, _Factor] = {}
        self._waits: dict[str, list[deque[_Wait]]] = {}  # who speaks next -> per bin, by the end of the turn
        self._waiting = 0
        self._partials_asked, self._partials_hit = 0, 0
        self._looked_s = -math.inf

    def heir(self) -> Anticipating:
        """A policy that knows what this one has learned, and of no conversation."""
        heir = Anticipating(self._attention_chunks)
        heir._root, heir._tables, heir._factors = self._root, self._tables, self._factors
        heir._partials_asked, heir._partials_hit = self._partials_asked, self._partials_hit
        return heir

    def new_order(self, is_current: IsCurrent) -> Order:
        return _WorthOrder(self, is_current)

    def turn_ended(self, end: TurnEnd, now_s: float) -> Rank:
        self.look(now_s)
        speaker, features = end.next_speaker, tuple(_features(end))
        cost = 1 + end.chunks / (2 * self._attention_chunks)
        partial_use = end.partial_share * (self._partials_hit + 1) / (self._partials_asked + 1)
        return self._wait(speaker, features, cost, cost * max(partial_use, 1e-3), now_s)

    def _wait(
        self, speaker: str, features: tuple[_Feature, ...], share: float, partial_share: float, now_s: float
    ) -> Rank:
        worth, partial_worth = Worth(speaker, features, share), Worth(speaker, features, partial_share)
        if self._waiting >= _OBSERVED:
            return Rank(None, worth, partial_worth)
        wait = _Wait(now_s, speaker, features)
        self._waits.setdefault(speaker, [deque() for _ in range(BINS)])[0].append(wait)
        self._waiting += 1
        self._reach(wait, 0)
        return Rank(wait, worth, partial_worth)

    def turn_returned(self, profile: object, now_s: float, *, partial_hit: bool | None) -> None:
        if partial_hit is not None:
            self._partials_asked += 1
            self._partials_hit += partial_hit
        if not isinstance(profile, _Wait) or profile.is_over:
            return
        profile.is_over = True
        self._waiting -= 1
        self._age(profile, now_s)
        self.table(profile.speaker).returned(profile.age_bin)
        for feature in profile.features:
            self._factors[feature].seen += 1

    def turn_forked(self, profile: object, now_s: float) -> Rank:
        """A kind of its own: mostly a context that was edited or summarized and never comes back, sometimes one of
        many that begin alike."""
        if not isinstance(profile, _Wait):
            return Rank()
        if not profile.is_over:  # neither returned nor known to stay away
            profile.is_over = True
            self._waiting -= 1
        return self._wait(_FORKED, profile.features, 1.0, 1.0, now_s)

    def worth(self, speaker: str, level: int, age_bin: int) -> float:
        """What keeping a conversation saves per second, after it waited until `age_bin`."""
        return float(self.table(speaker).index()[age_bin] * 2 ** (level / _LEVELS))

    def table(self, speaker: str) -> LifeTable:
        """The life table of those for whom `speaker` speaks next."""
        table = self._tables.get(speaker)
        if table is None:
            table = self._tables[speaker] = LifeTable(self._root)
        return table

    def look(self, now_s: float) -> None:
        """Count who has reached the next bins by now."""
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        for bins in self._waits.values():
            for age_bin in range(BINS - 2, -1, -1):
                waits = bins[age_bin]
                while waits and now_s - waits[0].ended_s >= EDGES_S[age_bin + 1]:
                    wait = waits.popleft()
                    if wait.is_over:
                        continue
                    self._age(wait, now_s)
                    if wait.age_bin < BINS - 1:
                        bins[wait.age_bin].append(wait)
                    else:
                        wait.is_over = True
                        self._waiting -= 1

    def level(self, worth: Worth) -> int:
        """Of the conversation's own worth, by what is known by now; two are equal that differ by a fifth at most."""
        return round(_LEVELS * math.log2(worth.share * self._factor(worth.features)))

    def _factor(self, features: tuple[_Feature, ...]) -> float:
        factor = math.prod(self._factors[f].value if f in self._factors else 1.0 for f in features)
        return min(_FACTOR_RANGE, max(1 / _FACTOR_RANGE, factor))

    def _age(self, wait: _Wait, now_s: float) -> None:
        for age_bin in range(wait.age_bin + 1, bin_of(now_s - wait.ended_s) + 1):
            self._reach(wait, age_bin)

    def _reach(self, wait: _Wait, age_bin: int) -> None:
        wait.age_bin = age_bin
        table = self.table(wait.speaker)
        table.reached(age_bin)
        hazard = table.hazards()[age_bin] * self._factor(wait.features)
        for feature in wait.features:  # what the others would let expect, this feature left out
            factor = self._factors.setdefault(feature, _Factor())
            factor.expected += hazard / factor.value


def _features(end: TurnEnd) -> Iterator[_Feature]:
    """What may tell a conversation that goes on from one that is over. Sizes by octave."""
    yield "answers", int(2 * math.log2(end.answers))
    yield "answer", end.answer_tokens.bit_length()
    yield "new", end.new_chunks.bit_length()
    yield "gap", -1 if end.gap_s is None else int(end.gap_s / 8).bit_length()


_Entry = tuple[float, int, int, Run]  # used_s, serial, stamp, run


class _WorthOrder:
    """Runs by worth. Those in one bucket are worth the same; of them the longest unused goes first."""

    def __init__(self, policy: Anticipating, is_current: IsCurrent) -> None:
        self._policy = policy
        self._is_current = is_current
        self._buckets: dict[_Bucket, list[_Entry]] = {}
        self._latest: list[_Entry] = []  # of those who are expected: minus when, ...
        self._overdue: list[_Entry] = []  # the same, by when they are overdue
        self._going: tuple[Run, int] | None = None  # it goes whole before another is looked for: measured better
        self._entries = 0
        self._clean_at = 1024

    def push(self, run: Run, stamp: int, now_s: float) -> None:
        self._entries += 1
        if run.expected_s is not None and run.expected_s + _OVERDUE_S > now_s:
            heapq.heappush(self._latest, (-run.expected_s, run.serial, stamp, run))
            heapq.heappush(self._overdue, (run.expected_s + _OVERDUE_S, run.serial, stamp, run))
        else:
            self._put((run.used_s, run.serial, stamp, run), now_s)
        if self._entries > self._clean_at:
            self._clean()

    def worst(self, now_s: float) -> Run | None:
        if self._going is not None and self._is_current(*self._going):
            return self._going[0]
        self._policy.look(now_s)
        self._end_expectations(now_s)
        chosen: tuple[float, float, Run, int] | None = None
        for bucket, heap in list(self._buckets.items()):
            self._advance(bucket, heap, now_s)  # perhaps into another bucket, perhaps a new one
        for bucket, heap in list(self._buckets.items()):
            if not heap:
                del self._buckets[bucket]
                continue
            used_s, _, stamp, run = heap[0]
            worth = self._policy.worth(*bucket)
            if chosen is None or (worth, used_s) < chosen[:2]:
                chosen = worth, used_s, run, stamp
        while self._latest and not self._is_current(self._latest[0][3], self._latest[0][2]):
            heapq.heappop(self._latest)
        if self._latest:
            minus_when_s, _, stamp, run = self._latest[0]
            worth = _HINT_TRUST / max(1.0, -minus_when_s - now_s)
            if chosen is None or worth < chosen[0]:
                chosen = worth, run.used_s, run, stamp
        self._going = None if chosen is None else chosen[2:]
        return None if chosen is None else chosen[2]

    def _put(self, entry: _Entry, now_s: float) -> None:
        worth = entry[3].worth
        bucket = worth.speaker, self._policy.level(worth), bin_of(now_s - entry[0])
        heapq.heappush(self._buckets.setdefault(bucket, []), entry)

    def _end_expectations(self, now_s: float) -> None:
        """Who did not come when expected is one of the others again."""
        while self._overdue and self._overdue[0][0] <= now_s:
            _, _, stamp, run = heapq.heappop(self._overdue)
            if self._is_current(run, stamp):
                self._latest = [entry for entry in self._latest if entry[3] is not run]
                heapq.heapify(self._latest)
                self._put((run.used_s, run.serial, stamp, run), now_s)

    def _advance(self, bucket: _Bucket, heap: list[_Entry], now_s: float) -> None:
        """Drop void entries at the head, and move on those that are older than the bin."""
        age_bin = bucket[2]
        is_last = age_bin == BINS - 1  # the superseded are there from the start, with no age
        while heap:
            used_s, _, stamp, run = heap[0]
            if not self._is_current(run, stamp):
                heapq.heappop(heap)
                self._entries -= 1
            elif not is_last and now_s - used_s >= EDGES_S[age_bin + 1]:
                self._put(heapq.heappop(heap), now_s)
            else:
                return

    def _clean(self) -> None:
        for bucket, heap in list(self._buckets.items()):
            heap[:] = [entry for entry in heap if self._is_current(entry[3], entry[2])]
            heapq.heapify(heap)
            if not heap:
                del self._buckets[bucket]
        for heap in (self._latest, self._overdue):
            heap[:] = [entry for entry in heap if self._is_current(entry[3], entry[2])]
            heapq.heapify(heap)
        self._entries = sum(map(len, self._buckets.values())) + len(self._latest)
        self._clean_at = max(1024, 2 * self._entries)
