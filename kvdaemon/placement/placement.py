"""Placement: which chunk leaves a tier next, and which comes up for a waiting turn. Pure; the daemon and the simulator
tell it the same events and get the same decisions.

What is told (`used`, `turn_ended`, `added`, `removed`, `hold`, `wait` ...) changes the books here and nothing else;
what is asked (`next_victim`, `next_fetch`) changes nothing. The caller carries a decision out and tells that it did.

Paper: section 3.3. The unit of worth is the conversation, as there; we move it by chunks, from its tail, so that what
is left of it still is a prefix that hits.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from kvdaemon.placement.lru import HeapOrder
from kvdaemon.placement.policy import Order, Policy, TurnEnd
from kvdaemon.placement.runs import SUPERSEDED_S, ChunkId, Node, Run, RunTree, Tier

_RESERVE = 1 / 16  # of DRAM: not fetched into, so that what turns save pushes out nothing that was
_GHOSTS = 65_536  # conversations remembered after their last chunk went


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring `chunk_id` from SSD into DRAM; `victim`, where there is one, leaves its slot for it."""

    chunk_id: ChunkId
    victim: ChunkId | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """A waiting turn."""

    ticket: int
    chain: Sequence[ChunkId]
    runs: list[Run] = field(default_factory=list)  # that know of it
    is_inside: bool = False  # the eviction window
    is_stored: bool = False  # any of its context was, when the window reached it
    fetched: int = 0  # leading chunks that need no fetch, as far as was looked


@dataclass(slots=True)
class _Ghost:
    """A conversation without chunks: what Run says of its last turn."""

    end: ChunkId
    answers: int
    ended_s: float | None
    gap_s: float | None
    profile: object


