"""The error tree: every class keeps its place, its status and its identity across a socket."""

from __future__ import annotations

import pytest

from protocol import errors
from protocol.errors import (
    CachedAttentionError,
    CallerError,
    Cancelled,
    CapacityError,
    ConfigError,
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    PeerError,
    PeerProtocolError,
    PeerTimeout,
    PeerUnavailable,
    QueueFull,
    UnsupportedModel,
    from_wire,
    to_wire,
)

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def test_branches_say_whose_fault_it_is() -> None:
    branches = {
        CallerError: {InvalidRequest, ContextLengthExceeded, ModelNotFound, UnsupportedModel},
        CapacityError: {QueueFull},
        PeerError: {PeerUnavailable, PeerTimeout, PeerProtocolError},
    }
    for branch, leaves in branches.items():
        assert {cls for cls in CLASSES if issubclass(cls, branch)} == {branch} | leaves
    assert {cls for cls in CLASSES if CachedAttentionError in cls.__bases__} == {
        *branches,
        Cancelled,
        ConfigError,
        InternalError,
    }


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in CLASSES if cls is not CachedAttentionError]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not CachedAttentionError])
def test_every_error_survives_the_wire(cls: type[CachedAttentionError]) -> None:
    back = from_wire(**to_wire(cls("what went wrong", param="dram")))  # type: ignore[arg-type]
    assert type(back) is cls
    assert (back.message, back.param, str(back)) == ("what went wrong", "dram", "what went wrong")


def test_a_foreign_exception_becomes_an_internal_error() -> None:
    wire = to_wire(ZeroDivisionError("division by zero"))
    assert wire == {"code": "internal_error", "message": "ZeroDivisionError: division by zero", "param": None}
    assert type(from_wire(**wire)) is InternalError  # type: ignore[arg-type]


def test_an_unknown_code_is_a_peer_error() -> None:
    """A newer peer may know errors that we do not."""
    error = from_wire("on_fire", "help")
    assert type(error) is PeerError
    assert error.message == "help"


@pytest.mark.parametrize(
    ("cls", "status", "retryable"),
    [
        (InvalidRequest, 400, False),
        (ContextLengthExceeded, 400, False),
        (ModelNotFound, 404, False),
        (QueueFull, 429, True),
        (CapacityError, 503, True),
        (PeerUnavailable, 503, True),
        (PeerTimeout, 504, True),
        (PeerProtocolError, 502, False),
        (InternalError, 500, False),
    ],
)
def test_http_hints(cls: type[CachedAttentionError], status: int, retryable: bool) -> None:
    assert (cls.http_status, cls.retryable) == (status, retryable)
