"""SSD: cold reads into the arena and write-behind, against O_DIRECT on the same disk; and what they do to DRAM loads.

Reads: contexts that are on SSD only are leased; the clock runs from the request until their last layer is ready in the
arena, every layer verified. Before each read the tier's files are synced and dropped from the page cache (posix_fadvise
DONTNEED), and what the worker then reads from the device is counted: it must be all of it. Its neighbour on the table
is a file read with O_DIRECT in pieces of one layer, one at a time.

Write-behind: contexts are saved into DRAM; the clock runs from the first save until nothing waits to be written. Its
neighbours are a file written with O_DIRECT in pieces of one layer, one at a time: anew, for chunks go to space where
the file system has no blocks yet, and over what is there, which no store can do with chunks that are new to it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.stack import Stack, drop_page_cache
from benchmarks.store.disk import DirectFile, device_bytes, direct_file
from benchmarks.store.engine import CHUNK_TOKENS, Context, EngineSide, engine_side, kv_shape, running_daemon
from benchmarks.store.figures import Figure, Section, alternate, rate
from inference.store import Lease

_MIB = 2**20
_DRAINED_S = 300.0


@dataclass(frozen=True)
class _Sizes:
    layer_bytes: int
    layers: int
    chunks: int  # of a context
    contexts: int  # saved in one round
    write_rounds: int
    read_rounds: int
    flush_s: float = 5.0  # the worker syncs every 2 s


def sizes(quick: bool) -> list[_Sizes]:
    if quick:
        return [_Sizes(_MIB, 2, 4, 4, 3, 2, flush_s=0.1)]
    return [_Sizes(_MIB, 8, 8, 8, 3, 12), _Sizes(4 * _MIB, 8, 4, 4, 3, 12)]


def measure(disk: Path, quick: bool, step: Callable[[], None]) -> Section:
    section = Section("ssd", "SSD: cold reads and write-behind against O_DIRECT on the same disk")
    for size in sizes(quick):
        shape = kv_shape(size.layer_bytes, size.layers)
        chunk_bytes = CHUNK_TOKENS * shape.token_bytes
        # One round of saves, the context that is loaded meanwhile, and the slots kept for fetches.
        dram = int(((size.contexts + 2) * size.chunks * chunk_bytes) * 1.2)
        with (
            running_daemon(disk, dram=f"{dram // _MIB}MiB", ssd="64GiB") as stack,
            engine_side(stack, shape, size.chunks * CHUNK_TOKENS) as side,
            direct_file(disk, size.contexts * size.chunks * chunk_bytes) as direct,
        ):
            section.figures += _Rounds(stack, side, direct, size, step).measure()
    return section


class _Rounds:
    def __init__(
        self, stack: Stack, side: EngineSide, direct: DirectFile, size: _Sizes, step: Callable[[], None]
    ) -> None:
        self._stack, self._side, self._direct, self._size, self._step = stack, side, direct, size, step
        self._name = f"{size.layer_bytes // _MIB} MiB layers"
        tokens = size.chunks * CHUNK_TOKENS
        self._context_bytes = tokens * side.shape.token_bytes
        self._sources = [side.computed(tokens, seed) for seed in range(min(3, size.contexts))]
        self._saved: list[Context] = []
        self._amplified: list[float] = []

    def measure(self) -> list[Figure]:
        size = self._size
        round_bytes = size.contexts * self._context_bytes
        written = alternate(
            size.write_rounds,
            {
                "write-behind": lambda i: self._write_behind(),
                "O_DIRECT write": lambda i: self._direct.write_fresh(round_bytes, size.layer_bytes),
                "O_DIRECT, overwriting": lambda i: self._direct.write(round_bytes, size.layer_bytes),
            },
            self._step,
        )
        read = alternate(
            size.read_rounds,
            {
                "SSD to arena": lambda i: self._read_cold(),
                "O_DIRECT read": lambda i: self._direct.read(self._context_bytes, size.layer_bytes),
                "O_DIRECT read, 4 at once": lambda i: self._direct.read(self._context_bytes, size.layer_bytes, 4),
            },
            self._step,
        )
        name, nbytes = self._name, self._context_bytes
        return [
            rate(f"{name}: SSD to arena, cold", read, "SSD to arena", "O_DIRECT read", nbytes, at_least=0.85),
            rate(f"{name}: O_DIRECT, 4 at once", read, "O_DIRECT read, 4 at once", "O_DIRECT read", nbytes),
            Figure(
                f"{name}: read from the device for each byte",
                statistics.median(self._amplified),
                "bytes",
                note="1 or more: nothing came from the page cache; more: the kernel read ahead",
                samples=tuple(self._amplified),
            ),
            rate(f"{name}: write-behind", written, "write-behind", "O_DIRECT write", round_bytes, at_least=0.6),
            rate(f"{name}: write-behind", written, "write-behind", "O_DIRECT, overwriting", round_bytes),
            *self._beside_loads(),
        ]

    # -- one round each -----------------------------------------------------------------------------------

    def _save_round(self) -> None:
        for number in range(self._size.contexts):
            context = self._side.new_context(self._size.chunks)
            self._side.save(context, self._sources[number % len(self._sources)])
            self._saved.append(context)

    def _write_behind(self) -> float:
        started = time.perf_counter()
        self._save_round()
        self._wait_written()
        seconds = time.perf_counter() - started
        time.sleep(self._size.flush_s)  # its last sync must not fall into the next one's time
        return seconds

    def _is_written(self) -> bool:
        return self._stack.metrics("kvdaemon")["cachedattention_write_behind_queue"] == 0

    def _wait_written(self) -> None:
        deadline = time.monotonic() + _DRAINED_S
        while not self._is_written():
            if time.monotonic() > deadline:
                raise TimeoutError("write-behind never came to its end")
            time.sleep(0.01)

    def _coldest(self) -> Context:
        """The context that was used longest ago: DRAM has room for fewer than there are."""
        self._saved.append(self._saved.pop(0))
        return self._saved[-1]

    def _read_cold(self) -> float:
        context = self._coldest()
        drop_page_cache(self._stack.data_dir)
        before, _ = device_bytes(self._worker())
        started = time.perf_counter()
        lease = self._side.acquire(context)
        self._wait_arrived(lease)
        seconds = time.perf_counter() - started
        after, _ = device_bytes(self._worker())
        self._side.release(lease)
        if any(ref.tier != "ssd" for ref in lease.chunks):
            raise RuntimeError("the context was in DRAM")
        self._amplified.append((after - before) / self._context_bytes)
        return seconds

    def _wait_arrived(self, lease: Lease) -> None:
        deadline = time.monotonic() + _DRAINED_S
        layers, slots = self._side.shape.layers, [ref.slot for ref in lease.chunks]
        while any(lease.arena.ready_layers(slot) < layers for slot in slots):
            if time.monotonic() > deadline:
                raise TimeoutError("a context never arrived")
            time.sleep(2e-4)

    def _worker(self) -> int:
        daemon = psutil.Process(self._stack.processes["kvdaemon"].pid)
        return next(child.pid for child in daemon.children() if "kvdaemon.ssd.worker" in child.cmdline())

    # -- beside loads -------------------------------------------------------------------------------------

    def _beside_loads(self) -> list[Figure]:
        """How long a load from DRAM takes beside write-behind and beside reads, against alone."""
        side = self._side
        context = side.new_context(self._size.chunks)
        side.save(context, self._sources[0])
        self._wait_written()
        kv = side.working_kv(context.tokens, context.tokens)
        held = side.acquire(context)
        alone: list[float] = []
        beside: dict[str, list[float]] = {"write-behind": [], "cold reads": []}

        def load(into: list[float]) -> None:
            into.append(side.load(held, kv, rotate=False))

        for _ in range(self._size.write_rounds):
            time.sleep(self._size.flush_s)
            for _ in range(12):
                load(alone)
            self._save_round()
            while not self._is_written():
                load(beside["write-behind"])
            time.sleep(self._size.flush_s)
            for _ in range(12):
                load(alone)
            drop_page_cache(self._stack.data_dir)
            lease = side.acquire(self._coldest())
            while any(lease.arena.ready_layers(ref.slot) < side.shape.layers for ref in lease.chunks):
                load(beside["cold reads"])
            side.release(lease)
            self._step()
        side.release(held)
        base = statistics.median(alone) * 1e3
        return [
            Figure(
                f"{self._name}: a load from DRAM beside {what}",
                statistics.median(seconds) * 1e3,
                "ms",
                base,
                "alone",
                at_most=1.15,
                samples=tuple(s * 1e3 for s in seconds),
            )
            for what, seconds in beside.items()
            if seconds
        ]