class Placement:
    """One per store. Not safe for threads."""

    def __init__(self, policy: Policy, capacity: dict[Tier, int]) -> None:
        """capacity: chunks that fit into each tier, for the windows."""
        self.tree = RunTree()
        self.capacity = capacity
        self._policy = policy
        self._tiers: dict[str, Tier] = {"dram": "dram", "unsaved": "dram", "ssd": "ssd"}
        self._between: dict[str, Order] = {
            listing: policy.new_order(self._currency(listing)) for listing in self._tiers
        }
        # Runs that waiting turns need, who comes last first.
        self._wanted = {
            listing: HeapOrder(self._currency(f"{listing} wanted"), lambda run: -next(iter(run.jobs)))
            for listing in self._tiers
        }
        self._jobs: dict[int, _Job] = {}
        self._tickets: list[int] = []  # of waiting turns, sorted
        self._inside = 0  # of them, how many the eviction window reaches
        self._inside_stored = 0  # and of those, how many had anything stored
        self._ghosts: OrderedDict[ChunkId, _Ghost] = OrderedDict()
        self._now_s = 0.0

    # -- what happens ---------------------------------------------------------------------------------------

    def used(self, chain: Sequence[ChunkId], now_s: float) -> None:
        """A turn begins whose context is `chain`, oldest chunk first; chunks after the known ones may be new."""
        self._now_s = now_s
        run = self.tree.deepest(chain)
        before = self._returned(run, chain, now_s)
        if before is None and run is not None and run.end is not None and run.ended_s is not None:
            self._fork(run, run.ended_s, chain, now_s)
        if run is not None:
            self._touch(run, now_s)

    def turn_ended(self, chain: Sequence[ChunkId], whole: int, end: TurnEnd, now_s: float) -> None:
        """A turn ended and left `chain` behind, whose first `whole` chunks are full ones: all, or all but the last."""
        self._now_s = now_s
        changed = self._thread(chain)
        run = self.tree.deepest(chain)
        if run is None:
            return
        before = self._last_turn(run, chain)
        self._leave_behind(changed, run, before.profile if before is not None else None, now_s)
        if isinstance(before, Run) and before.partial is not None and before.partial not in chain:
            self._supersede(before.partial)
            before.partial = None
        elif isinstance(before, _Ghost):
            del self._ghosts[before.end]
        known = _position(chain, before.end) + 1 if before is not None and before.end is not None else None
        own = self._own_run(run)
        if known is None:  # its first turn, which shares what others have in common
            known = len(chain) - len(own.chunks) - run.is_partial if own is not None else len(chain)
        end = replace(
            end,
            answers=1 + (before.answers if before is not None else 0),
            chunks=len(chain),
            new_chunks=max(1, len(chain) - known),
            gap_s=before.gap_s if before is not None else None,
        )
        if own is None:  # it only reads what others share; nothing tells it from them
            self._touch(run, now_s)
            return
        rank = self._policy.turn_ended(end, now_s)
        own.end, own.ended_s, own.answers, own.gap_s = own.chunks[-1], now_s, end.answers, end.gap_s
        own.context = len(chain)
        own.profile, own.worth = rank.profile, rank.worth
        own.partial = None
        if run.is_partial:
            run.worth = rank.partial_worth
            own.partial = run.chunks[0]
        self._touch(run, now_s)

    def expected(self, chain: Sequence[ChunkId], at_s: float) -> None:
        """Somebody says that the next turn of the conversation comes at about that time."""
        run = self.tree.deepest(chain)
        if run is not None:
            run.expected_s = at_s
            self._list_in_both(run, renew=True)

    def added(
        self,
        tier: Tier,
        chunk_id: ChunkId,
        parent_id: ChunkId,
        now_s: float,
        *,
        is_partial: bool = False,
        unsaved: bool = False,
        node: Node | None = None,
    ) -> None:
        """The chunk is in `tier` now. unsaved: and nowhere else, though it shall be. node: see RunTree.add."""
        self._now_s = now_s
        run, tail = self.tree.add(chunk_id, parent_id, now_s, is_partial=is_partial, node=node)
        self.tree.arrive(tier, chunk_id)
        if unsaved:
            self.tree.unsaved.add(chunk_id)
        self._list(run, tier)
        if tail is not None:
            self._note_jobs(tail)
            self._list_in_both(tail)
            assert tail.parent is not None
            self._list_in_both(tail.parent)
        if len(run.stay(tier).chunks) == 1:  # the first: it continues what was a leaf until now
            at = run.parent
            while at is not None:
                self._list(at, tier)
                at = at.parent if not at.stay(tier).chunks else None

    def removed(self, tier: Tier, chunk_id: ChunkId) -> None:
        """The chunk is no longer in `tier`."""
        run = self.tree.run_of(chunk_id)
        assert run is not None
        if tier == "dram":
            self.tree.unsaved.discard(chunk_id)
            for ticket in run.jobs:
                self._jobs[ticket].fetched = 0
        self.tree.leave(tier, chunk_id)
        if not run.chunks and run.end is not None:
            self._remember(_Ghost(run.end, run.answers, run.ended_s, run.gap_s, run.profile))
        at: Run | None = run
        while at is not None:
            self._list(at, tier)
            at = at.parent if not at.stay(tier).chunks and not at.stay(tier).below else None

    def unsaved(self, chunk_id: ChunkId) -> None:
        """The chunk is in DRAM and no longer anywhere else, though it shall be."""
        run = self.tree.run_of(chunk_id)
        if run is not None and chunk_id not in self.tree.unsaved:
            self.tree.unsaved.add(chunk_id)
            self._list(run, "dram")

    def saved(self, chunk_id: ChunkId) -> None:
        """The chunk exists elsewhere too, or is given up to be saved."""
        run = self.tree.run_of(chunk_id)
        if run is not None and chunk_id in self.tree.unsaved:
            self.tree.unsaved.remove(chunk_id)
            self._list(run, "dram")

    def hold(self, chunk_id: ChunkId) -> None:
        """The chunk must stay where it is, until `release` was said as often."""
        self.hold_all((self.tree.nodes[chunk_id],))

    def release(self, chunk_id: ChunkId) -> None:
        node = self.tree.nodes.get(chunk_id)
        if node is not None and node.holds:
            self.release_all((node,))

    def hold_all(self, nodes: Iterable[Node]) -> None:
        """These chunks must stay where they are, until `release_all` was said of each as often."""
        runs: dict[Run | None, None] = {}
        for node in nodes:
            if not node.holds:
                self.tree.held += 1
                runs[node.run] = None
            node.holds += 1
        self._relist(runs)

    def release_all(self, nodes: Iterable[Node]) -> None:
        """One that was taken away though held, and came back since, is another node: it is not concerned."""
        runs: dict[Run | None, None] = {}
        for node in nodes:
            node.holds -= 1
            if not node.holds and node.run is not None:
                self.tree.held -= 1
                runs[node.run] = None
        self._relist(runs)

    def _relist(self, runs: Iterable[Run | None]) -> None:
        for run in runs:
            assert run is not None
            self._list_in_both(run)

    # -- the queue --------------------------------------------------------------------------------------------

    def wait(self, ticket: int, chain: Sequence[ChunkId], now_s: float | None = None) -> None:
        """A turn waits whose context is `chain`. Lower tickets run first. A ticket waits once.

        now_s: since when, which is when its conversation came back; not told, that counts as the time when it begins.
        """
        if now_s is not None:
            self._now_s = now_s
            self._returned(self.tree.deepest(chain), chain, now_s)
        job = self._jobs[ticket] = _Job(ticket, chain)
        place = bisect.bisect(self._tickets, ticket)
        self._tickets.insert(place, ticket)
        if place < self._inside:
            self._enter(job)
        self._widen()

    def context_of(self, ticket: int) -> tuple[ChunkId, ...]:
        """What a waiting turn waits with."""
        return tuple(self._jobs[ticket].chain)

    def go(self, ticket: int) -> None:
        """The turn waits no longer."""
        job = self._jobs.pop(ticket)
        del self._tickets[bisect.bisect_left(self._tickets, ticket)]
        if job.is_inside:
            self._inside -= 1
            self._inside_stored -= job.is_stored
            for run in job.runs:
                first = next(iter(run.jobs), None)
                run.jobs.pop(ticket, None)
                if first == ticket:
                    self._list_in_both(run, renew=True)
        self._widen()

    @property
    def session_chunks(self) -> float:
        """The paper's S_kv: chunks per conversation, on average."""
        return max(1.0, len(self.tree) / max(1, self.tree.leaves))

    @property
    def prefetch_window(self) -> int:
        """The paper's L_pw: waiting turns that are looked at for prefetching."""
        return max(1, int(self.capacity["dram"] / self.session_chunks))

    @property
    def eviction_window(self) -> int:
        """The paper's L_ev: waiting turns whose conversations stay on SSD, and leave DRAM last.

        We differ: turns of which nothing is stored are not counted. They need no room, and behind a queue of many
        misses there are conversations worth keeping.
        """
        return max(1, int(sum(self.capacity.values()) / self.session_chunks))

    def _widen(self) -> None:
        if not self._policy.looks_ahead:
            return
        while self._inside < len(self._tickets) and self._inside_stored < self.eviction_window:
            self._enter(self._jobs[self._tickets[self._inside]])

    def _enter(self, job: _Job) -> None:
        job.is_inside = True
        self._inside += 1
        run = self.tree.deepest(job.chain)
        if run is None:
            return
        job.is_stored = True
        self._inside_stored += 1
        for at in self.tree.path(run):
            job.runs.append(at)
            last_first = next(iter(at.jobs), None)
            if not at.jobs:
                at.jobs = {}
            at.jobs[job.ticket] = None
            if last_first is not None and job.ticket < last_first:
                at.jobs = dict.fromkeys(sorted(at.jobs))
            if last_first is None or job.ticket < last_first:
                self._list_in_both(at, renew=True)

    # -- decisions --------------------------------------------------------------------------------------------

    def next_victim(self, tier: Tier, now_s: float, *, unsaved_too: bool = False) -> ChunkId | None:
        """The chunk to lose next. None: none may go.

        In order: conversations that no waiting turn needs, by the policy; then those of waiting turns, who comes last
        first. unsaved_too: chunks that exist nowhere else may go as well, after all others.
        """
        listings = (tier, "unsaved") if tier == "dram" and unsaved_too else (tier,)
        for listing in listings:
            run = self._between[listing].worst(now_s) or self._wanted[listing].worst(now_s)
            if run is not None:
                return run.stay(tier).chunks[-1]
        return None

    def next_fetch(self, free_slots: int, now_s: float) -> Fetch | None:
        """The next chunk to bring up for the turns in the prefetch window, for the head of the queue first.

        Looks no further down the queue than all contexts on the way fit beside what must stay and a reserve for what
        turns save: what was fetched would be pushed out again before its turn. Never takes from a turn to give to one
        behind it. None: nothing to do, no room, or a policy that does not look ahead.
        """
        if not self._policy.looks_ahead:
            return None
        busy = self.tree.held + len(self.tree.unsaved)
        room = int(self.capacity["dram"] * (1 - _RESERVE)) - busy
        for place, ticket in enumerate(self._tickets[: self.prefetch_window]):
            job = self._jobs[ticket]
            room -= len(job.chain)
            if room < 0 and place > 0:
                return None
            wanted = self._next_missing(job)
            if wanted is None:
                continue
            if free_slots > 0:
                return Fetch(wanted)
            run = self._between["dram"].worst(now_s)
            if run is None:
                run = self._wanted["dram"].worst(now_s)
                if run is None or next(iter(run.jobs)) <= ticket:
                    return None  # whatever is left is wanted sooner
            return Fetch(wanted, run.dram.chunks[-1])
        return None

    def _next_missing(self, job: _Job) -> ChunkId | None:
        """The first chunk of a waiting turn that is on SSD only, with all before it in DRAM."""
        job.fetched = self.tree.leading("dram", job.chain, job.fetched)
        if job.fetched == len(job.chain) or not self.tree.holds("ssd", job.chain[job.fetched]):
            return None
        return job.chain[job.fetched]

    # -- inside -------------------------------------------------------------------------------------------------

    def _touch(self, run: Run, now_s: float) -> None:
        for at in self.tree.path(run):
            at.used_s = now_s
            at.expected_s = None
            self._list_in_both(at, renew=True)

    def _supersede(self, chunk_id: ChunkId) -> None:
        """Nobody will ask for this chunk again: a longer one took its place."""
        run = self.tree.run_of(chunk_id)
        if run is not None and run.is_partial:
            run.used_s = run.entered_s = SUPERSEDED_S
            self._list_in_both(run, renew=True)

    def _thread(self, chain: Sequence[ChunkId]) -> list[Run]:
        """Let what a truncation dropped from `chain` no longer stay for what follows it there. Returns what changed.

        Who spoke last says what follows what: a branch from before the truncation, too, when it goes on.
        """
        changed = self.tree.thread(chain)
        for run in changed:
            self._note_jobs(run)
            for at in self.tree.path(run):
                self._list_in_both(at, renew=True)
        return changed

    def _leave_behind(self, changed: Iterable[Run], run: Run, profile: object, now_s: float) -> None:
        """What is dropped from the context that ends in `run` is like what a fork leaves: rarely anybody returns."""
        for at in changed:
            if not at.children and at.end is None and at not in self.tree.path(run):
                rank = self._policy.turn_forked(profile, now_s)
                at.end, at.profile, at.worth = at.chunks[-1], rank.profile, rank.worth
                self._list_in_both(at, renew=True)

    def _note_jobs(self, run: Run) -> None:
        """The run has the jobs of the one that it was cut off."""
        for ticket in run.jobs:
            if run not in (runs := self._jobs[ticket].runs):
                runs.append(run)

    def _fork(self, run: Run, ended_s: float, chain: Sequence[ChunkId], now_s: float) -> None:
        """`chain` leaves the conversation of `run` on the way. With more than half of it, it goes on with it."""
        kept = next(i for i in range(len(chain), 0, -1) if chain[i - 1] in self.tree)
        if 2 * kept > run.context:
            self._policy.turn_returned(run.profile, now_s, partial_hit=None)
            self._remember(_Ghost(chain[kept - 1], run.answers, None, now_s - ended_s, None))
            if run.partial is not None:
                self._supersede(run.partial)
        rank = self._policy.turn_forked(run.profile, now_s)
        run.profile, run.worth = rank.profile, rank.worth

    def _remember(self, ghost: _Ghost) -> None:
        self._ghosts[ghost.end] = ghost
        if len(self._ghosts) > _GHOSTS:
            self._ghosts.popitem(last=False)

    def _returned(self, run: Run | None, chain: Sequence[ChunkId], now_s: float) -> Run | _Ghost | None:
        """The conversation that `chain` goes on with, which has come back by now."""
        before = self._last_turn(run, chain)
        if before is not None and before.ended_s is not None:
            partial_hit = before.partial in chain if isinstance(before, Run) and before.partial is not None else None
            self._policy.turn_returned(before.profile, now_s, partial_hit=partial_hit)
            before.gap_s, before.ended_s = now_s - before.ended_s, None
        return before

    def _last_turn(self, run: Run | None, chain: Sequence[ChunkId]) -> Run | _Ghost | None:
        """The conversation that `chain` goes on with, in the state of its last turn."""
        if run is not None:
            for at in self.tree.path(run):
                if at.end is not None:
                    if at.end in chain:
                        return at
                    break
        if self._ghosts:
            for chunk_id in reversed(chain):
                if chunk_id in self._ghosts:
                    return self._ghosts[chunk_id]
        return None

    def _own_run(self, run: Run) -> Run | None:
        """The run that only the conversation ending in `run` has. None: others share all of it."""
        if not run.is_partial:
            return run if not run.children else None
        parent = run.parent
        if parent is None or any(child is not run and not child.is_superseded for child in parent.children.values()):
            return run
        return parent

    def _currency(self, listing: str):  # type: ignore[no-untyped-def]
        tier = self._tiers[listing.split()[0]]

        def is_current(run: Run, stamp: int) -> bool:
            stay = run.dram if tier == "dram" else run.ssd
            return stay.stamp == stamp and stay.listed == listing

        return is_current

    def _list_in_both(self, run: Run, *, renew: bool = False) -> None:
        self._list(run, "dram", renew=renew)
        self._list(run, "ssd", renew=renew)

    def _list(self, run: Run, tier: Tier, *, renew: bool = False) -> None:
        """List the run where it belongs now. renew: its rank may have changed."""
        stay = run.dram if tier == "dram" else run.ssd
        listing = ""
        if stay.chunks and not stay.below and not self.tree.nodes[last := stay.chunks[-1]].holds:
            listing = "unsaved" if tier == "dram" and last in self.tree.unsaved else tier
            if run.jobs:
                listing = f"{listing} wanted"
        if listing == stay.listed and not renew:
            return
        stay.listed = listing
        stay.stamp += 1
        if not listing:
            return
        if run.jobs:
            self._wanted[listing.removesuffix(" wanted")].push(run, stay.stamp, self._now_s)
        else:
            self._between[listing].push(run, stay.stamp, self._now_s)


def _position(chain: Sequence[ChunkId], chunk_id: ChunkId) -> int:
    return next(i for i in range(len(chain) - 1, -1, -1) if chain[i] == chunk_id)
