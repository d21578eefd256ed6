"""Fail points: named places in the daemon's work where a test has it stop, fail or be slow.

`reach` does nothing unless the environment variable KVDAEMON_FAILPOINTS names a file when the process starts. Then
every point that is reached looks into the file, which arms at most one of them by a line of its own:

    commit.named stop               the process stops (SIGSTOP) at this very place; the file is renamed to *.reached
    put.before hold                 it waits there until the file goes; meanwhile there is a file *.reached
    flush.before sleep 0.5          as often as it is reached, until the file goes
    put.before fail No space left   the same

A process that stopped is killed by who armed the point: it alone, or others with it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

VARIABLE = "KVDAEMON_FAILPOINTS"

FrontPoint = Literal[
    "adopt.before",
    "adopt.after",
    # A client saves a chunk: a slot is taken; the chunk is named in the slot table, then READY, then in the books.
    "reserve.before",
    "reserve.after",
    "commit.before",
    "commit.named",
    "commit.after",
    "evict.before",
    "evict.after",
    # A chunk comes back from SSD: a slot is taken, named for what will arrive, and READY when it is whole.
    "fetch.before",
    "fetch.taken",
    "fetch.after",
    "prefetch.before",
    "prefetch.after",
    "loaded.before",
    "loaded.after",
    # What the front asks of the SSD worker, and has its answer to.
    "write_behind.before",
    "write_behind.after",
    "write_manifest.before",
    "write_manifest.after",
    "ssd_evict.before",
    "ssd_evict.after",
    # An erasure: a slot leaves the books, is wiped, is free; then the SSD.
    "withdraw.before",
    "withdraw.after",
    "wiped.before",
    "wiped.after",
    "ssd_erase.before",
    "ssd_erase.after",
]
WorkerPoint = Literal[
    # A chunk's record, when its KV is in a chunk file.
    "put.before",
    "put.after",
    "put_manifest.before",
    "put_manifest.after",
    "flush.before",
    "flush.after",
    # Some layers of a chunk: read into the slot and verified, marked as ready there.
    "layer.before",
    "layer.read",
    "layer.after",
    "delete.before",
    "delete.after",
    "delete_manifest.before",
    "delete_manifest.after",
    # The bytes at a place that no record speaks of any more.
    "destroy.before",
    "destroy.after",
    "compact.before",
    "compact.after",
]
Point = FrontPoint | WorkerPoint


class InjectedFault(OSError):
    """What a point fails with; marks an error that a test made."""


def _nothing(point: Point) -> None:
    """The point is reached, and nobody wants to know."""


def armed_by(path: Path) -> Callable[[Point], None]:
    """`reach` as the file at `path` has it be."""
    mark = path.with_name(f"{path.name}.reached")

    def armed(point: Point) -> list[str]:
        """The action for a point, and its argument; nothing, if it is not armed."""
        try:
            name, *action = path.read_text().rstrip("\n").split(" ", 2)
        except FileNotFoundError:
            return []
        return action if name == point else []

    def reach(point: Point) -> None:
        match armed(point):
            case []:
                return
            case ["stop"]:
                _stop(path, mark)
            case ["hold"]:
                mark.touch()
                while armed(point) == ["hold"]:
                    time.sleep(0.01)
                mark.unlink(missing_ok=True)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["fail", text]:
                raise InjectedFault(text)
            case action:
                raise ValueError(f"a fail point cannot {' '.join(action)}")

    return reach


def _stop(path: Path, mark: Path) -> None:
    try:
        path.rename(mark)
    except FileNotFoundError:
        return  # another thread or process was here first
    # To this thread, not to the process: it does not come one instruction further.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


reach: Callable[[Point], None] = armed_by(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else _nothing
