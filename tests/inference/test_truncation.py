"""Which part of a context is dropped, and that a chunk's id says all that its KV depends on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.context import known_history, wanted_chunks
from inference.save import SaveTask
from inference.truncation import Window, plan_truncation, recompute_from, truncate
from inference.working_kv import Buffers, KvShape, new_context
from protocol import ids
from protocol.codec import Frame, decode, encode
from protocol.ids import TokenArray
from protocol.lineage import Truncation, kept_ranges, kept_tokens, lineage_of, place_of
from protocol.messages import Manifest

NAMESPACE = b"n" * 16
CHUNK = 4


def plan(
    length: int, *dropped: tuple[int, int], room: int = 1, head: int = 0, tail: int | None = None, ratio: float = 0.5
) -> object:
    window = Window(32, CHUNK, ratio)
    before = [Truncation(length, start, end) for start, end in dropped]
    return plan_truncation(window, length, before, room=room, head=head, tail=length if tail is None else tail)


def test_what_fits_stays() -> None:
    assert plan(31) == ()
    assert plan(47, (0, 16)) == ()


def test_the_oldest_half_goes_by_whole_chunks() -> None:
    assert plan(32) == ((0, 16),)
    assert plan(33, ratio=0.3) == ((0, 8),)
    assert plan(48, (0, 16)) == ((16, 32),)


def test_room_for_the_answer_counts() -> None:
    assert plan(28, room=4) == ()
    assert plan(28, room=5) == ((0, 16),)


def test_a_long_transcript_loses_as_many_halves_as_it_takes() -> None:
    assert plan(100) == ((0, 80),)


def test_the_front_stays_in_whole_chunks() -> None:
    assert plan(32, head=5) == ((8, 24),)
    assert plan(48, (8, 24), head=5) == ((24, 40),)


def test_the_turns_own_tokens_stay() -> None:
    assert plan(40, tail=15) == ((0, 12),)
    assert plan(40, tail=8) is None
    assert plan(40, head=8, tail=15) is None


def test_a_front_that_shrank_is_dropped_with_what_follows_the_gap() -> None:
    assert plan(48, (8, 24), head=0) == ((0, 8), (24, 32))


@given(st.integers(1, 400), st.integers(0, 20), st.sampled_from([0.2, 0.4, 0.5]), st.integers(1, 8))
def test_all_at_once_drops_what_one_after_the_other_drops(length: int, head: int, ratio: float, room: int) -> None:
    """What is left depends on the length alone: several truncations in a row end where a single one does."""
    window = Window(64, CHUNK, ratio)
    at_once = plan_truncation(window, length, (), room=room, head=head, tail=length)
    found: tuple[Truncation, ...] = ()
    for grown in range(1, length + 1):
        ranges = plan_truncation(window, grown, found, room=room, head=head, tail=grown)
        assert ranges is not None
        found = truncate(found, ranges, grown - 1)
    assert at_once is not None
    assert kept_ranges(length, found) == kept_ranges(length, truncate((), at_once, 0))
    assert kept_tokens(length, found) + room <= window.tokens


@given(st.data())
def test_places_and_positions(data: st.DataObject) -> None:
    """Positions close up over what is dropped, against a list with one entry for each token."""
    length = data.draw(st.integers(0, 80))
    borders = st.integers(0, 24).map(lambda n: n * CHUNK)
    drawn = data.draw(st.lists(st.tuples(borders, borders).map(sorted), max_size=4))
    truncations = [Truncation(100, start, end) for start, end in drawn]
    left = [t for t in range(length) if not any(one.start <= t < one.end for one in truncations)]
    assert [t for start, end in kept_ranges(length, truncations) for t in range(start, end)] == left
    assert kept_tokens(length, truncations) == len(left)
    assert [place_of(i, length, truncations) for i in range(len(left) + 1)] == [*left, length]


def test_without_truncations_the_lineage_is_the_plain_one() -> None:
    tokens = np.arange(18, dtype=np.uint32)
    found = lineage_of(NAMESPACE, tokens, CHUNK)
    assert list(found.chunk_ids) == ids.lineage(NAMESPACE, tokens, CHUNK)
    assert (found.dropped_ids, found.links) == ((), {})


def test_what_was_computed_before_a_truncation_keeps_its_id() -> None:
    tokens = np.arange(40, dtype=np.uint32)
    plain = ids.lineage(NAMESPACE, tokens, CHUNK)
    found = lineage_of(NAMESPACE, tokens, CHUNK, [Truncation(32, 4, 20)])
    assert found.dropped_ids == tuple(plain[1:5])
    assert found.chunk_ids[:4] == (plain[0], *plain[5:8])
    assert not set(found.chunk_ids[4:]) & set(plain)


# -- turns, hits and misses, forks: against a model whose KV is all that it depends on --------------------------------


@dataclass
class Simulated:
    """Turns planned by the real functions, over KV that is a digest of whatever a token saw.

    A store that gives two different KVs the same id, or a context other than the plain rules have it, is an error.
    """

    window: Window
    head: int
    store: dict[bytes, tuple[int, ...]] = field(
        default_factory=dict
    )  # id -> KV of each token; what was evicted is gone
    ever: dict[bytes, tuple[int, ...]] = field(default_factory=dict)

    def turn(self, parent: Manifest | None, new: list[int], answer: list[int], died: int = 0) -> Manifest | None:
        """None: the turn is too long. died: an attempt streamed so many tokens, and had saved what fills chunks."""
        if died and self.attempt(parent, new, answer[:died], is_dying=True) is None:
            return None
        return self.attempt(parent, new, answer, resumed=died)

    def attempt(
        self, parent: Manifest | None, new: list[int], answer: list[int], resumed: int = 0, *, is_dying: bool = False
    ) -> Manifest | None:
        said = [] if parent is None else ids.unpack_tokens(parent.token_ids).tolist()
        prompt = np.array([*said, *new], dtype=np.uint32)
        truncations, computed = (parent.truncations, parent.kv_tokens) if parent else ((), 0)
        ranges = plan_truncation(
            self.window, len(prompt), truncations, room=1, head=self.head, tail=len(said) if parent else len(prompt)
        )
        if ranges is None:
            return None
        truncations = truncate(truncations, ranges, computed)
        tokens = [*prompt.tolist(), *answer[:resumed]]
        while resumed and kept_tokens(len(tokens), truncations) > self.window.tokens:
            found = self.truncate_full(len(tokens), truncations)
            if found is None:
                return None
            truncations = found
        kv = self.history(np.array(tokens, dtype=np.uint32), parent, truncations)
        if not resumed:
            known = known_history(prompt, parent, parent is not None, 0, "", truncations).tokens
            if self.store.keys() == self.ever.keys():
                assert len(kv) >= known, "nothing was evicted, and a kept token missed"
        truncations = recompute_from(truncations, place_of(len(kv), len(tokens), truncations))
        for token in [*answer[resumed:], -1]:
            kept = [tokens[t] for start, end in kept_ranges(len(tokens), truncations) for t in range(start, end)]
            for at in range(len(kv), len(kept)):
                kv.append(hash((kept[at], tuple(kv))))
                if len(kv) == self.window.tokens and at + 1 < len(kept):
                    raise AssertionError("the context is longer than the window")
            if token < 0:
                break
            tokens.append(token)
            if len(kv) == self.window.tokens:
                found = self.truncate_full(len(tokens), truncations)
                if found is None:
                    return None
                kv = [kv[i] for i, t in enumerate(self.left(len(tokens), truncations)[: len(kv)]) if is_left(t, found)]
                truncations = found
        packed = np.array(tokens, dtype=np.uint32)
        chunk_ids = lineage_of(NAMESPACE, packed, self.window.chunk_tokens, truncations).chunk_ids
        self.save(chunk_ids, kv, whole_only=is_dying)
        return Manifest(ids.new_id(), NAMESPACE, packed.tobytes(), "", chunk_ids, len(packed), truncations)

    def truncate_full(self, length: int, truncations: tuple[Truncation, ...]) -> tuple[Truncation, ...] | None:
        full = place_of(self.window.tokens, length, truncations)
        tail = full - self.window.chunk_tokens
        ranges = plan_truncation(self.window, full, truncations, room=1, head=self.head, tail=tail)
        return truncate(truncations, ranges, full) if ranges else None

    def left(self, length: int, truncations: tuple[Truncation, ...]) -> list[int]:
        return [t for start, end in kept_ranges(length, truncations) for t in range(start, end)]

    def history(self, tokens: TokenArray, parent: Manifest | None, truncations: tuple[Truncation, ...]) -> list[int]:
        """The KV that need not be computed: never the last token's, whose logits are wanted."""
        wanted = wanted_chunks(NAMESPACE, tokens, parent, parent is not None, self.window.chunk_tokens, truncations)
        kv = self.load(wanted.chunk_ids, wanted.partial_id, wanted.partial_index)
        return kv[: kept_tokens(len(tokens), truncations) - 1]

    def save(self, chunk_ids: tuple[bytes, ...], kv: list[int], *, whole_only: bool) -> None:
        size = self.window.chunk_tokens
        for at, chunk_id in enumerate(chunk_ids):
            content = tuple(kv[at * size : (at + 1) * size])
            if whole_only and len(content) < size:
                break
            assert self.ever.setdefault(chunk_id, content) == content, "one id for different KV"
            self.store[chunk_id] = content

    def load(self, chunk_ids: tuple[bytes, ...], partial_id: bytes | None, partial_index: int) -> list[int]:
        found: list[int] = []
        for index in range(len(chunk_ids) + 1):
            known = self.store.get(chunk_ids[index]) if index < len(chunk_ids) else None
            if known is None:
                if partial_id is not None and index == partial_index:
                    found += self.store.get(partial_id, ())
                break
            found += known
        return found


