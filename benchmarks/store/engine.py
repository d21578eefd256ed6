"""One inference process's side of the store without a model: the real connection, loader and saver, and made KV."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import shutil
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.stack import Stack
from inference.preload import Loader, LoadTask
from inference.rotary import KeyRotation, Rotary, RotaryTable
from inference.save import Saver, SaveTask
from inference.store import Lease, Store
from inference.working_kv import Buffers, KvShape, WorkingKv
from protocol.arena import Geometry
from protocol.ids import TokenArray, digest, lineage, new_id, pack_tokens
from protocol.messages import Acquire, Manifest

T = TypeVar("T")
CHUNK_TOKENS = 256
_ASK_S = 120.0


def kv_shape(layer_bytes: int, layers: int, dtype: torch.dtype = torch.bfloat16) -> KvShape:
    """A shape whose chunk has layers of `layer_bytes`: heads of 128, as in today's models."""
    heads = layer_bytes // (2 * CHUNK_TOKENS * 128 * dtype.itemsize)
    return KvShape(layers, heads, 128, 128, dtype, torch.device("cpu"))


def geometry_of(shape: KvShape) -> Geometry:
    itemsize = shape.dtype.itemsize
    return Geometry(
        shape.layers,
        shape.kv_heads * shape.key_dim * itemsize,
        shape.kv_heads * shape.value_dim * itemsize,
        CHUNK_TOKENS,
    )


def rotary_of(shape: KvShape, max_context: int, kind: type[Rotary]) -> Rotary:
    """Llama's rotation, as the engine applies it to keys that it loads, or a stand-in for it."""
    frequencies = 1e4 ** (-torch.arange(0, shape.key_dim, 2).float() / shape.key_dim)
    angles = torch.outer(torch.arange(max_context).float(), frequencies).repeat(1, 2)
    table = RotaryTable(apply_rotary_pos_emb, angles.cos().to(shape.dtype), angles.sin().to(shape.dtype))
    return kind([table] * shape.layers)


class Unrotated(Rotary):
    """Hands keys over as they are stored: what a load costs without the arithmetic on it."""

    def key_rotation(self, start: int, end: int, shape: KvShape) -> KeyRotation:
        def hand_over(layer: int, key: torch.Tensor, out: torch.Tensor) -> None:
            ctypes.memmove(out.data_ptr(), key.data_ptr(), key.nbytes)

        return hand_over


@dataclass
class Context:
    """A saved context of whole chunks."""

    token_ids: TokenArray
    chunk_ids: list[bytes]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


