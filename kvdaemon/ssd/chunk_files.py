"""Chunk files: where the KV of chunks lies on the SSD. Which chunk lies where is told by its record in RocksDB.

    chunks/<slot bytes>     slot | slot | ...       of one size, each [layer][keys, then values, of the chunk's tokens]

A slot is as large as the arena's, and its layers begin where they begin there, on a page. So a full chunk goes between
disk and arena as it is, by O_DIRECT: no page cache, no copy. A partial chunk takes only the pages that it fills.

A free slot is a hole in its file (fallocate, PUNCH_HOLE): what was in it is gone at once, and the files take on the
disk what their chunks take. There is nothing to compact.

Which slots are free is not written down. At a start every slot may be taken, until a sweep has compared them with the
records; so a crash between a chunk's bytes and its record leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvdaemon.failpoints import reach
from protocol.arena import PAGE_BYTES
from protocol.errors import CapacityError, PeerError, PeerProtocolError

CHUNK_FILES = "chunks"  # the directory of them, in the database's
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_ZEROS = memoryview(mmap.mmap(-1, 2**20))  # page-aligned
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Place(NamedTuple):
    """A slot in the file of slots of this size."""

    slot_bytes: int
    slot: int

    @property
    def offset(self) -> int:
        return self.slot * self.slot_bytes


class ChunkFiles:
    """The files in one directory. Bookkeeping (take, give, sweeps) on one thread; bytes on any.

    Several threads may read and write at once, nobody a place that is being destroyed.
    """

    def __init__(self, directory: Path) -> None:
        """Opens what is there. Raises CapacityError: the disk is full; PeerError: it says no."""
        self.directory = directory
        self._files: dict[int, _SlotFile] = {}
        with _translated():
            directory.mkdir(mode=0o700, exist_ok=True)
            for path in directory.iterdir():
                if path.name.isdecimal():
                    self._open(int(path.name))

    def close(self) -> None:
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()

    # -- which slots are taken ----------------------------------------------------------------------------

    def take(self, slot_bytes: int) -> Place:
        """Take a free slot; only once a sweep has ended. Raises CapacityError: the disk is full; PeerError."""
        with _translated():
            file = self._files.get(slot_bytes) or self._open(slot_bytes)
        return Place(slot_bytes, file.take())

    def give(self, place: Place) -> None:
        """Have a slot be free whose bytes were destroyed."""
        if (file := self._files.get(place.slot_bytes)) is not None:
            file.give(place.slot)

    def suspect(self) -> None:
        """Begin a sweep: slots that are taken now are suspects."""
        for file in self._files.values():
            file.suspects[:] = file.taken

    def clear(self, place: Place) -> None:
        """There is a record of this place: it is no suspect."""
        file = self._files.get(place.slot_bytes)
        if file is not None and place.slot < len(file.suspects):
            file.suspects[place.slot] = 0

    def suspects(self) -> Iterator[Place]:
        """Slots that are taken, and were neither cleared nor taken anew since `suspect`."""
        for slot_bytes, file in self._files.items():
            slot = file.suspects.find(1)
            while slot >= 0:
                yield Place(slot_bytes, slot)
                slot = file.suspects.find(1, slot + 1)

    def physical_bytes(self) -> int:
        """What the files take on the disk."""
        return sum(os.fstat(file.fd).st_blocks * 512 for file in self._files.values())

    def spare_bytes(self) -> int:
        """What free slots take of that: nothing, where the file system has holes."""
        return sum(file.free * slot_bytes for slot_bytes, file in self._files.items() if not file.has_holes)

    # -- bytes --------------------------------------------------------------------------------------------

    def write(self, place: Place, offset: int, data: memoryview) -> None:
        """Write whole pages from page-aligned memory, at an offset within the slot.

        Raises CapacityError: the disk is full; PeerError: it says no.
        """
        with _translated():
            self._files[place.slot_bytes].write(place.offset + offset, data)

    def read(self, place: Place, offset: int, into: memoryview) -> None:
        """Read whole pages into page-aligned memory. Raises PeerProtocolError: they are not there; PeerError."""
        file = self._files.get(place.slot_bytes)
        with _translated():
            done = os.preadv(file.fd, [into], place.offset + offset) if file is not None else 0
        if done != len(into):
            raise PeerProtocolError(f"the file of slots of {place.slot_bytes} bytes was cut short")

    def destroy(self, place: Place) -> None:
        """Destroy the bytes of a slot, and give their space back. Raises as write."""
        if (file := self._files.get(place.slot_bytes)) is not None:
            with _translated():
                reach("destroy.before")
                file.destroy(place.offset, place.slot_bytes)
                reach("destroy.after")

    def sync(self) -> None:
        """Have everything written so far survive the machine. Raises as write."""
        with _translated():
            for file in list(self._files.values()):
                file.sync()

    def _open(self, slot_bytes: int) -> _SlotFile:
        path, flags = self.directory / str(slot_bytes), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            fd, is_direct = os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd, is_direct = os.open(path, flags, 0o600), False  # the file system knows only buffered files
        file = self._files[slot_bytes] = _SlotFile(fd, -(-os.fstat(fd).st_size // slot_bytes), is_direct)
        return file


class _SlotFile:
    """An open file, and which of its slots are taken; all of them, to begin with."""

    def __init__(self, fd: int, slots: int, is_direct: bool) -> None:
        self.fd = fd
        self.has_holes = True
        self.taken = bytearray(b"\1") * slots
        self.suspects = bytearray(slots)
        self._free: list[int] = []  # a heap
        self._is_direct = is_direct

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """The lowest, so that the file stays short."""
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = len(self.taken)
            self.taken.append(0)
            self.suspects.append(0)
        self.taken[slot] = 1
        return slot

    def give(self, slot: int) -> None:
        if slot < len(self.taken) and self.taken[slot]:  # else the file was cut since the slot was written
            self.taken[slot] = self.suspects[slot] = 0
            heapq.heappush(self._free, slot)

    def write(self, at: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self.fd, data, at)
            data, at = data[written:], at + written

    def destroy(self, at: int, size: int) -> None:
        if _libc.fallocate(self.fd, _KEEP_SIZE | _PUNCH_HOLE, at, size) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
        self.has_holes = False
        end = min(at + size, -(-os.fstat(self.fd).st_size // PAGE_BYTES) * PAGE_BYTES)
        for start in range(at, end, len(_ZEROS)):
            self.write(start, _ZEROS[: min(len(_ZEROS), end - start)])

    def sync(self) -> None:
        os.fdatasync(self.fd)
        if not self._is_direct:  # what is read again comes from DRAM: the page cache is for others
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Make errors of ours of the operating system's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"the disk is full: {error.strerror}") from error
        raise PeerError(f"the disk says no: {error.strerror or error}") from error
