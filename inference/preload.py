"""Layer-wise pre-loading (the paper's section 3.2.1): history comes back layer by layer under the computation.

One thread moves layer l of a job's chunks from the arena into working KV, rotating keys to their positions on
the way, while the engine computes layer l - 1. Jobs that wait for the engine are loaded while others compute.
Chunks that come from SSD are taken up as their layers arrive in the arena.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inference.rotary import KeyRotation, Rotary
from inference.worker import Worker
from inference.working_kv import WorkingKv, as_bytes
from monitoring.logs import get_logger
from protocol.arena import Arena, HeldSlots
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
        self.loaded_bytes = 0
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
        # (chunk, first position, last + 1 that the job uses), as far as the history reaches
        self.spans: list[tuple[SlotRef, int, int]] = []
        start = 0
        for ref in chunks:
            if start < kv.length:
                self.spans.append((ref, start, min(start + ref.tokens, kv.length)))
            start += ref.tokens
        self.slots = HeldSlots(arena, [(ref.slot, ref.generation, ref.chunk_id) for ref, _, _ in self.spans])
        self.pieces: list[Piece] = []  # the loader's, from its start to its end

    @property
    def ready_layers(self) -> int:
        return self._ready

    @property
    def overlap_ratio(self) -> float:
        """Part of the loading time that ran under computation."""
        span = self.ended_s - self.started_s
        return 1.0 - min(1.0, self.waited_s / span) if span > 0 else 1.0

    @property
    def is_over(self) -> bool:
        """Nothing more will come."""
        return self.is_cancelled or self.failure is not None or self._ready == self.kv.shape.layers

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


@dataclass(frozen=True)
class Piece:
    """One chunk's way into working KV: views of both ends, for all layers."""

    ref: SlotRef
    stored_keys: tuple[torch.Tensor, ...]  # by layer, [tokens, kv_heads, key_dim]
    keys: tuple[torch.Tensor, ...]  # the same
    rotate: KeyRotation
    copies: list[tuple[Any, Any]]  # to, from; see as_bytes
    is_seen: tuple[bool, ...]  # by layer: False: it lies before the window of all tokens behind the history
    layer_bytes: int

    def load(self, layer: int) -> None:
        keys = self.keys[layer]
        self.rotate(layer, self.stored_keys[layer].to(keys.device), keys)
        for target, source in self.copies:
            target[layer] = source[layer]


def cut(task: LoadTask, rotary: Rotary) -> list[Piece]:
    """The pieces of a task. Views are made here, once: for every layer they would cost as much as a small copy."""
    arena, kv, shape = task.arena, task.kv, task.kv.shape
    key_bytes, value_bytes = arena.geometry.key_bytes, arena.geometry.value_bytes
    heads = (arena.geometry.chunk_tokens, shape.kv_heads, shape.key_dim)
    stored_keys = torch.from_numpy(arena.keys).view(shape.dtype).unflatten(2, heads)
    on_cpu = shape.device.type == "cpu"
    from_keys = arena.keys if on_cpu else torch.from_numpy(arena.keys)
    from_values = arena.values if on_cpu else torch.from_numpy(arena.values)
    values, raw, raw_base = as_bytes(kv.values), as_bytes(kv.raw.keys), kv.raw.base
    history = max((end for _, _, end in task.spans), default=0)
    hidden = [shape.hidden_before(layer, history) for layer in range(shape.layers)]
    pieces = []
    for ref, start, end in task.spans:
        used = end - start
        copies = [
            (values[:, start * value_bytes : end * value_bytes], from_values[ref.slot, :, : used * value_bytes]),
        ]
        tail = max(start, raw_base)
        if tail < end:  # of a chunk that will be saved again, longer: its raw keys
            to = raw[:, (tail - raw_base) * key_bytes : (end - raw_base) * key_bytes]
            copies.append((to, from_keys[ref.slot, :, (tail - start) * key_bytes : used * key_bytes]))
        rotate = rotary.key_rotation(start, end, shape)
        from_, to_ = stored_keys[ref.slot, :, :used].unbind(), kv.keys[:, start:end].unbind()
        # The last chunk may be saved again, so all of it is wanted.
        is_seen = tuple(end > border or end == history for border in hidden)
        if not all(is_seen):
            kv.whole_from = history
        pieces.append(Piece(ref, from_, to_, rotate, copies, is_seen, used * (key_bytes + value_bytes)))
    return pieces


class Loader:
    """The loader's thread. `submit` from any thread."""

    def __init__(self, rotary: Rotary, on_layer: Callable[[], None]) -> None:
        """on_layer: called from the loader's thread when a job's first layer is there or never will be."""
        self._rotary = rotary
        self._on_layer = on_layer
        self._new: deque[LoadTask] = deque()
        self._active: list[LoadTask] = []
        # KV copies are best on one thread; the others belong to the computation.
        self._worker = Worker("loader", self._advance_all, torch_threads=1)

    def start(self) -> None:
        self._worker.start()

    def stop(self) -> None:
        self._worker.stop(5.0)

    def submit(self, task: LoadTask) -> None:
        self._new.append(task)
        self._worker.notify()

    def _advance_all(self) -> float | None:
        """Load what is there of all tasks and take out those that end."""
        while self._new:
            self._active.append(self._new.popleft())
        # First come, first served, but a job that waits for the SSD lets the next one pass.
        progressed = [self._advance(task) for task in self._active]
        for task in [task for task in self._active if task.is_over]:
            self._active.remove(task)
            task.pieces.clear()
            task.ended_s = time.monotonic()
            task.on_end()
        if not self._active:
            return None
        return 0.0 if any(progressed) else _POLL_S

    @torch.inference_mode()
    def _advance(self, task: LoadTask) -> bool:
        """Load the layers of a task that are there. False: none was."""
        if task.started_s == 0.0:
            task.started_s = time.monotonic()
        begun = task.ready_layers
        try:
            arrived = task.slots.ready_layers()
            if not task.slots.are_current():
                raise LoadFailed("revoked", task)
            if arrived == begun and time.monotonic() > task.deadline_s:
                raise LoadFailed("load_failed", task)
            if not task.pieces:
                task.pieces = cut(task, self._rotary)
            while task.ready_layers < arrived and not task.is_cancelled:
                self._load_layer(task, task.ready_layers)
        except LoadFailed as failure:
            self._fail(task, failure)
        except Exception:  # whatever it is, the turn goes on by computing
            log.exception("loading failed")
            self._fail(task, LoadFailed("load_failed", task))
        return task.ready_layers > begun

    def _load_layer(self, task: LoadTask, layer: int) -> None:
        """The slots were found current. Raises LoadFailed."""
        started = time.monotonic()
        for piece in task.pieces:
            if not piece.is_seen[layer]:
                continue
            ref = piece.ref
            if ref.verify and not task.arena.verify_layer(ref.slot, layer, ref.tokens):
                raise LoadFailed("corrupt", task, ref)
            piece.load(layer)
            task.loaded_bytes += piece.layer_bytes
        if task.kv.shape.device.type == "cuda":
            torch.cuda.current_stream(task.kv.shape.device).synchronize()
        # The bytes count only if the slots were ours to read from first to last. With that they are for the next layer.
        if not task.slots.are_current():
            raise LoadFailed("revoked", task)
        task.busy_s += time.monotonic() - started
        task.layer_ready(layer)
        if layer == 0:
            self._on_layer()

    def _fail(self, task: LoadTask, failure: LoadFailed) -> None:
        task.fail(failure)
        self._on_layer()
