"""Every message goes through the codec unchanged; whatever else arrives is a PeerProtocolError and nothing worse."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import codec
from protocol.codec import Frame, correlation_of, decode, encode
from protocol.errors import PeerProtocolError
from protocol.fields import Bool, Bytes, Count, Float, Id, Int, Str, Tokens
from protocol.messages import (
    REGISTRY,
    Acquire,
    Acquired,
    Hello,
    Ping,
    Reserved,
    ReservedSlot,
    RunTurn,
    Sampling,
    SlotRef,
    TurnDelta,
    TurnUsage,
    Unreserve,
    message,
)
from protocol.table import Table

ids = st.binary(min_size=16, max_size=16)
counts = st.integers(min_value=0, max_value=2**64 - 1)
# Surrogates are in: a client's JSON may carry them, and the codec says that they pass.
texts = st.text(st.characters(exclude_categories=()), max_size=20)

FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    Str: texts,
    Bytes: st.binary(max_size=40),
    Bool: st.booleans(),
    Int: st.integers(min_value=-(2**63), max_value=2**64 - 1),
    Float: st.floats(allow_nan=False),
    Count: counts,
    Id: ids,
    Tokens: st.binary(max_size=10).map(lambda raw: raw * 4),
    type(None): st.none(),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of type `hint` allows."""
    if hint in FIELDS:
        return FIELDS[hint]
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return instances_of(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return values_of(arguments[0])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (UnionType, Union):
        return st.one_of(*(values_of(argument) for argument in arguments))
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=4)
    assert origin in (tuple, Sequence), f"teach this test about {hint}"
    if origin is Sequence or arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=4).map(tuple)
    return st.tuples(*(values_of(argument) for argument in arguments))


def instances_of(cls: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{name: values_of(hint) for name, hint in hints.items()})


def any_message() -> st.SearchStrategy[Any]:
    return st.one_of([instances_of(cls) for cls in REGISTRY.values()])


@pytest.mark.parametrize("cls", REGISTRY.values(), ids=lambda cls: cls.__name__)
def test_every_message_survives_the_wire(cls: type) -> None:
    """encode and decode are inverse for each type, for any values its fields allow."""

    @settings(max_examples=25, deadline=None)
    @given(instances_of(cls), counts, st.integers(0, 2**31), st.sampled_from(("req", "part", "end")))
    def check(body: Any, correlation: int, deadline_ms: int, kind: codec.Kind) -> None:
        frame = Frame(kind, correlation, body, deadline_ms)
        assert decode(encode(frame)) == frame

    check()


def test_cancel_and_error_frames_survive_the_wire() -> None:
    assert decode(encode(Frame("cancel", 7))) == Frame("cancel", 7)
    wire = {"code": "no_capacity", "message": "full \ud800", "param": None}
    assert decode(encode(Frame("err", 8, wire))) == Frame("err", 8, wire)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        decode(data)
    correlation_of(data)


@settings(max_examples=60, deadline=None)
@given(any_message(), st.data())
def test_truncated_and_flipped_frames_are_protocol_errors_or_frames(body: Any, data: st.DataObject) -> None:
    """A shortened frame never decodes; a damaged one decodes to some frame or is a PeerProtocolError."""
    raw = encode(Frame("req", 1, body, 1000))
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(PeerProtocolError):
        decode(raw[:cut])
    with pytest.raises(PeerProtocolError):
        decode(raw + b"\xc0")
    at, value = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 255))
    try:
        decode(raw[:at] + bytes((value,)) + raw[at + 1 :])
    except PeerProtocolError:
        pass


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(json_like, json_like, json_like, st.sampled_from(sorted(REGISTRY)) | json_like, json_like)
def test_wrong_types_anywhere_are_protocol_errors(kind: Any, correlation: Any, deadline: Any, tag: Any, b: Any) -> None:
    """A well-formed map with any value in any field is a frame or a PeerProtocolError."""
    for k, i in ((kind, correlation), ("req", correlation), ("req", 1), ("err", 1)):
        data = msgpack.packb({"k": k, "i": i, "d": deadline, "t": tag, "b": b})
        try:
            decode(data)
        except PeerProtocolError:
            pass


