"""Ids: pinned for ever (they name data on disk), and of one kind each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import ids
from protocol.ids import Message

NAMESPACE = bytes(range(16))


def test_golden_values() -> None:
    """A change here orphans every store in the field: it needs a new layout version, not a new number."""
    message = Message("user", "Grüße \ud800", "ann", "call-1", '{"a":1}')
    golden = {
        "chunk": ids.chunk_id(NAMESPACE, ids.ROOT, [1, 2, 3]),
        "child": ids.lineage(NAMESPACE, np.arange(5, dtype=np.uint32), 2)[-1],
        "model": ids.model_namespace(b"w", b"g", "float32", "plain", "linear"),
        "tenant": ids.tenant_namespace(NAMESPACE, b"salt"),
        "root": ids.conversation_root(b"salt", b"m" * 16, b"t" * 16),
        "turn": ids.turn_key(ids.ROOT, message),
    }
    assert {name: value.hex() for name, value in golden.items()} == {
        "chunk": "5c09b7352cc8fde56db311d3f5fa6e3e",
        "child": "b64e0ff49a390f583ecec0ce88bcfae8",
        "model": "95c9a4804e81488f61834080d9edfed4",
        "tenant": "8ba4c90740a9a4833a643335c38adc07",
        "root": "2d40982e8af7bb607ddf1c24685b4db6",
        "turn": "7334941d365839d179f5b4d0608f2996",
    }


tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(tokens)
def test_packed_tokens_come_back(token_ids: list[int]) -> None:
    packed = ids.pack_tokens(token_ids)
    assert len(packed) == 4 * len(token_ids)
    assert ids.unpack_tokens(packed).tolist() == token_ids
    assert ids.pack_tokens(np.array(token_ids, dtype=np.uint32)) == packed


def test_unpacked_tokens_are_read_only_and_whole() -> None:
    with pytest.raises(ValueError, match="read-only"):
        ids.unpack_tokens(ids.pack_tokens([1]))[0] = 2
    with pytest.raises(ValueError):
        ids.unpack_tokens(b"12345")
    with pytest.raises(OverflowError):
        ids.pack_tokens([-1])


@given(tokens, st.integers(1, 9))
def test_lineage_chains_chunk_ids(token_ids: list[int], chunk_tokens: int) -> None:
    chain = ids.lineage(NAMESPACE, np.array(token_ids, dtype=np.uint32), chunk_tokens)
    assert len(chain) == -(-len(token_ids) // chunk_tokens)
    parent = ids.ROOT
    for index, chunk in enumerate(chain):
        part = token_ids[index * chunk_tokens : (index + 1) * chunk_tokens]
        assert chunk == ids.chunk_id(NAMESPACE, parent, part)
        parent = chunk


@given(tokens, tokens, st.integers(1, 9))
def test_lineage_is_equal_exactly_as_far_as_the_tokens_are(a: list[int], b: list[int], chunk_tokens: int) -> None:
    """The same chunk id means the same tokens at the same place after the same history, and nothing else."""
    one = ids.lineage(NAMESPACE, np.array(a, dtype=np.uint32), chunk_tokens)
    other = ids.lineage(NAMESPACE, np.array(b, dtype=np.uint32), chunk_tokens)
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        end = (index + 1) * chunk_tokens
        assert (left == right) == (a[:end] == b[:end])


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.integers(1, 9))
def test_growing_a_context_keeps_its_full_chunks(token_ids: list[int], chunk_tokens: int) -> None:
    short = ids.lineage(NAMESPACE, np.array(token_ids, dtype=np.uint32), chunk_tokens)
    longer = ids.lineage(NAMESPACE, np.array([*token_ids, 7], dtype=np.uint32), chunk_tokens)
    full = len(token_ids) // chunk_tokens
    assert longer[:full] == short[:full]
    assert len(token_ids) % chunk_tokens == 0 or longer[full] != short[full]


def test_namespaces_share_nothing() -> None:
    token_ids = np.arange(10, dtype=np.uint32)
    ann = ids.tenant_namespace(NAMESPACE, b"ann")
    bob = ids.tenant_namespace(NAMESPACE, b"bob")
    assert not set(ids.lineage(ann, token_ids, 3)) & set(ids.lineage(bob, token_ids, 3))


@pytest.mark.parametrize("changed", range(5))
def test_every_part_of_a_model_namespace_counts(changed: int) -> None:
    base = [b"weights", b"geometry", "float32", "plain", "rope"]
    other = list(base)
    other[changed] = b"x" if isinstance(base[changed], bytes) else "x"
    assert ids.model_namespace(*base) != ids.model_namespace(*other)  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", ["role", "content", "name", "tool_call_id", "tool_calls"])
def test_every_part_of_a_message_counts(changed: str) -> None:
    base = {"role": "user", "content": "a", "name": "b", "tool_call_id": "c", "tool_calls": "d"}
    assert ids.turn_key(ids.ROOT, Message(**base)) != ids.turn_key(ids.ROOT, Message(**(base | {changed: "x"})))


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_parts_are_not_run_together(a: list[bytes], b: list[bytes]) -> None:
    """ "ab" + "c" is not "a" + "bc"."""
    assert (ids.digest("chunk", *a) == ids.digest("chunk", *b)) == (a == b)


def test_kinds_never_collide() -> None:
    kinds = ("chunk", "geometry", "model namespace", "tenant namesp", "conversation", "turn key")
    assert len({ids.digest(kind, b"same", b"parts") for kind in kinds}) == len(kinds)
    assert len({ids.digest(kind) for kind in kinds}) == len(kinds)


def test_turn_keys_are_those_of_all_prefixes() -> None:
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "a")]
    keys = ids.turn_keys(NAMESPACE, messages)
    assert len(set(keys)) == 3
    assert ids.turn_keys(NAMESPACE, messages[:2]) == keys[:2]
    assert ids.turn_key(keys[1], messages[2]) == keys[2]


def test_canonical_json_ignores_order_and_space() -> None:
    assert ids.canonical_json({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'


def test_new_ids_are_new() -> None:
    assert len({ids.new_id() for _ in range(100)}) == 100
