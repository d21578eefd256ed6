"""What the disk gives when nothing stands between: O_DIRECT reads and writes of one size, one or several at a time.

Like a store's, its bytes are noise, and each is moved from or to memory of its own: one buffer that stays in the
processor's cache, or zeros, go to this kind of disk half as fast again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_NOISE_BYTES = 2**20


class DirectFile:
    """A file on the disk to be measured, read and written past the page cache. One thread uses it.

    Offsets move on with every call and begin again at the end of the file.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Writes the file with noise. Raises OSError: the file system has no O_DIRECT, or no room."""
        self._size_bytes = size_bytes
        self._offset = 0
        self._memory = _noise(size_bytes)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        self.write_fresh(size_bytes, 2**20)

    def close(self) -> None:
        os.close(self._fd)

    def read(self, nbytes: int, piece_bytes: int, at_once: int = 1) -> float:
        """Seconds to read nbytes, in pieces, `at_once` of them in flight."""
        return self._move(os.preadv, nbytes, piece_bytes, at_once)

    def write(self, nbytes: int, piece_bytes: int, at_once: int = 1) -> float:
        """Seconds to write nbytes over what is there, down to the device."""
        return self._move(os.pwritev, nbytes, piece_bytes, at_once, sync=True)

    def write_fresh(self, nbytes: int, piece_bytes: int, at_once: int = 1) -> float:
        """Seconds to write the whole file (of nbytes) anew, where the file system has no block of it yet."""
        os.ftruncate(self._fd, 0)
        os.fsync(self._fd)
        self._offset = 0
        return self.write(nbytes, piece_bytes, at_once)

    def _move(self, call: object, nbytes: int, piece_bytes: int, at_once: int, *, sync: bool = False) -> float:
        assert callable(call)
        offsets = [(self._offset + i) % self._size_bytes for i in range(0, nbytes, piece_bytes)]
        self._offset = (self._offset + nbytes) % self._size_bytes
        memory = memoryview(self._memory)

        def move(worker: int) -> None:
            for offset in offsets[worker::at_once]:
                if call(self._fd, [memory[offset : offset + piece_bytes]], offset) != piece_bytes:
                    raise OSError("a short transfer; the size is no multiple of the piece's")

        with ThreadPoolExecutor(at_once) as pool:
            started = time.perf_counter()
            list(pool.map(move, range(at_once)))
            if sync:
                os.fdatasync(self._fd)
            return time.perf_counter() - started


def _noise(nbytes: int) -> mmap.mmap:
    """Page-aligned memory of noise, no piece like another."""
    memory = mmap.mmap(-1, nbytes)
    for start in range(0, nbytes, _NOISE_BYTES):
        memory.write(os.urandom(min(_NOISE_BYTES, nbytes - start)))
    return memory


@contextlib.contextmanager
def direct_file(directory: Path, size_bytes: int) -> Iterator[DirectFile]:
    path = directory / f"ca-direct-{os.getpid()}"
    file = DirectFile(path, size_bytes)
    try:
        yield file
    finally:
        file.close()
        path.unlink()


def device_bytes(pid: int) -> tuple[int, int]:
    """What a process has read from and written to devices so far."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])