@pytest.mark.parametrize(
    "field", [b"\xa1k", b"\xa1i", b"\xa1t", b"\xa1b", b"\xa1d"], ids=["kind", "id", "tag", "body", "deadline"]
)
@pytest.mark.parametrize("depth", [10, 1_000, 100_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x"], ids=["arrays", "maps"])
def test_deep_nesting_is_a_protocol_error(field: bytes, depth: int, opening: bytes) -> None:
    """Neither the parser nor the error message recurses without end."""
    whole = {b"\xa1k": b"\xa3req", b"\xa1i": b"\x01", b"\xa1t": b"\xa5hello", b"\xa1b": b"\x80", b"\xa1d": b"\x00"}
    whole[field] = opening * depth + b"\xc0"
    with pytest.raises(PeerProtocolError):
        decode(b"\x85" + b"".join(key + value for key, value in whole.items()))


@pytest.mark.parametrize(
    "raw",
    [
        {"k": {}, "i": 1},  # not even hashable
        {"k": "req", "i": -1, "t": "ping", "b": {}},
        {"k": "req", "i": True, "t": "ping", "b": {}},
        {"k": "req", "i": 1.0, "t": "ping", "b": {}},
        {"k": "req", "i": 1, "t": "no such message", "b": {}},
        {"k": "req", "i": 1, "t": b"ping", "b": {}},
        {"k": "req", "i": 1, "t": "ping", "b": []},
        {"k": "req", "i": 1, "t": "ping"},
        {"k": "req", "i": 1, "t": "ping", "b": {}, "d": -1},
        {"k": "err", "i": 1, "b": {"message": "no code"}},
        {"k": "err", "i": 1, "b": {"code": "x", "message": [[]]}},
        {"k": "err", "i": 1, "b": {"code": "x", "message": "", "param": 5}},
        {"k": "shout", "i": 1, "t": "ping", "b": {}},
        {"k": "req", "i": 1, "t": "ping", "b": msgpack.ExtType(3, b"x")},
        ["req", 1],
        7,
    ],
)
def test_what_is_no_frame_is_refused(raw: Any) -> None:
    with pytest.raises(PeerProtocolError):
        decode(msgpack.packb(raw))


def acquire(**changes: Any) -> bytes:
    body = {"job_id": b"j" * 16, "namespace": b"n" * 16, "chunk_ids": [b"c" * 16], **changes}
    return msgpack.packb({"k": "req", "i": 5, "t": "acquire", "b": body})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"job_id": b"short"}, "acquire.job_id"),
        ({"job_id": "j" * 16}, "acquire.job_id"),  # text is not bytes
        ({"chunk_ids": b"c" * 16}, "acquire.chunk_ids"),
        ({"chunk_ids": [b"c" * 16, "c" * 16]}, "acquire.chunk_ids.1"),
        ({"partial_index": -1}, "acquire.partial_index"),
        ({"partial_index": "0"}, "acquire.partial_index"),  # a peer's "5" is not 5
        ({"partial_index": True}, "acquire.partial_index"),
        ({"lease_ms": 1.5}, "acquire.lease_ms"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(PeerProtocolError, match=named.replace(".", r"\.")):
        decode(acquire(**changes))
    assert correlation_of(acquire(**changes)) == 5  # so that its sender gets an answer


def test_a_missing_field_is_named() -> None:
    with pytest.raises(PeerProtocolError, match=r"hello\.role"):
        decode(msgpack.packb({"k": "req", "i": 1, "t": "hello", "b": {"protocol_version": 1, "client_id": b"c" * 16}}))


def packed(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


SLOTS = {
    "slot": packed(4, 2**64 - 1),
    "generation": packed(1, 2),
    "chunk_id": [b"c" * 16, b"d" * 16],
    "tokens": packed(256, 7),
}


def acquired(**changes: Any) -> bytes:
    """The frame of an answer with two chunks, with these changes to its columns; None takes a column away."""
    columns = {**SLOTS, "tier": ["dram", "ssd"], "verify": [False, True], **changes}
    chunks = {name: column for name, column in columns.items() if column is not None}
    return msgpack.packb({"k": "end", "i": 5, "t": "acquired", "b": {"lease_id": b"l" * 16, "chunks": chunks}})


def test_rows_travel_as_columns() -> None:
    one, two = SlotRef(4, 1, b"c" * 16, 256, "dram"), SlotRef(2**64 - 1, 2, b"d" * 16, 7, "ssd", verify=True)
    frame = Frame("end", 5, Acquired(b"l" * 16, (one, two)))
    assert decode(acquired()) == frame
    raw = msgpack.unpackb(encode(frame))
    assert raw["b"]["chunks"] == {**SLOTS, "tier": ["dram", "ssd"], "verify": [False, True]}
    none = msgpack.unpackb(encode(Frame("end", 5, Reserved(()))))
    assert none["b"]["slots"] == {"slot": b"", "generation": b""}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"slot": packed(4)}, "acquired.chunks: .* one length"),
        ({"verify": [True]}, "acquired.chunks: .* one length"),  # also where a column might be missing
        ({"verify": [True] * 3}, "acquired.chunks: .* one length"),
        ({"generation": None}, "acquired.chunks.generation: Field required"),
        ({"slot": packed(4, 5)[:-1]}, "acquired.chunks.slot"),
        ({"slot": [4, 5]}, "acquired.chunks.slot"),
        ({"slot": 4}, "acquired.chunks.slot"),
        ({"slot": {"4": 5, "6": 7}}, "acquired.chunks.slot"),
        ({"slot": "4" * 16}, "acquired.chunks.slot"),
        ({"chunk_id": [b"c" * 16, b"d" * 15]}, "acquired.chunks.chunk_id.1"),
        ({"chunk_id": b"c" * 32}, "acquired.chunks.chunk_id"),
        ({"tier": ["dram", "tape"]}, "acquired.chunks.tier.1"),
        ({"tier": "dram"}, "acquired.chunks.tier"),
        ({"verify": [0, 1]}, "acquired.chunks.verify.0"),
    ],
)
def test_a_wrong_column_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(PeerProtocolError, match=named.replace(".", r"\.").replace(r"\.*", ".*")):
        decode(acquired(**changes))


