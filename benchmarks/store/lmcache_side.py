"""LMCache's storage manager behind a pipe: a program for LMCache's own environment, run by path, not as a module.

Reads one JSON command a line from standard input and answers each with one line on the file descriptor that it was
given (LMCache prints to standard output). Chunks are numbered; the bytes of chunk n follow from n. An engine's part
is played by buffers of keys and values per layer, as ours has them: put copies from them, get copies into them, on one
thread.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.storage_manager import StorageManager

_TOKENS, _DIM = 256, 128


class Side:
    def __init__(self, disk: str, ram_gb: float, disk_gb: float, layers: int, heads: int, direct: bool) -> None:
        torch.set_num_threads(1)
        self.layers, self.heads = layers, heads
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=_TOKENS,
            local_cpu=True,
            max_local_cpu_size=ram_gb,
            local_disk=disk,
            max_local_disk_size=disk_gb,
            extra_config={"use_odirect": direct},
        )
        metadata = LMCacheMetadata(
            model_name="benchmark",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(layers, 2, _TOKENS, heads, _DIM),
        )
        self.manager = StorageManager(config, metadata, EventManager())
        self.shape = metadata.get_shapes()[0]
        self.on_disk = self.manager.storage_backends["LocalDiskBackend"]
        self.buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # -- an engine's part -----------------------------------------------------------------------------------

    def _buffer(self, which: int, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a context, touched.  # each [layers, tokens, heads, dim]"""
        if which not in self.buffers:
            shape = (self.layers, chunks * _TOKENS, self.heads, _DIM)
            self.buffers[which] = (torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))
        return self.buffers[which]

    def _copy(self, parts: tuple[torch.Tensor, torch.Tensor], place: int, tensor: torch.Tensor, *, out: bool) -> None:
        span = slice(place * _TOKENS, (place + 1) * _TOKENS)
        for part, half in zip(parts, tensor.view(2, self.layers, _TOKENS, self.heads, _DIM), strict=True):
            if out:
                half.copy_(part[:, span])
            else:
                part[:, span].copy_(half)

    def _get(self, keys: list[CacheEngineKey]) -> list[Any]:
        """As its engine does: ask where each chunk is, then get those of one place together."""
        places = [self.manager.contains(key) for key in keys]
        found: dict[CacheEngineKey, Any] = {}
        for location in {place for place in places if place is not None}:
            here = [key for key, place in zip(keys, places, strict=True) if place == location]
            found |= zip(here, self.manager.batched_get(here, location), strict=True)
        return [found.get(key) for key in keys]

    # -- commands -------------------------------------------------------------------------------------------

    def fill(self, which: int, first: int, chunks: int) -> dict[str, Any]:
        """Make buffer `which` the KV of chunks first, first + 1, ..."""
        for part, salt in zip(self._buffer(which, chunks), (0, 1), strict=True):
            for place in range(chunks):
                span = part[:, place * _TOKENS : (place + 1) * _TOKENS]
                span.copy_(_noise(first + place, salt, span.shape))
        return {}

    def put(self, which: int, first: int, chunks: int) -> dict[str, Any]:
        """Seconds until all chunks are in RAM; how many were not taken for want of memory."""
        parts = self._buffer(which, chunks)
        refused = 0
        started = time.perf_counter()
        for place in range(chunks):
            held = self.manager.allocate(self.shape, torch.bfloat16, MemoryFormat.KV_2LTD, busy_loop=False)
            if held is None:
                refused += 1
                continue
            self._copy(parts, place, held.tensor, out=True)
            self.manager.batched_put([_key(first + place)], [held])
        return {"seconds": time.perf_counter() - started, "refused": refused}

    def drain(self, first: int, chunks: int, limit_s: float) -> dict[str, Any]:
        """Wait until nothing of these chunks is being written to disk."""
        started = time.perf_counter()
        waiting = [_key(first + place) for place in range(chunks)]
        while waiting and time.perf_counter() - started < limit_s:
            waiting = [key for key in waiting if self.on_disk.exists_in_put_tasks(key)]
            time.sleep(0.002)
        return {"stuck": len(waiting)}

    def get(self, which: int, first: int, chunks: int) -> dict[str, Any]:
        """Seconds until all chunks are in buffer `which`, and how many were found."""
        parts = self._buffer(which, chunks)
        started = time.perf_counter()
        found = self._get([_key(first + place) for place in range(chunks)])
        for place, held in enumerate(found):
            if held is not None:
                self._copy(parts, place, held.tensor, out=False)
                held.ref_count_down()
        return {"seconds": time.perf_counter() - started, "hits": sum(held is not None for held in found)}

    def forget_ram(self, first: int, chunks: int) -> dict[str, Any]:
        for place in range(chunks):
            self.manager.remove(_key(first + place), ["LocalCPUBackend"])
        return {}

    def look(self, first: int, chunks: int) -> dict[str, Any]:
        """How many chunks each backend says it has."""
        where = [self.manager.contains(_key(first + place)) for place in range(chunks)]
        return {"ram": where.count("LocalCPUBackend"), "disk": where.count("LocalDiskBackend")}

    def check(self, first: int, chunks: int) -> dict[str, Any]:
        """Get each chunk alone and compare its bytes with what was put."""
        outcome = {"right": 0, "wrong": 0, "missing": 0}
        for place in range(chunks):
            held = self._get([_key(first + place)])[0]
            if held is None:
                outcome["missing"] += 1
                continue
            halves = held.tensor.view(2, self.layers, _TOKENS, self.heads, _DIM)
            shape = halves[0].shape
            same = all(
                torch.equal(half.view(torch.int16), _noise(first + place, salt, shape).view(torch.int16))
                for half, salt in zip(halves, (0, 1), strict=True)
            )
            outcome["right" if same else "wrong"] += 1
            held.ref_count_down()
        return outcome


def _noise(chunk: int, salt: int, shape: torch.Size) -> torch.Tensor:
    raw = np.random.default_rng((chunk, salt)).bytes(2 * shape.numel())
    return torch.from_numpy(np.frombuffer(raw, dtype=np.int16).copy()).view(torch.bfloat16).view(shape)


def _key(chunk: int) -> CacheEngineKey:
    return CacheEngineKey("benchmark", 1, 0, chunk + 1, torch.bfloat16)


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    side = Side(**json.loads(sys.argv[2]))

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({})
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(getattr(side, command.pop("do"))(**command))
        except Exception as error:  # an outcome too: the other side reports it
            answer({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # its threads do not end by themselves


if __name__ == "__main__":
    main()
