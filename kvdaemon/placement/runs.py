"""What is stored, as a tree of runs: pure books, shared by the live daemon and the simulator.

A run is a stretch of chunks that only ever follow each other: a conversation's tail, or a beginning that several
conversations share. A chunk is of use only with all chunks before it, so in each tier chunks leave from the tails of
runs that nothing resident continues (leaves), and what is decided is only which leaf is worth least.

All operations cost the chunks they add or the runs on one path, never the number of chunks stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Tier = Literal["dram", "ssd"]
TIERS: tuple[Tier, ...] = ("dram", "ssd")
ChunkId = bytes
SUPERSEDED_S = float("-inf")  # as the time of a run's last use: nobody will ask for it again


class Worth(NamedTuple):
    """What keeping a run depends on, as its policy sees it. share: of time saved per byte, 1 for a short context."""

    speaker: str = ""
    features: tuple[tuple[str, int], ...] = ()
    share: float = 1.0


UNKNOWN_WORTH = Worth()


class Node:
    """What the tree notes of a chunk. The daemon's index makes its own of it, so that a chunk has one entry in all."""

    __slots__ = ("holds", "run", "tiers")

    def __init__(self) -> None:
        self.run: Run | None = None  # None: not in the tree, or no longer
        self.tiers = 0  # bits of the tiers that hold it
        self.holds = 0  # how many times it was said that it must stay: leased, or on its way in or out


_BITS: dict[Tier, int] = {"dram": 1, "ssd": 2}
_serials = itertools.count()
_NO_JOBS: dict[int, None] = {}  # these two stand for "none" in most runs, and are never changed
_NO_CHILDREN: dict[ChunkId, Run] = {}


class Stay:
    """A run in one tier."""

    __slots__ = ("below", "chunks", "listed", "stamp")

    def __init__(self) -> None:
        self.chunks: list[ChunkId] = []  # that the tier holds, in the order of the run
        self.below = 0  # children of the run with anything resident in or below them
        # The order in which the run is listed to lose its tail, and the stamp of that entry: older ones are void.
        self.listed = ""
        self.stamp = 0


class Run:
    """Consecutive chunks. Changed by RunTree, and by the placement that owns the tree."""

    __slots__ = (
        "answers",
        "behind",
        "children",
        "chunks",
        "context",
        "dram",
        "end",
        "ended_s",
        "entered_s",
        "expected_s",
        "gap_s",
        "is_partial",
        "jobs",
        "parent",
        "partial",
        "profile",
        "serial",
        "ssd",
        "used_s",
        "worth",
    )

    def __init__(self, parent: Run | None, chunks: list[ChunkId], now_s: float) -> None:
        self.serial = next(_serials)  # decides between runs of equal rank
        self.parent = parent
        self.children = _NO_CHILDREN  # by their first chunk
        self.chunks = chunks
        self.dram, self.ssd = Stay(), Stay()
        self.entered_s = now_s
        self.used_s = now_s
        self.jobs = _NO_JOBS  # tickets of waiting turns that need this run, first come first
        self.is_partial = False  # one chunk that is not full: of use to the turn that follows, and to no other
        self.behind: ChunkId | None = None  # if it is partial, which chunk of the parent it follows
        # The last turn that ended here.
        self.end: ChunkId | None = None  # its last chunk that this run holds; None: no turn ended here
        self.ended_s: float | None = None  # None: the next one runs already
        self.answers = 0  # turns of the conversation so far
        self.context = 0  # chunks that the last turn left behind, from the first on
        self.gap_s: float | None = None  # between the last two
        self.partial: ChunkId | None = None  # the chunk behind `end` that the next turn replaces
        self.expected_s: float | None = None  # somebody said that the next turn comes then
        self.profile: object = None  # what the policy knows of the conversation
        self.worth = UNKNOWN_WORTH

    def stay(self, tier: Tier) -> Stay:
        """The run in `tier`."""
        return self.dram if tier == "dram" else self.ssd

    @property
    def is_superseded(self) -> bool:
        return self.used_s == SUPERSEDED_S

    def is_leaf(self, tier: Tier) -> bool:
        """Whether its last resident chunk may go: something is resident, and nothing that continues it."""
        stay = self.stay(tier)
        return bool(stay.chunks) and not stay.below