@pytest.mark.parametrize("chunks", [[], [SLOTS], 5, None, "slot", {}], ids=repr)
def test_what_is_no_map_of_columns_is_refused(chunks: Any) -> None:
    body = {"lease_id": b"l" * 16, "chunks": chunks}
    with pytest.raises(PeerProtocolError, match=r"acquired\.chunks"):
        decode(msgpack.packb({"k": "end", "i": 5, "t": "acquired", "b": body}))


def test_columns_come_and_go_as_fields_do() -> None:
    """A column that is missing gives each row the default; one that nobody knows is ignored."""
    assert [ref.verify for ref in decode(acquired(verify=None)).body.chunks] == [False, False]
    assert decode(acquired(heat=[1, 2, 3])) == decode(acquired())


def test_a_table_is_a_sequence_of_its_rows() -> None:
    rows = (ReservedSlot(4, 1), ReservedSlot(5, 2), ReservedSlot(6, 3))
    table = Table(ReservedSlot, slot=[4, 5, 6], generation=[1, 2, 3])
    assert (tuple(table), len(table), table[1], table[-1]) == (rows, 3, rows[1], rows[2])
    assert table == Table.of(ReservedSlot, rows) == rows
    assert table[1:] == rows[1:] != table
    assert hash(table) == hash(rows)
    assert not table[3:]
    with pytest.raises(IndexError):
        table[3]
    with pytest.raises(ValueError, match="one length"):
        Table(ReservedSlot, slot=[4, 5], generation=[1])


