"""The tree of runs against the chunks alone: what may leave, what is a leaf, what is in which tier."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvdaemon.placement.runs import TIERS, Run, RunTree, Tier

tiers = st.sampled_from(TIERS)


def path_of(word: str) -> list[bytes]:
    return [word[: i + 1].encode() for i in range(len(word))]


class Books(RuleBasedStateMachine):
    """Chunks are prefixes of words, so that a chunk tells its parent; a "." ends one that is not full."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = RunTree()
        self.resident: dict[Tier, set[bytes]] = {"dram": set(), "ssd": set()}
        self.known: set[bytes] = set()
        self.behind: dict[bytes, bytes] = {}  # chunk -> what it is behind now, where a truncation changed that

    def _before(self, chunk_id: bytes) -> bytes:
        return self.behind.get(chunk_id, chunk_id[:-1])

    def _all_before(self, chunk_id: bytes) -> Iterator[bytes]:
        while (chunk_id := self._before(chunk_id)) in self.known:
            yield chunk_id

    def _put(self, tier: Tier, chunk_id: bytes, *, is_partial: bool) -> None:
        self.tree.add(chunk_id, chunk_id[:-1], 0.0, is_partial=is_partial)
        self.tree.arrive(tier, chunk_id)
        self.resident[tier].add(chunk_id)
        self.known.add(chunk_id)

    @rule(tier=tiers, word=st.text("abc", min_size=1, max_size=6), ends=st.booleans())
    def a_turn_ends(self, tier: Tier, word: str, ends: bool) -> None:
        """Its chunks come, oldest first, and maybe one that is not full."""
        for chunk_id in path_of(word):
            if chunk_id not in self.resident[tier]:
                self._put(tier, chunk_id, is_partial=False)
        partial = word.encode() + b"."
        if ends and partial not in self.resident[tier]:
            self._put(tier, partial, is_partial=True)

    @rule(data=st.data(), start=st.integers(0, 4), dropped=st.integers(0, 4), ends=st.booleans())
    def a_truncated_turn_ends(self, data: st.DataObject, start: int, dropped: int, ends: bool) -> None:
        """A context without some chunks of it; none dropped: one that goes on from before a truncation."""
        word = data.draw(st.sampled_from(sorted(self.known)) if self.known else st.just(b"abc")).decode().rstrip(".")
        chain = [*path_of(word), *([word.encode() + b"."] if ends else [])]
        del chain[start : start + dropped]
        self.tree.thread(chain)
        before = b""
        for chunk_id in chain:
            if chunk_id not in self.known:
                break
            self.behind[chunk_id] = before
            before = chunk_id

    @precondition(lambda self: any(self.resident.values()))
    @rule(data=st.data(), tier=tiers)
    def a_leaf_leaves(self, data: st.DataObject, tier: Tier) -> None:
        leaves = sorted(self._leaves(tier))
        if not leaves:
            return
        chunk_id = data.draw(st.sampled_from(leaves))
        self.tree.leave(tier, chunk_id)
        self.resident[tier].remove(chunk_id)
        if not any(chunk_id in resident for resident in self.resident.values()):
            self.known.remove(chunk_id)
            self.behind.pop(chunk_id, None)
            self.behind |= {other: b"" for other in self.known if self._before(other) == chunk_id}

    def _leaves(self, tier: Tier) -> set[bytes]:
        """Chunks that nothing in the tier continues. A run loses the partial chunks beside it before its tail."""
        resident = self.resident[tier]
        leaves = resident - {before for chunk_id in resident for before in self._all_before(chunk_id)}
        above = set()
        for chunk_id in resident:
            run = self.tree.run_of(chunk_id)
            if chunk_id.endswith(b".") and run is not None:
                above |= {id(other) for other in self.tree.path(run) if other is not run}
        return {c for c in leaves if id(self.tree.run_of(c)) not in above}

    def _runs(self) -> list[Run]:
        runs = {id(run): run for chunk_id in self.known if (run := self.tree.run_of(chunk_id)) is not None}
        return list(runs.values())

    @invariant()
    def residence_agrees(self) -> None:
        assert len(self.tree) == len(self.known)
        for tier in TIERS:
            assert self.tree.count(tier) == len(self.resident[tier])
            assert {c for c in self.known if self.tree.holds(tier, c)} == self.resident[tier]

    @invariant()
    def leaves_agree(self) -> None:
        """What may leave a tier next is exactly what nothing there continues."""
        for tier in TIERS:
            tails = {run.stay(tier).chunks[-1] for run in self._runs() if run.is_leaf(tier)}
            assert tails == self._leaves(tier)
            assert bool(tails) == bool(self.resident[tier])

    @invariant()
    def runs_are_stretches(self) -> None:
        """Every chunk is in one run, behind its parent; runs hang where their first chunk's parent is."""
        runs = self._runs()
        assert sorted(c for run in runs for c in run.chunks) == sorted(self.known)
        for run in runs:
            assert all(self._before(after) == before for before, after in zip(run.chunks, run.chunks[1:], strict=False))
            parent_id = self._before(run.chunks[0])
            if parent_id in self.known:
                assert run.parent is not None
                assert run.parent.children[run.chunks[0]] is run
                if run.is_partial:
                    assert parent_id in run.parent.chunks
                else:
                    assert run.parent.chunks[-1] == parent_id
            else:
                assert run.parent is None
            for tier in TIERS:
                assert run.stay(tier).chunks == [c for c in run.chunks if c in self.resident[tier]]
        assert self.tree.leaves == sum(not run.children for run in runs)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


def test_a_split_leaves_the_end_of_a_turn_with_the_tail() -> None:
    """What is known of a conversation goes with the chunk where it ended; the beginning is nobody's."""
    tree = RunTree()
    for chunk_id in path_of("abcd"):
        tree.add(chunk_id, chunk_id[:-1], 1.0)
        tree.arrive("dram", chunk_id)
    run = tree.run_of(b"abcd")
    assert run is not None
    run.end, run.ended_s, run.answers, run.profile, run.used_s = b"abcd", 5.0, 3, "known", 9.0
    other, tail = tree.add(b"abx", b"ab", 9.0)
    assert tail is not None
    assert tree.run_of(b"abcd") is tail
    assert (tail.end, tail.answers, tail.profile, tail.used_s) == (b"abcd", 3, "known", 5.0)
    front = tree.run_of(b"ab")
    assert front is run is other.parent is tail.parent
    assert (run.end, run.answers, run.profile) == (None, 0, None)


@given(st.text("ab", min_size=1, max_size=8), st.text("ab", min_size=1, max_size=8))
def test_deepest_is_of_the_longest_known_beginning(known: str, asked: str) -> None:
    tree = RunTree()
    for chunk_id in path_of(known):
        tree.add(chunk_id, chunk_id[:-1], 0.0)
        tree.arrive("ssd", chunk_id)
    common = next(
        (i for i, (a, b) in enumerate(zip(known, asked, strict=False)) if a != b), min(len(known), len(asked))
    )
    run = tree.deepest(path_of(asked))
    assert (run is not None) == (common > 0)
    if run is not None:
        assert asked[:common].encode() in run.chunks
