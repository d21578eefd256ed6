"""Memory of the index: bytes that one chunk record costs the daemon, and which objects they are.

    python -m benchmarks.store.memory [--chunks N] [--tier ssd|dram] [--by-line]

Records arrive as they do in the daemon: decoded from the worker's pages (SSD) or read from an arena's slots (DRAM).
A process of its own each time: memory once used by Python says little about what is used now.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import typer

from benchmarks.store.made import filled_arena, pages
from kvdaemon import adoption
from kvdaemon.dram import DramTier
from kvdaemon.placement.anticipating import Anticipating
from kvdaemon.store import Store
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.registry import new_registry

Tier = Literal["ssd", "dram"]


class _Ssd:
    """An SSD tier that is there."""

    can_read = True
    can_write = True


def empty_store() -> Store:
    """A store as the daemon makes it, without an arena."""
    return Store(Anticipating(), _Ssd(), KvDaemonMetrics(new_registry()), "sample")


def fill(store: Store, tier: Tier, chunks: int, directory: Path) -> None:
    """Give the store `chunks` chunks: on SSD only, or on SSD and in DRAM."""
    if tier == "dram":
        arena = filled_arena(directory / "arena", chunks)
        findings = adoption.survey(arena)
        store.bind(DramTier(arena, findings.occupied), findings.ready)
    listing = store.index.new_listing()
    for page in pages(chunks):
        listing.add(page)
    for _ in store.merge_listing(listing):
        pass


def _measure_here(tier: Tier, chunks: int, directory: Path, *, by_line: bool) -> dict[str, Any]:
    store = empty_store()
    if tier == "dram":  # the arena is no part of the index
        filled_arena(directory / "arena", chunks).close()
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss - _shared()
    if by_line:
        tracemalloc.start()
    fill(store, tier, chunks, directory)
    gc.collect()
    found: dict[str, Any] = {"tier": tier, "chunks": chunks, "indexed": len(store.index)}
    if by_line:
        snapshot = tracemalloc.take_snapshot().filter_traces(
            (tracemalloc.Filter(True, "*/kvdaemon/*"), tracemalloc.Filter(True, "*/protocol/*"))
        )
        found["by_line"] = {
            f"{Path(s.traceback[0].filename).name}:{s.traceback[0].lineno}": round(s.size / chunks, 1)
            for s in snapshot.statistics("lineno")[:12]
        }
        found["live_bytes_per_chunk"] = round(tracemalloc.get_traced_memory()[0] / chunks, 1)
    else:
        found["rss_bytes_per_chunk"] = round((process.memory_info().rss - _shared() - before) / chunks, 1)
    return found


def _shared() -> int:
    """Resident bytes of this process that are shared memory: mapped arenas."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(tier: Tier, chunks: int, *, by_line: bool = False) -> dict[str, Any]:
    """Bytes per chunk record, measured in a process of its own.

    rss_bytes_per_chunk is what the process grew by, the listing itself gone. With by_line instead: what lives, by the
    line that made it (several times slower and larger, so the two are never measured at once).
    """
    command = [sys.executable, "-m", "benchmarks.store.memory", "--chunks", str(chunks), "--tier", tier, "--here"]
    done = subprocess.run([*command, *(["--by-line"] if by_line else [])], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def main(
    chunks: Annotated[int, typer.Option(help="Chunk records.")] = 1_000_000,
    tier: Annotated[Tier, typer.Option(help="ssd: records on SSD only; dram: in DRAM as well.")] = "ssd",
    here: Annotated[bool, typer.Option(hidden=True)] = False,
    by_line: Annotated[bool, typer.Option(help="What the bytes are, by line of code.")] = False,
) -> None:
    """Measure the memory of the index."""
    if not here:
        print(json.dumps(measure(tier, chunks, by_line=by_line), indent=1))
        return
    with tempfile.TemporaryDirectory(prefix="ca-index-", dir="/dev/shm") as home:
        print(json.dumps(_measure_here(tier, chunks, Path(home), by_line=by_line)))


if __name__ == "__main__":
    typer.run(main)
