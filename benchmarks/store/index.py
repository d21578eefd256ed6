"""Memory of the index: bytes that one chunk record costs the daemon, and which objects they are.

    python -m benchmarks.store.index [--chunks N] [--tier ssd|dram]

Records arrive as they do in the daemon: decoded from the worker's pages (SSD) or read from an arena's slots (DRAM).
A process of its own each time: memory once used by Python says little about what is used now.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import typer

from kvdaemon import adoption
from kvdaemon.dram import DramTier
from kvdaemon.placement.lru import LeastRecentlyUsed
from kvdaemon.store import Store
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.registry import new_registry
from protocol.arena import Arena, Geometry, SlotState, layer_checksum
from protocol.codec import Frame, decode, encode
from protocol.ids import ID_BYTES, ROOT, digest
from protocol.messages import SsdPage, SsdRecord

Tier = Literal["ssd", "dram"]
TINY = Geometry(layers=1, key_bytes=1, value_bytes=1, chunk_tokens=1)  # a slot is one page
NAMESPACE = digest("benchmark", b"index")
_PAGE_RECORDS = 4096
_PER_CONVERSATION = 16  # chunks; after them the next lineage begins


class _Ssd:
    """An SSD tier that is there."""

    can_read = True
    can_write = True


def empty_store() -> Store:
    """A store as the daemon makes it, without an arena."""
    return Store(LeastRecentlyUsed(), _Ssd(), KvDaemonMetrics(new_registry()), "sample")


def records(chunks: int) -> Iterator[SsdRecord]:
    """Records of conversations of 16 chunks, the older ones written first."""
    ids = np.random.default_rng(1).bytes(chunks * ID_BYTES)
    parent = ROOT
    for i in range(chunks):
        chunk_id = ids[i * ID_BYTES : (i + 1) * ID_BYTES]
        yield SsdRecord(chunk_id, parent, NAMESPACE, 256, 6 * 2**20, 1.7e9 + i * 1e-3)
        parent = ROOT if i % _PER_CONVERSATION == _PER_CONVERSATION - 1 else chunk_id


def listing(chunks: int) -> list[SsdRecord]:
    """The same records as they come from the worker, page by page through the codec."""
    listed: list[SsdRecord] = []
    page: list[SsdRecord] = []
    for record in records(chunks):
        page.append(record)
        if len(page) == _PAGE_RECORDS:
            listed += _sent(page)
            page = []
    return listed + _sent(page)


def _sent(page: list[SsdRecord]) -> list[SsdRecord]:
    body = decode(encode(Frame("end", 1, SsdPage(tuple(page), more=True)))).body
    assert isinstance(body, SsdPage)
    return list(body.records)


def filled_arena(path: Path, chunks: int) -> Arena:
    """An arena of `chunks` one-page slots, each READY with the chunk of the same place in `records`."""
    arena = Arena.create(path, TINY, chunks * (TINY.slot_bytes + TINY.entry_bytes) + 2 * 4096)
    assert arena.slots == chunks
    checksum = layer_checksum(*arena.layer(0, 0, 1))
    for slot, record in enumerate(records(chunks)):
        arena.take(slot, SlotState.READY, ROOT)
        arena.set_layer_ready(slot, 0, checksum)
        arena.set_identity(slot, record.chunk_id, record.parent_id, record.namespace, 1)
    return arena


def fill(store: Store, tier: Tier, chunks: int, directory: Path) -> None:
    """Give the store `chunks` chunks: on SSD only, or on SSD and in DRAM."""
    if tier == "dram":
        arena = filled_arena(directory / "arena", chunks)
        findings = adoption.survey(arena)
        store.bind(DramTier(arena, findings.occupied), findings.ready)
    store.merge_listing(listing(chunks))


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
    command = [sys.executable, "-m", "benchmarks.store.index", "--chunks", str(chunks), "--tier", tier, "--here"]
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
    with tempfile.TemporaryDirectory(prefix="ca-index-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
        print(json.dumps(_measure_here(tier, chunks, Path(home), by_line=by_line)))


if __name__ == "__main__":
    typer.run(main)
