"""Chunk files on a real disk: bytes at places, holes, and sweeps for places that nobody knows."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

import pytest

from kvdaemon.ssd.chunk_files import ChunkFiles, Place
from protocol.errors import PeerProtocolError

_SLOT = 64 * 1024


def pages(content: bytes, size: int = _SLOT) -> memoryview:
    """Page-aligned memory full of `content`."""
    memory = mmap.mmap(-1, size)
    memory[:] = (content * size)[:size]
    return memoryview(memory)


def read(files: ChunkFiles, place: Place, size: int = _SLOT, offset: int = 0) -> bytes:
    into = pages(b"?", size)
    files.read(place, offset, into)
    return bytes(into)


def with_slots(directory: Path, count: int, content: bytes) -> tuple[ChunkFiles, list[Place]]:
    """New files with `count` slots full of `content`."""
    files = ChunkFiles(directory)
    places = [files.take(_SLOT) for _ in range(count)]
    for place in places:
        files.write(place, 0, pages(content))
    return files, places


def open_swept(directory: Path, known: set[Place]) -> ChunkFiles:
    files = ChunkFiles(directory)
    files.suspect()
    for place in known:
        files.clear(place)
    for place in list(files.suspects()):
        files.destroy(place)
        files.give(place)
    return files


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Slots of two sizes, in pieces, by several threads, and after opening again; on a short slot at the end too."""
    files = ChunkFiles(tmp_path / "chunks")
    places = [files.take(size) for size in (_SLOT, 4 * _SLOT) for _ in range(8)]
    assert len(set(places)) == 16

    def write(n: int) -> None:
        for offset in range(0, places[n].slot_bytes, _SLOT):
            files.write(places[n], offset, pages(b"%d at %d;" % (n, offset)))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    short = files.take(_SLOT)
    files.write(short, 0, pages(b"short", 4096))
    files.sync()
    files.close()
    files = ChunkFiles(tmp_path / "chunks")
    for n, place in enumerate(places):
        for offset in range(0, place.slot_bytes, _SLOT):
            assert read(files, place, offset=offset) == bytes(pages(b"%d at %d;" % (n, offset)))
    assert read(files, short, 4096) == bytes(pages(b"short", 4096))
    files.close()


def test_space_is_that_of_what_is_there(tmp_path: Path) -> None:
    """A destroyed slot takes none, and its bytes are gone; a partial chunk takes its pages; free slots come first."""
    files, places = with_slots(tmp_path / "chunks", 4, b"SECRET")
    assert files.physical_bytes() == 4 * _SLOT
    for place in (places[2], places[0]):
        files.destroy(place)
        files.give(place)
    assert files.physical_bytes() == 2 * _SLOT
    assert files.spare_bytes() == 0
    assert (tmp_path / "chunks" / str(_SLOT)).read_bytes().count(b"SECRET" * 10) == 2 * (_SLOT // 60)
    assert [files.take(_SLOT) for _ in range(3)] == [places[0], places[2], Place(_SLOT, 4)]
    files.write(places[0], 4096, pages(b"new", 4096))
    assert files.physical_bytes() == 2 * _SLOT + 4096
    files.close()


def test_a_file_system_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are destroyed all the same; the space of free slots is known to be spare."""
    monkeypatch.setattr("kvdaemon.ssd.chunk_files._libc", _WithoutHoles())
    files, places = with_slots(tmp_path / "chunks", 3, b"SECRET")
    files.destroy(places[1])
    files.give(places[1])
    assert files.physical_bytes() == 3 * _SLOT
    assert files.spare_bytes() == _SLOT
    assert read(files, places[1]) == bytes(_SLOT)
    assert read(files, places[2]) == bytes(pages(b"SECRET"))
    files.close()


class _WithoutHoles:
    @staticmethod
    def fallocate(*_: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1


def test_a_sweep_frees_what_nobody_knows(tmp_path: Path) -> None:
    """After a start: places without a record are free again. Places taken or given back meanwhile are no suspects."""
    files, places = with_slots(tmp_path / "chunks", 6, b"x")
    files.close()
    files = open_swept(tmp_path / "chunks", {places[1], places[4]})
    assert files.physical_bytes() == 2 * _SLOT
    files.suspect()
    assert files.take(_SLOT) == places[0]
    files.give(places[1])
    assert list(files.suspects()) == [places[4]]
    files.close()


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    """What lay behind the cut cannot be read, and that is said; the rest can; a place behind may be freed."""
    files, places = with_slots(tmp_path / "chunks", 4, b"x")
    files.close()
    os.truncate(tmp_path / "chunks" / str(_SLOT), 2 * _SLOT + 100)
    files = open_swept(tmp_path / "chunks", set(places))
    assert read(files, places[1]) == bytes(pages(b"x"))
    for place in (places[2], places[3], Place(4096, 0)):
        with pytest.raises(PeerProtocolError, match="cut short"):
            files.read(place, 0, pages(b"?", 4096 if place.slot_bytes == 4096 else _SLOT))
        files.destroy(place)
        files.give(place)
    assert files.take(_SLOT) == places[2]
    assert files.take(_SLOT) == places[3]
    files.close()
