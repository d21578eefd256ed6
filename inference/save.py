"""Asynchronous saving (the paper's section 3.2.2): new KV goes to the store while the computation goes on.

One thread copies un-rotated keys and values from working KV into reserved slots, layer by layer as layers are
computed, and commits each chunk when it is whole: full chunks as they fill, also during decode, the partial one
at the end, then the manifest. A turn that ends before it is saved leaves its working KV behind as the write
buffer and blocks nobody.

The thread is level-triggered: it looks at how far each layer of each job is computed and does what is missing.
What a lost daemon forgot is done again from the working KV.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from inference.preload import as_tensor
from inference.store import Reservation, Store
from inference.working_kv import WorkingKv
from monitoring.logs import get_logger
from protocol.arena import layer_checksum
from protocol.errors import CachedAttentionError
from protocol.ids import ROOT, TokenArray, chunk_id
from protocol.messages import CommittedChunk, Manifest

log = get_logger(__name__)
T = TypeVar("T")

_RETRY_S = 0.1
_GIVE_UP_S = 15.0  # after its turn ended, a context that cannot be saved is let go
_SPARE_SLOTS = 2  # reserved ahead, so that a chunk that fills during decode finds its slot at once


def _nobody(saved: bool) -> None:
    """Nobody waits for the end of this task."""


@dataclass
class _Chunk:
    """The chunk being saved."""

    reservation: Reservation
    layers: int = 0  # copied so far


class SaveTask:
    """One turn's new KV on its way to the store.

    The engine moves `computed` (per layer, tokens written) and appends to `token_ids`; the saver follows.
    """

    def __init__(self, kv: WorkingKv, namespace: bytes, history: TokenArray, token_ids: list[int], chunk_tokens: int):
        """kv: begun. history: ids of all tokens before the first chunk that is saved anew. token_ids: all, growing."""
        self.kv = kv
        self.raw = kv.raw  # a later turn that takes the KV over gives it other raw keys
        self.namespace = namespace
        self.chunk_tokens = chunk_tokens
        self.token_ids = token_ids
        self.computed = [kv.length] * kv.shape.layers
        self.chunk_ids: list[bytes] = []  # all chunks of the context, saved ones and before
        self.next_start = len(history)  # first token of the chunk being saved
        self.chunk: _Chunk | None = None
        self.final: Manifest | None = None  # set when the turn is over
        self.final_s = 0.0
        self.is_abandoned = False
        self.on_end: Callable[[bool], None] = _nobody
        parent = ROOT
        for start in range(0, len(history), chunk_tokens):
            parent = chunk_id(namespace, parent, history[start : start + chunk_tokens])
            self.chunk_ids.append(parent)

    def layer_done(self, layer: int, tokens: int) -> None:
        self.computed[layer] = tokens

    def saved_manifest(self, manifest: Manifest) -> Manifest:
        """`manifest` with the chunks that were saved. To be asked when all are."""
        return replace(manifest, chunk_ids=tuple(self.chunk_ids))


class Saver:
    """The saver's thread. Methods may be called from any thread but its own."""

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop, observe: Callable[[int, float], None]) -> None:
        """observe: called with (tokens, seconds of copying) for every chunk committed."""
        self._store = store
        self._loop = loop
        self._observe = observe
        self._tasks: list[SaveTask] = []
        self._spare: list[Reservation] = []
        self._wake = threading.Condition()
        self._is_notified = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)

    @property
    def backlog(self) -> int:
        """Turns that are over and not saved yet."""
        return sum(task.final is not None for task in list(self._tasks))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(5.0)

    def begin(self, task: SaveTask) -> None:
        with self._wake:
            self._tasks.append(task)

    def notify(self) -> None:
        """Something was computed that could complete a chunk."""
        with self._wake:
            self._is_notified = True
            self._wake.notify()

    def finish(self, task: SaveTask, manifest: Manifest, on_end: Callable[[bool], None]) -> None:
        """The turn is over: save the rest, then `manifest` (without chunk ids; they are filled in).

        on_end: called once from the saver's thread; False: given up.
        """
        task.on_end = on_end
        task.final_s = time.monotonic()
        task.final = manifest
        self.notify()

    def abandon(self, task: SaveTask) -> None:
        """The turn failed or was cancelled: what is committed stays, the rest is dropped."""
        task.is_abandoned = True
        self.notify()

    # -- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(1)
        while True:
            with self._wake:
                if not self._is_notified and not self._stopping:
                    waits_to_retry = any(task.final is not None for task in self._tasks)
                    self._wake.wait(_RETRY_S if waits_to_retry else None)
                if self._stopping:
                    return
                self._is_notified = False
            self._step_all()

    def _step_all(self) -> None:
        # A frame of its own: no name of the waiting loop keeps a saved turn's memory from the next turn.
        for task in list(self._tasks):
            if self._step(task):
                with self._wake:
                    self._tasks.remove(task)
        if not self._tasks and len(self._spare) > _SPARE_SLOTS:
            self._give_back()

    def _step(self, task: SaveTask) -> bool:
        """Save what can be saved now. True: the task is over."""
        if task.is_abandoned:
            if task.chunk is not None:
                self._spare.append(task.chunk.reservation)
            return True
        saved = False
        try:
            saved = self._advance(task)
        except CachedAttentionError:
            pass  # the daemon is away or full; tried again until the turn is given up
        except Exception:
            log.exception("saving failed")
            task.is_abandoned = True
        gave_up = task.is_abandoned or (task.final is not None and time.monotonic() - task.final_s > _GIVE_UP_S)
        if not saved and not gave_up:
            return False
        if not saved:
            log.warning("a turn was not saved", tokens=len(task.token_ids) - task.next_start)
        # The callback holds the task: without letting go of it, only the cycle collector would free the memory.
        on_end, task.on_end = task.on_end, _nobody
        on_end(saved)
        return True

    @torch.inference_mode()
    def _advance(self, task: SaveTask) -> bool:
        """Copy and commit as far as computed. True: all of it is in the store. Raises PeerError, CapacityError."""
        chunk_tokens = self._store.geometry.chunk_tokens
        end_of_turn = None if task.final is None else task.final.kv_tokens
        while end_of_turn is None or task.next_start < end_of_turn:
            start = task.next_start
            end = start + chunk_tokens if end_of_turn is None else min(start + chunk_tokens, end_of_turn)
            ready = sum(tokens >= end for tokens in task.computed)
            if ready == 0:
                return False
            if task.chunk is not None and task.chunk.reservation.session != self._store.session:
                task.chunk = None  # the daemon forgot the slot: begin the chunk again
            if task.chunk is None:
                reservation = self._reserve(task)
                if reservation is None:
                    return False
                task.chunk = _Chunk(reservation)
            started = time.monotonic()
            while task.chunk.layers < ready:
                if not self._copy_layer(task, task.chunk, start, end):
                    return False
                task.chunk.layers += 1
            if task.chunk.layers < task.kv.shape.layers:
                return False
            self._commit(task, task.chunk, start, end)
            self._observe(end - start, time.monotonic() - started)
        assert task.final is not None
        self._ask(self._store.save_manifest(task.saved_manifest(task.final)))
        return True

    def _reserve(self, task: SaveTask) -> Reservation | None:
        self._spare = [r for r in self._spare if r.session == self._store.session]
        if not self._spare:
            chunks_ahead = -(-(min(task.computed) - task.next_start) // self._store.geometry.chunk_tokens)
            self._spare = self._ask(self._store.reserve(max(chunks_ahead, _SPARE_SLOTS)))
        return self._spare.pop(0) if self._spare else None

    def _give_back(self) -> None:
        spare, self._spare = self._spare[_SPARE_SLOTS:], self._spare[:_SPARE_SLOTS]
        self._ask(self._store.unreserve(spare))

    def _copy_layer(self, task: SaveTask, chunk: _Chunk, start: int, end: int) -> bool:
        """Copy one layer of a chunk into its slot. False: the slot is void."""
        shape, layer, slot = task.kv.shape, chunk.layers, chunk.reservation.slot
        with self._store.writing(chunk.reservation) as arena:
            if arena is None:
                task.chunk = None
                return False
            key, value = arena.layer(slot, layer, end - start)
            as_tensor(key, shape.dtype, shape.kv_heads, shape.key_dim).copy_(task.raw.span(layer, start, end))
            as_tensor(value, shape.dtype, shape.kv_heads, shape.value_dim).copy_(task.kv.values[layer, start:end])
            arena.set_layer_ready(slot, layer, layer_checksum(key, value))
        return True

    def _commit(self, task: SaveTask, chunk: _Chunk, start: int, end: int) -> None:
        parent = task.chunk_ids[-1] if task.chunk_ids else ROOT
        tokens = task.token_ids[start:end]
        identity = chunk_id(task.namespace, parent, tokens)
        reservation = chunk.reservation
        accepted = self._ask(
            self._store.commit(
                [
                    CommittedChunk(
                        reservation.slot, reservation.generation, identity, parent, task.namespace, end - start
                    )
                ]
            )
        )
        task.chunk = None
        if not accepted[0]:
            raise CachedAttentionError("the store refused a chunk; it is saved again")
        task.chunk_ids.append(identity)
        task.next_start = end

    def _ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a request on the event loop and wait for it; it has a deadline of its own."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
