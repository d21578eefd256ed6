"""A database of many small chunk records, as an SSD worker leaves it. Run as a program: it holds RocksDB's lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import xxhash

from benchmarks.store.made import TINY, records
from kvdaemon.ssd.tables import ChunkRecord, Tables


def make_database(path: Path, chunks: int) -> None:
    """Make it in a process of its own. Raises RuntimeError."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.store.records", str(path), str(chunks)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)


def _make(path: Path, chunks: int) -> None:
    tables = Tables(path)
    value = bytes(TINY.token_bytes)
    checksums = (xxhash.xxh3_64_intdigest(value),)
    for r in records(chunks):
        record = ChunkRecord(
            r.chunk_id, r.parent_id, r.namespace, TINY.digest(), 1, TINY.token_bytes, r.written_s, checksums
        )
        tables.put_chunk(record, [value])
    tables.close()


if __name__ == "__main__":
    _make(Path(sys.argv[1]), int(sys.argv[2]))
