"""Leases end exactly once, by their holder, by time or by their holder's death."""

from __future__ import annotations

import pytest

from kvdaemon.index import Chunk, ChunkIndex, Residence
from kvdaemon.leases import LeaseBook
from kvdaemon.placement.lru import LeastRecentlyUsed
from kvdaemon.placement.placement import Placement
from protocol.errors import InvalidRequest

A, B = b"a" * 16, b"b" * 16


class Book(LeaseBook):
    """With the index and the placement that its leases hold chunks in."""

    def __init__(self) -> None:
        self.placement = Placement(LeastRecentlyUsed(), {"dram": 10, "ssd": 10})
        self.index = ChunkIndex(self.placement, lambda: 0.0)
        super().__init__(self.index)

    def chunk(self, name: bytes = b"c") -> Chunk:
        chunk = self.index.add(name * 16, b"p" * 16, b"n" * 16, 1)
        self.index.place(chunk, 0, 1, Residence.READY)
        self.index.mark_clean(chunk)
        return chunk

    @property
    def victim(self) -> bytes | None:
        return self.placement.next_victim("dram", 0.0)


def test_counts_follow_leases() -> None:
    """A chunk counts its leases; a second lease keeps it held."""
    book = Book()
    held = book.chunk()
    first, second = book.grant(A, [held], 10.0), book.grant(B, [held], 10.0)
    assert held.leases == 2
    assert book.victim is None
    book.release(first.lease_id, A)
    assert (held.leases, len(book), book.holders()) == (1, 1, {B})
    book.release(second.lease_id, B)
    assert (held.leases, len(book)) == (0, 0)
    assert book.victim == held.chunk_id


def test_a_lease_ends_once() -> None:
    """Released twice, released by somebody else, unknown, or after it was revoked: refused, and nothing changes."""
    book = Book()
    held = book.chunk()
    lease = book.grant(A, [held], 10.0)
    for lease_id, client in ((lease.lease_id, B), (b"x" * 16, A)):
        with pytest.raises(InvalidRequest):
            book.release(lease_id, client)
    assert held.leases == 1
    book.release(lease.lease_id, A)
    with pytest.raises(InvalidRequest):
        book.release(lease.lease_id, A)
    late = book.grant(A, [held], 5.0)
    assert book.revoke_expired(5.0) == [late]
    with pytest.raises(InvalidRequest):
        book.release(late.lease_id, A)
    assert held.leases == 0


def test_only_what_is_due_expires() -> None:
    book = Book()
    due, later = book.grant(A, [], 1.0), book.grant(A, [], 2.0)
    released = book.grant(A, [], 0.5)
    book.release(released.lease_id, A)
    assert book.revoke_expired(0.9) == []
    assert book.revoke_expired(1.0) == [due]
    assert book.revoke_expired(9.0) == [later]


def test_death_of_a_client_ends_its_leases_only() -> None:
    book = Book()
    held = book.chunk()
    mine, other = book.grant(A, [held], 9.0), book.grant(B, [held], 9.0)
    assert book.revoke_client(A) == [mine]
    assert (held.leases, book.holders()) == (1, {B})
    book.release(other.lease_id, B)


def test_released_leases_leave_no_trace() -> None:
    """Expiry times of released leases are swept, long before they are due."""
    book = Book()
    for _ in range(10_000):
        book.release(book.grant(A, [], 1e9).lease_id, A)
        book.revoke_expired(0.0)
    assert len(book._expiry) < 200


def test_leases_on_an_erased_chunk_are_revoked() -> None:
    """All that hold it, and no other; their other chunks are let go of too."""
    book = Book()
    erased, other = book.chunk(b"e"), book.chunk(b"o")
    both, alone = book.grant(A, [erased, other], 10.0), book.grant(B, [other], 10.0)
    assert book.revoke_holding(erased) == [both]
    assert (erased.leases, other.leases, len(book)) == (0, 1, 1)
    with pytest.raises(InvalidRequest):
        book.release(both.lease_id, A)
    book.release(alone.lease_id, B)