def is_left(token: int, truncations: tuple[Truncation, ...]) -> bool:
    return not any(one.start <= token < one.end for one in truncations)


def restarted(context: Manifest | None) -> Manifest | None:
    """As another process reads it."""
    return None if context is None else decode(encode(Frame("end", 1, context))).body


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(0, 0.5), (5, 0.5), (0, 0.25), (9, 0.8)]))
def test_an_id_stands_for_one_kv_whatever_happened(seed: int, rules: tuple[int, float]) -> None:
    """Turns, forks, truncations before and in an answer, evictions, attempts that die, restarts, in any order.

    An attempt dies with an answer begun; another one goes on from its tokens, and whatever chunks it had filled.
    """
    chance = random.Random(seed)
    head, ratio = rules
    simulated = Simulated(Window(40, CHUNK, ratio), head)
    contexts: list[Manifest | None] = [None]
    for _ in range(25):
        parent = chance.choice([contexts[-1], contexts[-1], chance.choice(contexts)])
        new = [chance.randrange(3) for _ in range(chance.choice((1, 2, 7, 16)))]
        answer = [chance.randrange(3) for _ in range(chance.choice((1, 5, 30)))]
        died = chance.choice((0, 0, chance.randint(1, len(answer))))
        done = simulated.turn(parent, new, answer, died)
        if done is not None:
            contexts.append(done)
        if chance.random() < 0.2:
            for chunk_id in chance.sample(sorted(simulated.store), len(simulated.store) // 4):
                del simulated.store[chunk_id]
        if chance.random() < 0.1:
            contexts = [restarted(context) for context in contexts]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 100))