@pytest.mark.parametrize(
    "rows", [[(1, 2, 3)], [5], [(1, 2), (1,)], 7, [ReservedSlot(-1, 1)], [ReservedSlot(1, 2**64)], [("1", 2)]], ids=repr
)
def test_what_are_no_rows_is_not_sent(rows: Any) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        encode(Frame("req", 1, Unreserve(rows)))


def test_token_ids_come_whole() -> None:
    data = msgpack.packb({"k": "part", "i": 1, "t": "turn_delta", "b": {"text": "", "tokens": b"12345"}})
    with pytest.raises(PeerProtocolError, match="whole number"):
        decode(data)


def test_a_newer_peers_extra_fields_are_ignored() -> None:
    assert decode(acquire(priority=9, lease_ms=5)).body == Acquire(b"j" * 16, b"n" * 16, (b"c" * 16,), lease_ms=5)
    data = msgpack.packb({"k": "req", "i": 1, "t": "ping", "b": {"new": 1}, "z": "new too"})
    assert decode(data) == Frame("req", 1, Ping())


def test_an_older_peers_missing_fields_take_their_defaults() -> None:
    assert decode(acquire()).body == Acquire(b"j" * 16, b"n" * 16, (b"c" * 16,))
    hello = {"protocol_version": 1, "role": "cli", "client_id": b"c" * 16}
    assert decode(msgpack.packb({"k": "req", "i": 1, "t": "hello", "b": hello})).body.heartbeat_s == 1.0


def test_oversize_is_refused_both_ways() -> None:
    big = "x" * codec.MAX_FRAME_BYTES
    with pytest.raises(PeerProtocolError, match="over the limit"):
        encode(Frame("part", 1, TurnDelta(big, b"")))
    with pytest.raises(PeerProtocolError, match="over the limit"):
        decode(bytes(codec.MAX_FRAME_BYTES + 1))


def test_a_claimed_size_is_not_believed() -> None:
    """A five-byte frame that announces four billion items costs no memory."""
    for header in (b"\xdd", b"\xdf", b"\xc6", b"\xdb"):
        with pytest.raises(PeerProtocolError):
            decode(header + b"\xff\xff\xff\xff")


def test_messages_are_frozen_and_distinct_on_the_wire() -> None:
    assert len(REGISTRY) == len(set(REGISTRY.values()))
    for cls in REGISTRY.values():
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen, cls  # type: ignore[attr-defined]
        assert cls.__doc__, cls
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().top_p = 0.5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        SlotRef(1, 2, b"c" * 16, 3, "dram").slot = 2  # type: ignore[misc]


def test_two_messages_cannot_share_a_tag() -> None:
    with pytest.raises(ValueError, match="two messages"):
        message("hello")(type("Other", (), {}))


def test_defaults_are_not_shared_between_instances() -> None:
    assert TurnUsage(1, 1).missed is not TurnUsage(1, 1).missed


def test_hello_keeps_its_shape() -> None:
    """The first message must stay readable to every version ever released: its bytes are pinned."""
    frame = Frame("req", 1, Hello(1, "cli", bytes(16)), 2000)
    assert encode(frame).hex() == (
        "85a16ba3726571a16901a174a568656c6c6fa16284b070726f746f636f6c5f76657273696f6e01a4726f6c65a3636c69"
        "a9636c69656e745f6964c41000000000000000000000000000000000ab6865617274626561745f73cb3ff0000000000000"
        "a164cd07d0"
    )


def test_run_turn_without_a_parent() -> None:
    turn = RunTurn(b"j" * 16, (), b"k" * 16, b"salt", Sampling())
    assert decode(encode(Frame("req", 1, turn))).body.parent_turn_key is None
