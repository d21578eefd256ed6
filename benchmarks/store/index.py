"""The index at a million chunks: memory of a record, start-up, and the time of a decision."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.stack import Stack, drop_page_cache
from benchmarks.store import memory
from benchmarks.store.engine import geometry_of, kv_shape
from benchmarks.store.figures import Figure, Section, Series
from benchmarks.store.made import arena_bytes, filled_arena, listing
from benchmarks.store.records import make_database
from kvdaemon import adoption
from kvdaemon.dram import DramTier
from protocol.arena import Arena, SlotState, layer_checksum
from protocol.ids import ROOT, new_id
from protocol.messages import ReservedSlot

_MIB = 2**20
_START_S = 300.0
_BYTES, _SECONDS = 400.0, 10.0
_CLIENT = new_id()


def measure(disk: Path, quick: bool, step: Callable[[], None]) -> Section:
    million = 2_000 if quick else 1_000_000
    in_dram = 2_000 if quick else 200_000  # a page of shared memory each
    section = Section("index", f"The index at {million:,} chunks")
    tiers: dict[memory.Tier, int] = {"ssd": million, "dram": in_dram}
    for tier, chunks in tiers.items():
        found = memory.measure(tier, chunks)
        section.figures.append(
            Figure(f"index, chunks on SSD{' and in DRAM' if tier == 'dram' else ''}", found["rss_bytes_per_chunk"],
                   "bytes/chunk", at_most=_BYTES, note=f"{chunks:,} chunks, resident memory")
        )  # fmt: skip
        step()
    section.figures += _start_ups(disk, million, step)
    section.figures.append(_verification(256 if quick else 1024))
    step()
    grown = (500, 2_000) if quick else (1_000, 10_000, 100_000, 1_000_000)
    decisions: dict[str, list[tuple[float, float]]] = {}
    for chunks in grown:
        for name, seconds in _decisions(chunks).items():
            decisions.setdefault(name, []).append((chunks, seconds * 1e6))
        step()
    for name, points in decisions.items():
        section.figures.append(
            Figure(f"{name}, at {grown[-1]:,} chunks", points[-1][1], "us", points[0][1],
                   f"at {grown[0]:,}", at_most=2.0, note="independent of the number of chunks: within twice")
        )  # fmt: skip
    section.series.append(Series("Time of a decision", "chunks in the store", "microseconds", decisions))
    return section


def _start_ups(disk: Path, chunks: int, step: Callable[[], None]) -> list[Figure]:
    """From spawning the daemon until it serves and knows every chunk of both tiers, page cache dropped."""
    with tempfile.TemporaryDirectory(prefix="ca-store-", dir=disk) as home:
        stack = Stack(Path(home), "embedded", {"log_level": "warning", "dram": arena_bytes(chunks), "ssd": "64GiB"})
        try:
            empty = _start(stack, 0)
            _end(stack)
            make_database(stack.data_dir / "ssd", chunks)
            step()
            ssd = _start(stack, chunks, drop=True)
            _end(stack)
            step()
            filled_arena(stack.run_dir / "arena", chunks).close()
            step()
            both = _start(stack, 2 * chunks, drop=True)
            step()
        finally:
            stack.stop()
    note = "from spawning the process; includes starting Python"
    return [
        Figure("start-up, nothing to adopt", empty, "s", note=note),
        Figure(f"start-up, {chunks:,} chunks on SSD", ssd, "s", at_most=_SECONDS, note=note),
        Figure(f"start-up, {chunks:,} chunks on SSD and in the arena", both, "s", at_most=_SECONDS, note=note),
    ]


def _start(stack: Stack, chunks: int, *, drop: bool = False) -> float:
    if drop:
        drop_page_cache(stack.data_dir)
    started = time.perf_counter()
    stack.launch("kvdaemon")
    stack.wait_ready("kvdaemon", _START_S)
    while sum(v for k, v in stack.metrics("kvdaemon").items() if k.startswith("cachedattention_chunks{")) < chunks:
        if time.perf_counter() - started > _START_S:
            raise TimeoutError("the daemon never knew all chunks")
        time.sleep(0.05)
    return time.perf_counter() - started


def _end(stack: Stack) -> None:
    process = psutil.Process(stack.processes["kvdaemon"].pid)
    process.terminate()
    stack.processes["kvdaemon"].wait(60)


def _verification(arena_mib: int) -> Figure:
    """How fast adoption verifies an arena of chunks of real size."""
    geometry = geometry_of(kv_shape(_MIB, 8))
    with tempfile.TemporaryDirectory(prefix="ca-store-", dir="/dev/shm") as home:
        arena = Arena.create(Path(home) / "arena", geometry, arena_mib * _MIB)
        checksum = layer_checksum(*arena.layer(0, 0, geometry.chunk_tokens))
        for slot in range(arena.slots):
            arena.take(slot, SlotState.READY, ROOT)
            for layer in range(geometry.layers):
                arena.layer(slot, layer, geometry.chunk_tokens)[0][:] = 0
                arena.set_layer_ready(slot, layer, checksum)
            arena.set_identity(slot, new_id(), ROOT, ROOT, geometry.chunk_tokens)
            arena.seal(slot)
        started = time.perf_counter()
        findings = adoption.survey(arena)
        seconds = time.perf_counter() - started
        assert len(findings.ready) == arena.slots
        nbytes = arena.slots * geometry.slot_bytes
        arena.close()
    return Figure("adoption, 1 MiB layers", nbytes / seconds / 1e9, "GB/s", note="the arena is verified at this rate")


def _decisions(chunks: int) -> dict[str, float]:
    """Median seconds of one decision, its bookkeeping included, of a store with all slots full and everything clean."""
    store = memory.empty_store()
    with tempfile.TemporaryDirectory(prefix="ca-store-", dir="/dev/shm") as home:
        arena = filled_arena(Path(home) / "arena", chunks)
        findings = adoption.survey(arena)
        dram = DramTier(arena, findings.occupied)
        store.bind(dram, findings.ready)
        listed = listing(chunks + 256)
        for _ in store.merge_listing(store.index.new_listing().add(listed)):
            pass
        store.placement.wait(0, [record.chunk_id for record in listed[chunks:]])
        reserved: list[ReservedSlot] = []

        def reserve() -> None:
            slots = store.reserve(_CLIENT, 1)
            assert len(slots) == 1
            reserved.extend(slots)

        def prefetch() -> None:
            assert len(store.plan_prefetch(4)) == 4

        def evict() -> None:
            assert len(store.evict_from_ssd(1, limit=64)) == 1

        found = {
            "evicting one chunk from DRAM for a save": _median(reserve, 50),
            "prefetching 4 chunks into full DRAM": _median(prefetch, 40),
            "evicting one chunk from SSD": _median(evict, 50),
        }
        arena.close()
    return found


def _median(decide: Callable[[], None], times: int) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        decide()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
