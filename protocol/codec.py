"""MessagePack bytes to messages and back. The only way in for a peer's bytes.

A frame is one map: {"k": kind, "i": correlation id, "t": message tag, "b": body, "d": deadline}. Kinds:
"req" asks, "part" is one piece of a streamed reply, "end" the final reply, "err" a failed final reply,
"cancel" takes a request back. Decoding never trusts: size, depth, types and tag are checked, and whatever
is wrong raises PeerProtocolError and nothing else. Rows travel as columns (table.py).
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, Literal, NamedTuple, TypeGuard, get_type_hints

import msgpack
from pydantic import TypeAdapter, ValidationError

from protocol import messages
from protocol.errors import PeerProtocolError
from protocol.table import Table, row_type

MAX_FRAME_BYTES = 32 * 1024 * 1024
Kind = Literal["req", "part", "end", "err", "cancel"]
_KINDS = frozenset(("req", "part", "end", "err", "cancel"))


class Frame(NamedTuple):
    kind: Kind
    correlation: int
    body: Any = None  # a message, for req, part and end; the wire form of an error for err; None for cancel
    deadline_ms: int = 0  # how long the sender of a "req" will wait


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@cache
def _fields(cls: type) -> tuple[tuple[str, type[Any] | None], ...]:
    """Names of a message's fields, each with the type of its rows where it holds rows. Raises TypeError: no message."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple((field.name, row_type(hints[field.name])) for field in dataclasses.fields(cls))


def _as_map(value: Any) -> dict[str, Any]:
    """What MessagePack makes of a message: called for whatever it does not know. Raises TypeError: not a dataclass."""
    packed = {}
    for name, row in _fields(value.__class__):
        field = getattr(value, name)
        packed[name] = field if row is None else Table.of(row, field).packed()
    return packed


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Raises PeerProtocolError: larger than MAX_FRAME_BYTES."""
    packed: dict[str, Any] = {"k": frame.kind, "i": frame.correlation}
    if frame.kind == "err":
        packed["b"] = frame.body
    elif frame.body is not None:
        packed["t"] = messages.tag_of(type(frame.body))
        packed["b"] = frame.body
    if frame.deadline_ms:
        packed["d"] = frame.deadline_ms
    # surrogatepass on both sides: a lone surrogate in a client's JSON is ugly, not a reason to lose the turn.
    data = msgpack.packb(packed, default=_as_map, use_bin_type=True, unicode_errors="surrogatepass")
    if len(data) > MAX_FRAME_BYTES:
        raise PeerProtocolError(f"message of {len(data)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return bytes(data)


def decode(data: bytes) -> Frame:
    """The frame in `data`. Raises PeerProtocolError for anything that is not one."""
    if len(data) > MAX_FRAME_BYTES:
        raise PeerProtocolError(f"frame of {len(data)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        raw = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True, unicode_errors="surrogatepass")
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise PeerProtocolError(f"not MessagePack: {type(error).__name__}") from error
    if not isinstance(raw, dict):
        raise PeerProtocolError("a frame is a map")
    kind, correlation, deadline = raw.get("k"), raw.get("i"), raw.get("d", 0)
    if not _is_kind(kind) or not _is_count(correlation) or not _is_count(deadline):
        raise PeerProtocolError("a frame has a kind, a correlation id and a deadline")
    if kind == "cancel":
        return Frame("cancel", correlation)
    body = raw.get("b")
    if kind == "err":
        return Frame("err", correlation, _decode_error(body))
    return Frame(kind, correlation, _decode_message(raw.get("t"), body), deadline)


def correlation_of(data: bytes) -> int | None:
    """The correlation id of a frame that did not decode, where it is legible, so that its sender gets an answer."""
    try:
        raw = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True, unicode_errors="replace")
    except Exception:  # whatever is wrong with it was reported by decode already
        return None
    value = raw.get("i") if isinstance(raw, dict) else None
    return value if _is_count(value) else None


def _decode_message(tag: Any, body: Any) -> Any:
    if not isinstance(tag, str):
        raise PeerProtocolError(f"a message tag is text, not {type(tag).__name__}")
    cls = messages.REGISTRY.get(tag)
    if cls is None:
        raise PeerProtocolError(f"unknown message {tag[:100]!r}")
    if not isinstance(body, dict):
        raise PeerProtocolError(f"the body of {tag} is a map")
    try:
        return _adapter(cls).validate_python(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PeerProtocolError(f"{tag}.{where}: {first['msg']}") from error


def _decode_error(body: Any) -> dict[str, str | None]:
    """The wire form of an error, see errors.to_wire."""
    if not isinstance(body, dict):
        raise PeerProtocolError("the body of an error is a map")
    code, message, param = body.get("code"), body.get("message", ""), body.get("param")
    if not isinstance(code, str) or not isinstance(message, str) or not isinstance(param, str | None):
        raise PeerProtocolError("an error has a code, a message and perhaps a param")
    return {"code": code, "message": message, "param": param}


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_kind(value: Any) -> TypeGuard[Kind]:
    return isinstance(value, str) and value in _KINDS  # a map would not even hash
