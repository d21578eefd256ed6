"""One tree of errors; its branches tell whose fault it is.

    CachedAttentionError
    ├── CallerError              the request is wrong; sending it again changes nothing
    │   ├── InvalidRequest
    │   ├── ContextLengthExceeded
    │   ├── ModelNotFound
    │   └── UnsupportedModel
    ├── CapacityError            the request is fine, there is no room for it now
    │   └── QueueFull
    ├── PeerError                another process of ours is missing, slow or wrong
    │   ├── PeerUnavailable
    │   ├── PeerTimeout
    │   └── PeerProtocolError
    ├── Cancelled                the caller went away
    ├── ConfigError              the configuration cannot work; stops a process at start
    └── InternalError            our bug

Every class carries the HTTP status that fits it and whether trying again may help; only the gateway turns
that into HTTP. `to_wire` and `from_wire` carry an error across a socket without its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class CachedAttentionError(Exception):
    """Base of all our errors. `param` names the field at fault, where there is one.

    retry_after_s: when trying again may help, where that can be told; not carried across a socket.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class CallerError(CachedAttentionError):
    code = "invalid_request_error"
    http_status = 400


class InvalidRequest(CallerError):
    code = "invalid_request"


class ContextLengthExceeded(CallerError):
    code = "context_length_exceeded"


class ModelNotFound(CallerError):
    code = "model_not_found"
    http_status = 404


class UnsupportedModel(CallerError):
    code = "unsupported_model"


class CapacityError(CachedAttentionError):
    code = "no_capacity"
    http_status = 503
    retryable = True


class QueueFull(CapacityError):
    code = "queue_full"
    http_status = 429


class PeerError(CachedAttentionError):
    code = "peer_error"
    http_status = 503
    retryable = True


class PeerUnavailable(PeerError):
    code = "peer_unavailable"


class PeerTimeout(PeerError):
    code = "peer_timeout"
    http_status = 504


class PeerProtocolError(PeerError):
    """A peer sent bytes that are no message of ours, or speaks another protocol version."""

    code = "peer_protocol_error"
    http_status = 502
    retryable = False


class Cancelled(CachedAttentionError):
    code = "cancelled"
    http_status = 499


class ConfigError(CachedAttentionError):
    code = "config_error"


class InternalError(CachedAttentionError):
    code = "internal_error"


def _tree(root: type[CachedAttentionError]) -> dict[str, type[CachedAttentionError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE = _tree(CachedAttentionError) | {"internal_error": InternalError}


def to_wire(error: BaseException) -> dict[str, str | None]:
    """The fields of `error` that may cross a socket. A foreign exception becomes an internal error."""
    if isinstance(error, CachedAttentionError):
        return {"code": error.code, "message": error.message, "param": error.param}
    return {"code": InternalError.code, "message": f"{type(error).__name__}: {error}", "param": None}


def from_wire(code: str, message: str, param: str | None = None) -> CachedAttentionError:
    """The error a peer reported. A code we do not know (a newer peer) becomes a PeerError."""
    return _BY_CODE.get(code, PeerError)(message, param=param)