class RunTree:
    """Runs by chunk. Not safe for threads.

    held: how many chunks must stay. unsaved: chunks that exist in DRAM only, though they shall not.
    """

    def __init__(self) -> None:
        self.nodes: dict[ChunkId, Node] = {}
        self.held = 0
        self.unsaved: set[ChunkId] = set()
        self.leaves = 0  # runs that nothing continues: about as many as conversations
        self._counts: dict[Tier, int] = {"dram": 0, "ssd": 0}

    def __contains__(self, chunk_id: ChunkId) -> bool:
        return chunk_id in self.nodes

    def __len__(self) -> int:
        """Chunks, each once however many tiers hold it."""
        return len(self.nodes)

    def holds(self, tier: Tier, chunk_id: ChunkId) -> bool:
        """Whether the chunk is in `tier`."""
        node = self.nodes.get(chunk_id)
        return node is not None and node.tiers & _BITS[tier] != 0

    def count(self, tier: Tier) -> int:
        """Chunks in `tier`."""
        return self._counts[tier]

    def leading(self, tier: Tier, chain: Sequence[ChunkId], begin: int = 0) -> int:
        """The first place of `chain`, from `begin` on, whose chunk is not in `tier`."""
        nodes, bit = self.nodes, _BITS[tier]
        for place in range(begin, len(chain)):
            node = nodes.get(chain[place])
            if node is None or not node.tiers & bit:
                return place
        return len(chain)

    def run_of(self, chunk_id: ChunkId) -> Run | None:
        node = self.nodes.get(chunk_id)
        return None if node is None else node.run

    def deepest(self, chain: Sequence[ChunkId]) -> Run | None:
        """The run of the last chunk of `chain` that is known."""
        for chunk_id in reversed(chain):
            node = self.nodes.get(chunk_id)
            if node is not None:
                return node.run
        return None

    def add(
        self,
        chunk_id: ChunkId,
        parent_id: ChunkId,
        now_s: float,
        *,
        is_partial: bool = False,
        node: Node | None = None,
    ) -> tuple[Run, Run | None]:
        """The run of a chunk, which joins the tree after its parent where it is new. A partial chunk is a run alone.

        node: becomes the chunk's entry, if it is new. Returns also the tail of the run that was split for it, if one
        was.
        """
        run = self.run_of(chunk_id)
        if run is not None:
            return run, None
        parent = self.run_of(parent_id)
        if parent is not None and parent.is_partial:
            parent = None  # nothing continues a chunk that is not full
        split = None
        if parent is not None and parent.chunks[-1] != parent_id and not is_partial:
            split = self._split(parent, parent_id)
        if parent is not None and not is_partial and all(child.is_partial for child in parent.children.values()):
            parent.chunks.append(chunk_id)  # partial chunks stay beside it: they are soon gone
            run = parent
        else:
            run = Run(parent, [chunk_id], now_s)
            run.is_partial, run.behind = is_partial, parent_id if is_partial else None
            if parent is None or parent.children:
                self.leaves += 1
            if parent is not None:
                if not parent.children:
                    parent.children = {}
                parent.children[chunk_id] = run
        node = node or Node()
        node.run = run
        self.nodes[chunk_id] = node
        return run, split

    def arrive(self, tier: Tier, chunk_id: ChunkId) -> Run:
        """The chunk is in `tier` from now on. It must be in the tree, and not in `tier`."""
        node = self.nodes[chunk_id]
        run = node.run
        assert run is not None
        node.tiers |= _BITS[tier]
        self._counts[tier] += 1
        stay = run.stay(tier)
        was_empty = not stay.chunks
        stay.chunks.append(chunk_id)
        if not was_empty and len(run.chunks) > 1 and run.chunks[len(stay.chunks) - 1] != chunk_id:
            # Out of order, or after a gap: as chunks never leave but from the tail, this is rare.
            present = set(stay.chunks)
            stay.chunks = [c for c in run.chunks if c in present]
        if was_empty and not stay.below:
            _count_up(run, tier)
        return run

    def leave(self, tier: Tier, chunk_id: ChunkId) -> Run:
        """The chunk is no longer in `tier`. Runs that nothing holds any more leave the tree."""
        node = self.nodes[chunk_id]
        run = node.run
        assert run is not None
        node.tiers &= ~_BITS[tier]
        self._counts[tier] -= 1
        stay = run.stay(tier)
        if stay.chunks[-1] == chunk_id:
            stay.chunks.pop()
        else:
            stay.chunks.remove(chunk_id)
        if not stay.chunks and not stay.below:
            _count_down(run, tier)
        if not node.tiers:
            self._forget(run, chunk_id)
            node.run = None
        return run

    def path(self, run: Run) -> Iterator[Run]:
        """The run and those before it, deepest first."""
        at: Run | None = run
        while at is not None:
            yield at
            at = at.parent

    def thread(self, chain: Sequence[ChunkId]) -> list[Run]:
        """Let the chunks of a context follow each other, as far as they are known, each with all that continues it.

        Which they do from the start, but for a truncated context: its oldest chunks then stand where they did, and the
        others behind what is left in front of them. Returns the runs that were cut off, or that chunks were taken from.
        """
        changed: list[Run] = []
        before: Run | None = None
        place = 0
        while place < len(chain) and (run := self.run_of(chain[place])) is not None:
            if before is not None and before.is_partial:
                break
            if run.chunks[0] != chain[place]:
                run = self._split(run, run.chunks[run.chunks.index(chain[place]) - 1])
                changed.append(run)
            if run.parent is not before:
                if before is not None and run in self.path(before):
                    break  # a context that nobody can have
                if run.parent is not None:
                    changed.append(run.parent)
                self._hang(run, before)
            if run.is_partial and place:
                run.behind = chain[place - 1]
            place += _in_common(run.chunks, chain[place : place + len(run.chunks)])
            follower = self.run_of(chain[place]) if place < len(chain) else None
            if follower is not None and not follower.is_partial and run.chunks[-1] != chain[place - 1]:
                changed.append(self._split(run, chain[place - 1]))
            before = run
        return changed

    def _hang(self, run: Run, parent: Run | None) -> None:
        """Take the run, with all below it, to another place."""
        first, resident = run.chunks[0], [tier for tier in TIERS if run.stay(tier).chunks or run.stay(tier).below]
        if run.parent is not None:
            for tier in resident:
                _count_down(run, tier)
            del run.parent.children[first]
            self.leaves += not run.parent.children
        run.parent = parent
        if parent is not None:
            self.leaves -= not parent.children
            if not parent.children:
                parent.children = {}
            parent.children[first] = run
            for tier in resident:
                _count_up(run, tier)

    def _split(self, run: Run, last: ChunkId) -> Run:
        """Cut the run behind `last`. The front keeps its identity; returns the tail, with all that ends there."""
        cut = run.chunks.index(last) + 1
        tail = Run(run, run.chunks[cut:], run.entered_s)
        moved = set(tail.chunks)
        run.chunks = run.chunks[:cut]
        stay = {first: child for first, child in run.children.items() if child.is_partial and child.behind not in moved}
        tail.children = {first: child for first, child in run.children.items() if first not in stay} or _NO_CHILDREN
        run.children = {**stay, tail.chunks[0]: tail}
        self.leaves += bool(stay) and not tail.children
        for child in tail.children.values():
            child.parent = tail
        for tier in TIERS:
            front, back = run.stay(tier), tail.stay(tier)
            resident = front.chunks
            back.chunks = [c for c in resident if c in moved]
            front.chunks = [c for c in resident if c not in moved]
            below = sum(bool(child.stay(tier).chunks) for child in stay.values())
            back.below = front.below - below
            front.below = below + (1 if back.chunks or back.below else 0)
        tail.used_s, tail.expected_s = run.used_s, run.expected_s
        tail.jobs = dict(run.jobs) if run.jobs else _NO_JOBS
        if run.end in moved:
            for name in ("end", "ended_s", "answers", "context", "gap_s", "partial", "profile", "worth"):
                setattr(tail, name, getattr(run, name))
            if run.ended_s is not None:
                tail.used_s = run.ended_s  # what uses the front since then does not use the tail
            run.end = run.ended_s = run.gap_s = run.partial = run.profile = None
            run.answers, run.context, run.worth = 0, 0, UNKNOWN_WORTH
        for chunk_id in tail.chunks:
            self.nodes[chunk_id].run = tail
        return tail

    def _forget(self, run: Run, chunk_id: ChunkId) -> None:
        self.held -= self.nodes.pop(chunk_id).holds > 0
        self.unsaved.discard(chunk_id)
        first = run.chunks[0]
        if run.chunks[-1] == chunk_id:
            run.chunks.pop()
        else:
            run.chunks.remove(chunk_id)
        parent = run.parent
        if run.chunks:
            if chunk_id == first and parent is not None:  # a hole in front: it hangs where it hung
                del parent.children[first]
                parent.children[run.chunks[0]] = run
            return
        for child in run.children.values():  # only after damage; what follows a hole is of no use until it is filled
            child.parent = None
        for tier in TIERS:
            stay = run.stay(tier)
            if stay.below:
                stay.below = 0
                _count_down(run, tier)
        if parent is not None:
            del parent.children[first]
        if not run.children and (parent is None or parent.children):
            self.leaves -= 1


def _in_common(chunks: Sequence[ChunkId], others: Sequence[ChunkId]) -> int:
    """How many are equal, from the first on."""
    return next((i for i, (a, b) in enumerate(zip(chunks, others, strict=False)) if a != b), len(others))


def _count_up(run: Run, tier: Tier) -> None:
    at = run.parent
    while at is not None:
        stay = at.stay(tier)
        stay.below += 1
        if stay.below > 1 or stay.chunks:
            return
        at = at.parent


def _count_down(run: Run, tier: Tier) -> None:
    at = run.parent
    while at is not None:
        stay = at.stay(tier)
        stay.below -= 1
        if stay.below or stay.chunks:
            return
        at = at.parent