class EngineSide:
    """Connects at once. Methods are for one thread; the event loop runs in another, as in inference."""

    def __init__(self, run_dir: Path, shape: KvShape, max_context: int) -> None:
        self.shape = shape
        self.geometry = geometry_of(shape)
        self.buffers = Buffers(shape, 0)
        self.namespace = digest("benchmark", new_id())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loop", daemon=True)
        self._thread.start()
        self.store: Store = self.ask(self._make_store(run_dir))
        self.ask(self.store.start(_ASK_S))
        self.loader = Loader(rotary_of(shape, max_context, Rotary), lambda: None)
        self.loader.start()
        self.mover = Loader(rotary_of(shape, max_context, Unrotated), lambda: None)
        self.mover.start()
        self.saver = Saver(self.store, self._loop, lambda tokens, seconds: None)
        self.saver.start()

    async def _make_store(self, run_dir: Path) -> Store:
        return Store(f"ipc://{run_dir}/kvdaemon.sock", run_dir, self.geometry, digest("benchmark", b"model"))

    def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the event loop and wait. Raises what the coroutine raised; TimeoutError."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_ASK_S)

    def close(self) -> None:
        self.loader.stop()
        self.mover.stop()
        self.saver.stop()
        self.ask(self.store.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    # -- contexts -----------------------------------------------------------------------------------------

    def working_kv(self, tokens: int, raw_base: int) -> WorkingKv:
        """Working KV for `tokens` tokens, every page touched."""
        kv = WorkingKv(self.buffers, tokens)
        kv.begin(tokens, raw_base, tokens)
        for part in (kv.keys, kv.values, kv.raw.keys):
            part.zero_()
        return kv

    def new_context(self, chunks: int) -> Context:
        """A context that nobody saved yet."""
        token_ids = np.random.default_rng().integers(0, 2**17, chunks * CHUNK_TOKENS, dtype=np.uint32)
        return Context(token_ids, lineage(self.namespace, token_ids, CHUNK_TOKENS))

    def computed(self, tokens: int, seed: int) -> WorkingKv:
        """Working KV as a prefill of `tokens` tokens leaves it, raw keys and all, filled with noise."""
        kv = self.working_kv(tokens, 0)
        # Noise of bytes, cheaply: what it means as numbers does not matter to a copy.
        noise = np.random.default_rng(seed)
        for part in (kv.raw.keys, kv.values):
            view = part.view(torch.uint8).numpy().reshape(-1)
            view[:] = np.frombuffer(noise.bytes(len(view)), dtype=np.uint8)
        return kv

    def save(self, context: Context, kv: WorkingKv) -> float:
        """Save a context through the saver. Returns seconds. Raises RuntimeError: the saver gave up."""
        ended = threading.Event()
        outcome: list[bool] = []

        def on_end(saved: bool) -> None:
            outcome.append(saved)
            ended.set()

        nothing = np.zeros(0, dtype=np.uint32)
        task = SaveTask(kv, self.namespace, nothing, context.token_ids, CHUNK_TOKENS)
        manifest = Manifest(new_id(), self.namespace, pack_tokens(context.token_ids), "", (), context.tokens)
        started = time.perf_counter()
        self.saver.begin(task)
        self.saver.finish(task, manifest, on_end)
        if not ended.wait(_ASK_S) or not outcome[0]:
            raise RuntimeError("a context could not be saved")
        return time.perf_counter() - started

    def acquire(self, context: Context) -> Lease:
        """Raises RuntimeError: not all of the context is there."""
        asked = Acquire(new_id(), self.namespace, tuple(context.chunk_ids), lease_ms=120_000)
        lease, reason, _ = self.ask(self.store.acquire(asked))
        if lease is None or len(lease.chunks) < len(context.chunk_ids):
            raise RuntimeError(f"chunks are missing: {reason}")
        return lease

    def release(self, lease: Lease) -> None:
        self.ask(self.store.release(lease.lease_id))

    def load(self, lease: Lease, kv: WorkingKv, *, rotate: bool = True, verify: bool | None = None) -> float:
        """Load a leased context through the loader. Returns the loader's seconds from first byte to end.

        rotate: False: keys are handed over as they are stored. verify: None: the chunks that the daemon says.
        Raises LoadFailed.
        """
        chunks = lease.chunks if verify is None else tuple(ref._replace(verify=verify) for ref in lease.chunks)
        ended = threading.Event()
        task = LoadTask(kv, lease.arena, chunks, time.monotonic() + _ASK_S, ended.set)
        (self.loader if rotate else self.mover).submit(task)
        ended.wait(_ASK_S)
        task.wait_layer(self.shape.layers - 1)
        return task.ended_s - task.started_s


@contextlib.contextmanager
def running_daemon(disk: Path, **settings: Any) -> Iterator[Stack]:
    """A kvdaemon with its data on `disk`, without the other services."""
    disk.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="ca-store-", dir=disk))
    # LRU: reading contexts in turn then finds each on SSD, as the measurements want it.
    stack = Stack(home, "embedded", {"log_level": "warning", "placement": "lru", **settings})
    try:
        stack.start("kvdaemon")
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def engine_side(stack: Stack, shape: KvShape, max_context: int) -> Iterator[EngineSide]:
    side = EngineSide(stack.run_dir, shape, max_context)
    try:
        yield side
    finally:
        side.close()


def save_contexts(side: EngineSide, count: int, chunks: int) -> list[Context]:
    """Save `count` new contexts of `chunks` chunks each."""
    contexts: Sequence[Context] = [side.new_context(chunks) for _ in range(count)]
    for seed, context in enumerate(contexts):
        side.save(context, side.computed(context.tokens, seed))
    return list(contexts)
