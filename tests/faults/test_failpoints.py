"""Fail points stop, fail or delay a process at the place that a file names, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvdaemon import failpoints
from kvdaemon.failpoints import InjectedFault, armed_by
from kvdaemon.ssd.tables import ChunkRecord
from kvdaemon.ssd.worker import open_tier

_TWO_CHUNKS = """
import mmap, sys
from pathlib import Path
from kvdaemon.ssd.chunk_files import ChunkFiles
from kvdaemon.ssd.tables import ChunkRecord, Tables
tables = Tables(Path(sys.argv[1]))
files = ChunkFiles(tables.path / "chunks")
for n in range(3):
    place = files.take(4096)
    files.write(place, 0, memoryview(mmap.mmap(-1, 4096)))
    tables.put_chunk(ChunkRecord(bytes([n]) * 16, b"p" * 16, b"n" * 16, b"g" * 16, 7, 300, place, 10.0 + n, (1,)))
"""


def test_a_point_stops_the_process_once(tmp_path: Path) -> None:
    """Killed where the second chunk has its KV and no record: it is not there; the first is, though nothing was
    flushed."""
    control, mark = tmp_path / "failpoint", tmp_path / "failpoint.reached"
    database = tmp_path / "ssd"
    control.write_text("put.before stop\n")
    process = subprocess.Popen(
        [sys.executable, "-c", _TWO_CHUNKS, str(database)], env=os.environ | {failpoints.VARIABLE: str(control)}
    )
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    assert not control.exists()
    mark.rename(control)  # once more
    os.kill(process.pid, signal.SIGCONT)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    process.kill()
    process.wait(10)

    tables, files, moved_aside = open_tier(database, 1024 * 1024 * 1024)
    assert moved_aside == ""
    (record,) = tables.records(b"", 10)
    assert isinstance(record, ChunkRecord)
    assert (record.chunk_id[0], record.place.slot) == (0, 0)
    files.suspect()
    files.clear(record.place)
    assert [place.slot for place in files.suspects()] == [1]
    files.close()
    tables.close()


def test_other_actions_last_until_the_file_goes(tmp_path: Path) -> None:
    control = tmp_path / "failpoint"
    reach = armed_by(control)
    reach("put.before")
    control.write_text("put.before fail No space left on device\n")
    for _ in range(2):
        with pytest.raises(InjectedFault, match="No space left on device"):
            reach("put.before")
    reach("put.after")
    control.write_text("put.after sleep 0.05\n")
    started = time.monotonic()
    reach("put.before")
    reach("put.after")
    assert time.monotonic() - started >= 0.05
    control.write_text("put.after hold\n")
    held = threading.Thread(target=reach, args=("put.after",))
    held.start()
    held.join(0.05)
    assert held.is_alive()
    control.write_text("put.after dance\n")
    held.join(10.0)
    assert not held.is_alive()
    with pytest.raises(ValueError, match="cannot dance"):
        reach("put.after")
    control.unlink()
    reach("put.after")


def test_nothing_is_armed_by_default() -> None:
    assert failpoints.reach is failpoints._nothing
