"""Layer-wise pre-loading (the paper's section 3.2.1): history comes back layer by layer under the computation.

One thread moves layer l of a job's chunks from the arena into working KV, rotating keys to their positions on
the way, while the engine computes layer l - 1. Jobs that wait for the engine are loaded while others compute.
Chunks that come from SSD are taken up as their layers arrive in the arena.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from inference.rotary import Rotary
from inference.working_kv import WorkingKv
from monitoring.logs import get_logger
from protocol.arena import Arena
from protocol.errors import CachedAttentionError
from protocol.messages import SlotRef

log = get_logger(__name__)

_POLL_S = 0.0002  # how often a layer that comes from SSD is looked for


class LoadFailed(CachedAttentionError):
    """History did not arrive. The turn computes it instead. `reason` is the miss reason of the account."""

    code = "load_failed"

    def __init__(self, reason: str, task: LoadTask, ref: SlotRef | None = None) -> None:
        super().__init__(f"history did not arrive: {reason}")
        self.reason = reason
        self.task = task
        self.ref = ref


class LoadTask:
    """The history of one job on its way. Written by the loader's thread, waited for by the engine's."""

    def __init__(
        self, kv: WorkingKv, arena: Arena, chunks: Sequence[SlotRef], deadline_s: float, on_end: Callable[[], None]
    ) -> None:
        """kv: begun with the history's length. deadline_s: monotonic. on_end: called once, from the loader's thread."""
        self.kv = kv
        self.arena = arena
        self.busy_s = 0.0  # the loader's work on it
        self.waited_s = 0.0  # the engine's wait for it
        self.started_s = 0.0
        self.ended_s = 0.0
        self.deadline_s = deadline_s
        self.on_end = on_end
        self.is_cancelled = False
        self.failure: LoadFailed | None = None
        self._ready = 0
        self._changed = threading.Condition()
        # (chunk, its first position, how many of its tokens the job uses), as far as the history reaches
        self.pieces: list[tuple[SlotRef, int, int]] = []
        start = 0
        for ref in chunks:
            used = min(ref.tokens, kv.length - start)
            if used > 0:
                self.pieces.append((ref, start, used))
            start += ref.tokens

    @property
    def ready_layers(self) -> int:
        return self._ready

    @property
    def overlap_ratio(self) -> float:
        """Part of the loading time that ran under computation."""
        span = self.ended_s - self.started_s
        return 1.0 - min(1.0, self.waited_s / span) if span > 0 else 1.0

    def has_begun(self) -> bool:
        """Whether computing may start: a layer is there, or it never will be."""
        return self._ready > 0 or self.failure is not None

    def wait_layer(self, layer: int) -> None:
        """Wait until layer `layer` is in working KV. Raises LoadFailed: it will not come."""
        if self._ready > layer:
            return
        started = time.monotonic()
        with self._changed:
            while self._ready <= layer and self.failure is None:
                if not self._changed.wait(max(0.0, self.deadline_s - time.monotonic()) + 0.1):
                    raise LoadFailed("load_failed", self)
            self.waited_s += time.monotonic() - started
            if self._ready <= layer:
                assert self.failure is not None
                raise self.failure

    def layer_ready(self, layer: int) -> None:
        with self._changed:
            self._ready = layer + 1
            self._changed.notify_all()

    def fail(self, failure: LoadFailed) -> None:
        with self._changed:
            self.failure = failure
            self._changed.notify_all()


class Loader:
    """The loader's thread. `submit` from any thread."""

    def __init__(self, rotary: Rotary, on_layer: Callable[[], None]) -> None:
        """on_layer: called from the loader's thread when a job's first layer is there."""
        self._rotary = rotary
        self._on_layer = on_layer
        self._new: list[LoadTask] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(5.0)

    def submit(self, task: LoadTask) -> None:
        with self._wake:
            self._new.append(task)
            self._wake.notify()

    def _run(self) -> None:
        # KV copies are best on one thread; the others belong to the computation.
        torch.set_num_threads(1)
        active: list[LoadTask] = []
        while True:
            with self._wake:
                while not self._new and not active and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                active += self._new
                self._new = []
            if not self._advance_all(active) and active:
                time.sleep(_POLL_S)

    def _advance_all(self, active: list[LoadTask]) -> bool:
        """Load what is there of all tasks and take out those that end. False: nothing done.

        A frame of its own: no name of the waiting loop keeps a finished job's memory from the next job.
        """
        progressed = False
        for task in list(active):
            # First come, first served, but a job that waits for the SSD lets the next one pass.
            while self._advance(task):
                progressed = True
            if task.is_cancelled or task.failure is not None or task.ready_layers == task.kv.shape.layers:
                active.remove(task)
                task.ended_s = time.monotonic()
                task.on_end()
        return progressed

    def _advance(self, task: LoadTask) -> bool:
        """Load the next layer of a task, if it is there. False: nothing done."""
        layer = task.ready_layers
        if task.is_cancelled or task.failure is not None or layer == task.kv.shape.layers:
            return False
        if task.started_s == 0.0:
            task.started_s = time.monotonic()
        try:
            arrived = all(task.arena.ready_layers(ref.slot) > layer for ref, _, _ in task.pieces)
            if not arrived:
                self._check_waiting(task)
                return False
            started = time.monotonic()
            for ref, start, used in task.pieces:
                self._load_piece(task, layer, ref, start, used)
            if task.kv.shape.device.type == "cuda":
                torch.cuda.current_stream(task.kv.shape.device).synchronize()
            task.busy_s += time.monotonic() - started
            task.layer_ready(layer)
        except LoadFailed as failure:
            task.fail(failure)
        except Exception:  # whatever it is, the turn goes on by computing
            log.exception("loading failed")
            task.fail(LoadFailed("load_failed", task))
        if layer == 0:
            self._on_layer()
        return True

    def _check_waiting(self, task: LoadTask) -> None:
        for ref, _, _ in task.pieces:
            if not task.arena.is_current(ref.slot, ref.generation, ref.chunk_id):
                raise LoadFailed("revoked", task, ref)
        if time.monotonic() > task.deadline_s:
            raise LoadFailed("load_failed", task)

    @torch.inference_mode()
    def _load_piece(self, task: LoadTask, layer: int, ref: SlotRef, start: int, used: int) -> None:
        arena, kv, shape = task.arena, task.kv, task.kv.shape
        if not arena.is_current(ref.slot, ref.generation, ref.chunk_id):
            raise LoadFailed("revoked", task, ref)
        if ref.verify and not arena.verify_layer(ref.slot, layer, ref.tokens):
            raise LoadFailed("corrupt", task, ref)
        key_bytes, value_bytes = arena.layer(ref.slot, layer, used)
        raw = as_tensor(key_bytes, shape.dtype, shape.kv_heads, shape.key_dim).to(shape.device)
        end = start + used
        kv.keys[layer, start:end] = self._rotary.rotate_keys(raw, self._rotary.span(start, end))
        kv.values[layer, start:end] = as_tensor(value_bytes, shape.dtype, shape.kv_heads, shape.value_dim)
        tail = max(start, kv.raw.base)
        if tail < end:
            kv.raw.span(layer, tail, end).copy_(raw[tail - start :])
        # The bytes count only if the slot was ours to read from first to last.
        if not arena.is_current(ref.slot, ref.generation, ref.chunk_id):
            raise LoadFailed("revoked", task, ref)


def as_tensor(view: np.ndarray, dtype: torch.dtype, heads: int, dim: int) -> torch.Tensor:
    """Bytes of the arena as KV, without a copy.  # [tokens, heads, dim]"""
    return torch.from_numpy(view).view(dtype).view(-1, heads, dim)
