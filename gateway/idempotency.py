"""Requests that a client may send again: who asks with the same key gets the same turns, running or done.

Kept in memory, for an hour: a restart of the gateway forgets them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from gateway.turn import Turn
from protocol.errors import CallerError, InvalidRequest

_KEPT_S = 3600.0
_LONGEST_KEY = 255
_TURN_BYTES = 4096  # of a turn beside its request


class IdempotencyConflict(CallerError):
    """The key came before, with another request."""

    code = "idempotency_key_reused"
    http_status = 422


@dataclass(frozen=True)
class _Entry:
    request: bytes
    turns: Sequence[Turn]
    bytes: int
    until_s: float


class Idempotency:
    """Owned by one loop. Times are monotonic seconds."""

    def __init__(self, limit_bytes: int = 64 * 1024 * 1024) -> None:
        """limit_bytes: of requests and answers, about; the oldest are forgotten."""
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._entries: OrderedDict[tuple[bytes, str], _Entry] = OrderedDict()

    def find(self, tenant: bytes, key: str, request: bytes, now_s: float) -> Sequence[Turn] | None:
        """The turns that this request began earlier, unless one of them failed or nobody remembers: then it is new.

        Raises InvalidRequest: no good key. IdempotencyConflict: it came with another request.
        """
        if not 0 < len(key) <= _LONGEST_KEY:
            raise InvalidRequest(f"Idempotency-Key must have 1 to {_LONGEST_KEY} characters", param="Idempotency-Key")
        entry = self._entries.get((tenant, key))
        if entry is None or entry.until_s < now_s or any(turn.has_failed for turn in entry.turns):
            return None
        if entry.request != _digest(request):
            raise IdempotencyConflict(
                "this Idempotency-Key came before with another request; use a new one", param="Idempotency-Key"
            )
        return entry.turns

    def note(self, tenant: bytes, key: str, request: bytes, turns: Sequence[Turn], now_s: float) -> None:
        self._forget((tenant, key))
        size = len(turns) * (_TURN_BYTES + len(request))
        self._entries[tenant, key] = _Entry(_digest(request), turns, size, now_s + _KEPT_S)
        self._bytes += size
        while self._bytes > self._limit_bytes or self._oldest_until_s() < now_s:
            self._forget(next(iter(self._entries)))

    def forget(self, conversation_id: bytes) -> None:
        """Its answers are not to be had any more."""
        for name, entry in list(self._entries.items()):
            if any(turn.conversation_id == conversation_id for turn in entry.turns):
                self._forget(name)

    def _oldest_until_s(self) -> float:
        return next((entry.until_s for entry in self._entries.values()), float("inf"))

    def _forget(self, name: tuple[bytes, str]) -> None:
        if entry := self._entries.pop(name, None):
            self._bytes -= entry.bytes


def _digest(request: bytes) -> bytes:
    return blake2b(request, digest_size=16).digest()
