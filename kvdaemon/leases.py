"""Leases: promises that chunks stay readable, each held by one client and ending in exactly one way.

granted ──release──▶ ended      by its holder
   └─────revoke────▶ ended      its time is up, its holder died, or a chunk of it is erased
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from kvdaemon.index import Chunk, ChunkIndex
from protocol.errors import InvalidRequest
from protocol.ids import new_id


@dataclass(frozen=True, eq=False)
class Lease:
    """chunks are entries, not ids: one that left the index and came back is another entry, with its own count."""

    lease_id: bytes
    client: bytes
    chunks: tuple[Chunk, ...]
    expires_s: float


class LeaseBook:
    """All open leases. Each holds each of its chunks once. One loop owns it."""

    def __init__(self, index: ChunkIndex) -> None:
        self._index = index
        self._open: dict[bytes, Lease] = {}
        self._expiry: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self._open)

    def holders(self) -> frozenset[bytes]:
        return frozenset(lease.client for lease in self._open.values())

    def grant(self, client: bytes, chunks: Sequence[Chunk], expires_s: float) -> Lease:
        lease = Lease(new_id(), client, tuple(chunks), expires_s)
        self._index.hold(lease.chunks)
        self._open[lease.lease_id] = lease
        heapq.heappush(self._expiry, (expires_s, lease.lease_id))
        return lease

    def release(self, lease_id: bytes, client: bytes) -> Lease:
        """Raises InvalidRequest: no such lease (released before, or revoked), or somebody else's."""
        lease = self._open.get(lease_id)
        if lease is None or lease.client != client:
            raise InvalidRequest("no such lease; it was released or revoked before", param="lease_id")
        return self._end(lease)

    def revoke_expired(self, now_s: float) -> list[Lease]:
        """End the leases whose time is up. Returns them."""
        ended = []
        while self._expiry and self._expiry[0][0] <= now_s:
            lease = self._open.get(heapq.heappop(self._expiry)[1])
            if lease is not None:
                ended.append(self._end(lease))
        if len(self._expiry) > 64 and len(self._expiry) > 4 * len(self._open):
            # Released leases leave their expiry behind; a busy daemon must not collect them until they are due.
            self._expiry = [(lease.expires_s, lease.lease_id) for lease in self._open.values()]
            heapq.heapify(self._expiry)
        return ended

    def revoke_client(self, client: bytes) -> list[Lease]:
        """End all leases of a client that died. Returns them."""
        return [self._end(lease) for lease in list(self._open.values()) if lease.client == client]

    def revoke_holding(self, chunk: Chunk) -> list[Lease]:
        """End all leases on a chunk. Returns them."""
        return [self._end(lease) for lease in list(self._open.values()) if chunk in lease.chunks]

    def _end(self, lease: Lease) -> Lease:
        del self._open[lease.lease_id]
        self._index.release(lease.chunks)
        return lease
