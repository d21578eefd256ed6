"""DRAM: arena to the engine's buffer and back, on one thread, against a plain copy of the same bytes.

Loads and saves go through the engine's own loader and saver with the daemon in a process of its own; a save's seconds
include reserving and committing, a load's begin when its lease is there. The plain copy is memmove over the same
pieces (one layer of one chunk, keys and values), pointers made beforehand. Contexts and buffers take turns, so that
nothing is found in the CPU's caches.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.store.engine import CHUNK_TOKENS, EngineSide, engine_side, kv_shape, running_daemon, save_contexts
from benchmarks.store.figures import Figure, Section, alternate, rate
from inference.store import Lease
from inference.working_kv import KvShape, WorkingKv

_MIB = 2**20
_CONTEXTS = 4
Piece = tuple[int, int, int]  # to, from, bytes


def shapes(quick: bool) -> dict[str, tuple[KvShape, int]]:
    """Shape and chunks of a context, by name."""
    if quick:
        return {"1 MiB layers": (kv_shape(_MIB, 2), 2)}
    return {
        "0.5 MiB layers, float32": (kv_shape(_MIB // 2, 12, torch.float32), 16),
        "1 MiB layers, bfloat16": (kv_shape(_MIB, 12), 8),
        "4 MiB layers, bfloat16": (kv_shape(4 * _MIB, 8), 4),
    }


def measure(disk: Path, quick: bool, step: Callable[[], None]) -> Section:
    section = Section("dram", "DRAM handoff: arena to the engine's buffer, one thread")
    for name, (shape, chunks) in shapes(quick).items():
        context_bytes = chunks * CHUNK_TOKENS * shape.token_bytes
        room = (2 * _CONTEXTS + 1) * context_bytes + 64 * _MIB
        with (
            running_daemon(disk, dram=f"{room // _MIB}MiB", ssd="0") as stack,
            engine_side(stack, shape, chunks * CHUNK_TOKENS) as side,
        ):
            section.figures += _measure(side, name, chunks, 4 if quick else 24, step)
    return section


def _measure(side: EngineSide, name: str, chunks: int, rounds: int, step: Callable[[], None]) -> list[Figure]:
    contexts = save_contexts(side, _CONTEXTS, chunks)
    tokens = contexts[0].tokens
    nbytes = tokens * side.shape.token_bytes
    leases = [side.acquire(context) for context in contexts]
    buffers = [side.working_kv(tokens, tokens) for _ in contexts]
    sources = [side.computed(tokens, seed) for seed in range(_CONTEXTS)]
    plain_loads = [list(_load_pieces(lease, kv)) for lease, kv in zip(leases, buffers, strict=True)]
    scratch = _shared_memory(nbytes * _CONTEXTS)
    plain_saves = [list(_save_pieces(kv, scratch[i * nbytes :])) for i, kv in enumerate(sources)]

    def load(i: int, rotate: bool, verify: bool | None) -> float:
        which = i % _CONTEXTS
        lease = side.acquire(contexts[which])
        try:
            return side.load(lease, buffers[which], rotate=rotate, verify=verify)
        finally:
            side.release(lease)

    def save(i: int) -> float:
        return side.save(side.new_context(chunks), sources[i % _CONTEXTS])

    torch.set_num_threads(1)
    found = alternate(
        rounds,
        {
            "plain copy": lambda i: _copy(plain_loads[i % _CONTEXTS]),
            "bytes": lambda i: load(i, False, None),
            "loader": lambda i: load(i, True, None),
            "unverified": lambda i: load(i, False, False),
            "always": lambda i: load(i, False, True),
            "plain copy of a save": lambda i: _copy(plain_saves[i % _CONTEXTS]),
            "save": save,
        },
        step,
    )
    for lease in leases:
        side.release(lease)
    unverified = statistics.median(found["unverified"])

    def cost(which: str, at_most: float | None) -> Figure:
        seconds = statistics.median(found[which])
        note = "1 = never verified"
        title = f"{name}: time of a load, verified {'as by default' if which == 'bytes' else which}"
        return Figure(title, seconds * 1e3, "ms", unverified * 1e3, "never verified", at_most=at_most, note=note)

    return [
        rate(f"{name}: load, bytes only", found, "bytes", "plain copy", nbytes, at_least=0.8),
        rate(f"{name}: load, keys rotated", found, "loader", "plain copy", nbytes),
        rate(f"{name}: save", found, "save", "plain copy of a save", nbytes, at_least=0.8),
        cost("bytes", 1.05),
        cost("always", None),
    ]


def _load_pieces(lease: Lease, kv: WorkingKv) -> Iterator[Piece]:
    """What a load moves, in the order in which it does."""
    for layer in range(kv.shape.layers):
        for place, ref in enumerate(lease.chunks):
            start = place * CHUNK_TOKENS
            for view, part in zip(lease.arena.layer(ref.slot, layer, ref.tokens), (kv.keys, kv.values), strict=True):
                yield part[layer, start:].data_ptr(), view.ctypes.data, len(view)


def _save_pieces(kv: WorkingKv, target: np.ndarray) -> Iterator[Piece]:
    """What a save moves, in the order in which it does: layer by layer of one chunk after another."""
    address = target.ctypes.data
    for start in range(0, kv.length, CHUNK_TOKENS):
        for layer in range(kv.shape.layers):
            for part in (kv.raw.keys, kv.values):
                piece = part[layer, start : start + CHUNK_TOKENS]
                yield address, piece.data_ptr(), piece.nbytes
                address += piece.nbytes


def _copy(pieces: list[Piece]) -> float:
    move = ctypes.memmove
    started = time.perf_counter()
    for target, source, nbytes in pieces:
        move(target, source, nbytes)
    return time.perf_counter() - started


def _shared_memory(nbytes: int) -> np.ndarray:
    """Memory of the arena's kind, every page touched.  # [nbytes] uint8"""
    memory = np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    memory[::4096] = 0
    return memory
