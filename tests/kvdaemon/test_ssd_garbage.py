"""Which files to rewrite for the space of deleted chunks: a pure decision."""

from __future__ import annotations

from kvdaemon.ssd.garbage import Garbage, Retired, TableFile, by_file


def place(time: int) -> bytes:
    return bytes([time]) * 24


def file(first: int, size_bytes: int = 1000) -> TableFile:
    return TableFile(place(first) + b"\0\0", size_bytes)


def test_the_largest_share_of_garbage_first() -> None:
    """Of the file, not in bytes: that is what is won for each byte that has to be rewritten."""
    a, b, c, d = (Retired(place(time), 3, size) for time, size in ((11, 100), (12, 300), (25, 900), (31, 500)))
    files = [file(30, 600), file(10, 500), file(20, 10_000)]
    assert by_file([d, b, c, a], files) == [Garbage((d,), 600), Garbage((a, b), 500), Garbage((c,), 10_000)]


def test_borders() -> None:
    """A chunk belongs to the file that its first layer lies in; before the first file, or without any, to one too."""
    first, border, last = Retired(place(1), 1, 1), Retired(place(20), 1, 1), Retired(place(99), 1, 1)
    groups = by_file([first, border, last], [file(10), file(20)])
    assert {garbage.chunks for garbage in groups} == {(first,), (border, last)}
    assert by_file([first, last], []) == [Garbage((first, last), 0)]
    assert by_file([], [file(10)]) == []
