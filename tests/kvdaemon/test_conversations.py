"""Turns of one conversation are told by their tokens; compared with a plain comparison of all with all."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvdaemon.conversations import EarlierTurns, Relation, common_tokens, relation
from protocol.arena import Geometry
from protocol.ids import lineage, pack_tokens, unpack_tokens
from protocol.messages import Manifest

TINY = Geometry(1, 1, 1, 4)


def context(name: int, token_ids: list[int], namespace: int = 0) -> Manifest:
    tokens = unpack_tokens(pack_tokens(token_ids))
    space = bytes([namespace]) * 16
    chunks = tuple(lineage(space, tokens[:-1], TINY.chunk_tokens))
    return Manifest(name.to_bytes(16, "big"), space, tokens.tobytes(), "", chunks, max(0, len(tokens) - 1))


def test_relations() -> None:
    base = context(1, [1, 2, 3, 4, 5])
    assert relation(base, base) is Relation.SAME
    assert relation(context(2, [1, 2, 3]), base) is Relation.EARLIER
    assert relation(context(2, [1, 2, 3, 4, 5, 6]), base) is Relation.LATER
    assert relation(context(2, [1, 2, 9]), base) is Relation.OTHER
    assert relation(context(2, [1, 2, 3, 4, 5]), base) is Relation.OTHER  # a twin: neither continues the other
    assert relation(context(2, [1, 2, 3], namespace=1), base) is Relation.OTHER
    assert common_tokens(context(2, [1, 2, 9, 4]), base) == 2
    assert common_tokens(context(2, [1, 2, 3, 4], namespace=1), base) == 0


# Few different tokens and short contexts, so that beginnings are shared at all lengths around chunk borders.
contexts = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(0, 1)), min_size=1, max_size=30
)


@settings(max_examples=200, deadline=None)
@given(contexts)
def test_earlier_turns_equal_a_comparison_of_all_with_all(drawn: list[tuple[list[int], int]]) -> None:
    turns = [context(n, token_ids, namespace) for n, (token_ids, namespace) in enumerate(drawn)]
    earlier = EarlierTurns(TINY.chunk_tokens)
    for turn in turns:
        earlier.note(turn)
    for turn in turns:
        expected = [other for other in turns if relation(other, turn) is Relation.EARLIER]
        found = earlier.earlier(turn)
        assert sorted(found) == sorted(other.turn_key for other in expected)
        lengths = [len(next(t for t in turns if t.turn_key == key).token_ids) for key in found]
        assert lengths == sorted(lengths)
