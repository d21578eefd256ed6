"""An SSD tier of many small chunks, as its worker leaves it. Run as a program: it holds RocksDB's lock."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import xxhash

from benchmarks.store.made import TINY, records
from kvdaemon.ssd.chunk_files import CHUNK_FILES, ChunkFiles
from kvdaemon.ssd.tables import ChunkRecord, Tables
from protocol.arena import PAGE_BYTES


def make_database(path: Path, chunks: int) -> None:
    """Make it in a process of its own. Raises RuntimeError."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.store.records", str(path), str(chunks)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)


def _make(path: Path, chunks: int) -> None:
    tables = Tables(path)
    files = ChunkFiles(path / CHUNK_FILES)
    page = memoryview(mmap.mmap(-1, PAGE_BYTES))  # zeros
    size = TINY.token_bytes
    checksums = (xxhash.xxh3_64_intdigest(page[:size]),)
    for r in records(chunks):
        place = files.take(TINY.slot_bytes)
        files.write(place, 0, page)
        tables.put_chunk(
            ChunkRecord(r.chunk_id, r.parent_id, r.namespace, TINY.digest(), 1, size, place, r.written_s, checksums)
        )
    files.close()
    tables.close()


if __name__ == "__main__":
    _make(Path(sys.argv[1]), int(sys.argv[2]))