def test_an_attempt_that_died_leaves_no_trace(seed: int, died: int) -> None:
    """Whoever goes on with an answer has the very context of an undisturbed one, from where the store has it."""
    chance = random.Random(seed)
    prompt, answer = ([chance.randrange(3) for _ in range(count)] for count in (30, 100))
    undisturbed, resumed = (Simulated(Window(40, CHUNK), 5) for _ in range(2))
    whole, again = undisturbed.turn(None, prompt, answer), resumed.turn(None, prompt, answer, died)
    assert whole is not None
    assert again is not None
    assert (again.chunk_ids, again.truncations) == (whole.chunk_ids, whole.truncations)


@pytest.mark.parametrize("place", [12, 16, 18])
def test_the_saver_names_chunks_by_the_lineage(place: int) -> None:
    """Of a truncated context, whether it goes on at a chunk's border or within a chunk."""
    shape = KvShape(1, 1, 4, 4, torch.float32, torch.device("cpu"))
    tokens = np.arange(30, dtype=np.uint32)
    truncations = recompute_from([Truncation(18, 4, 12)], place)
    kept = np.concatenate([tokens[start:end] for start, end in kept_ranges(len(tokens), truncations)])
    history = kept_tokens(place, truncations) // CHUNK * CHUNK
    kv = new_context(Buffers(shape, 0), 64, history, history)
    wanted = lineage_of(NAMESPACE, tokens, CHUNK, truncations)
    task = SaveTask(kv, NAMESPACE, kept[:history], kept, CHUNK, wanted.links)
    assert tuple(task.chunk_ids) == wanted.chunk_ids[: history // CHUNK]
    for start in range(history, len(kept), CHUNK):
        task._append_id(kept[start : start + CHUNK])
    assert tuple(task.chunk_ids) == wanted.chunk_ids
