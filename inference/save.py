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
import contextlib
import time
from array import array
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from inference.copies import Copies
from inference.store import Reservation, Store
from inference.throttle import Throttle
from inference.worker import Worker
from inference.working_kv import Kv, as_bytes
from monitoring.logs import get_logger
from monitoring.traces import NOTHING, Span
from protocol.errors import CachedAttentionError
from protocol.ids import ROOT, TokenArray, chunk_id, pack_tokens
from protocol.lineage import kept_tokens
from protocol.messages import CommittedChunk, Manifest

log = get_logger(__name__)
T = TypeVar("T")

_RETRY_S = 0.1
GIVE_UP_S = 15.0  # after its turn ended, a context that cannot be saved is let go
_SPARE_SLOTS = 2  # reserved ahead, so that a chunk that fills during decode finds its slot at once
_COMMIT_BYTES = 32 << 20  # a request costs this process and the daemon as much as the copy of some MiB
_WAKE_BYTES = 4 << 20  # and so does waking the saver beside a computation that has all cores


def _nobody(saved: bool) -> None:
    """Nobody waits for the end of this task."""


@dataclass
class _Chunk:
    """A chunk that is not known to be saved: being copied, filled, or in a commit."""

    start: int  # of its tokens
    end: int
    reservation: Reservation
    layers: int = 0  # copied so far
    copied_s: float = 0.0
    was_told: bool = False  # to the daemon: the slot may be the daemon's by now, and is not written into again


@dataclass
class _Commit:
    """Filled chunks that the daemon was told of; with the last ones, the manifest."""

    chunks: list[_Chunk]
    is_last: bool
    reserve: int  # slots asked for
    accepted: Future[tuple[bool, ...]]


class SaveTask:
    """One turn's new KV on its way to the store.

    The engine moves `computed` (per layer, tokens written) and appends to `token_ids`; the saver follows.
    """

    def __init__(
        self,
        kv: Kv,
        namespace: bytes,
        history: TokenArray,
        token_ids: TokenArray | Sequence[int],
        chunk_tokens: int,
        links: Mapping[int, bytes] = MappingProxyType({}),
    ) -> None:
        """kv: begun. history: ids of the tokens before the first chunk that is saved anew. token_ids: of all so far.

        links: of a truncated context, see lineage_of. Tokens and places are here those of the context.
        """
        self.kv = kv
        self.raw = kv.raw  # a later turn that takes the KV over gives it other raw keys
        self.hold = kv.hold(len(history))  # on what is not known to be saved
        self.namespace = namespace
        self.chunk_tokens = chunk_tokens
        self.token_ids = array("I", pack_tokens(token_ids))
        self.computed = [kv.length] * kv.shape.layers
        self.chunk_ids: list[bytes] = []  # of the context as far as it lies in slots, saved before or now
        self.next_start = len(history)  # first token of the next chunk to fill
        self.chunk: _Chunk | None = None  # being copied
        self.filled: list[_Chunk] = []
        self.commits: list[_Commit] = []  # not answered yet, oldest first
        self.final: Manifest | None = None  # set when the turn is over, or preempted
        self.final_tokens = 0  # of the context that it saves
        self.is_preempted = False  # its chunks are saved, and no manifest: the turn goes on from them
        self.final_s = 0.0
        self.is_abandoned = False
        self.on_end: Callable[[bool], None] = _nobody
        self._links = links
        self.span: Span = NOTHING
        for start in range(0, len(history), chunk_tokens):
            self._append_id(history[start : start + chunk_tokens])

    def layer_done(self, layer: int, tokens: int) -> None:
        self.computed[layer] = tokens

    def told_after(self, start: int, end: int) -> frozenset[int]:
        """The layers after which the saver is told, where tokens from `start` to `end` are computed and fill chunks."""
        layers, filled = self.kv.shape.layers, end // self.chunk_tokens - start // self.chunk_tokens
        if not filled:
            return frozenset()
        at_once = -(-_WAKE_BYTES * layers // (filled * self.chunk_tokens * self.kv.shape.token_bytes))
        return frozenset((*range(at_once - 1, layers, at_once), layers - 1))

    def all_done(self, tokens: int) -> None:
        """Every layer is computed up to `tokens`."""
        self.computed = [tokens] * len(self.computed)

    def saved_manifest(self, manifest: Manifest) -> Manifest:
        """`manifest` with the chunks that were saved. To be asked when all are."""
        return replace(manifest, chunk_ids=tuple(self.chunk_ids))

    # -- the saver's side -----------------------------------------------------------------------------------

    @property
    def is_copied(self) -> bool:
        """Whether the turn is over and all of it lies in slots."""
        return self.final is not None and self.next_start >= self.final_tokens

    @property
    def next_end(self) -> int:
        end = self.next_start + self.chunk_tokens
        return end if self.final is None else min(end, self.final_tokens)

    def ready_layers(self, end: int) -> int:
        """How many layers are computed up to token `end`."""
        return sum(tokens >= end for tokens in self.computed)

    def fill(self, chunk: _Chunk) -> None:
        """All of `chunk` is in its slot: give it its id, and go on to the next one."""
        self._append_id(self.token_ids[chunk.start : chunk.end])
        self.filled.append(chunk)
        self.chunk = None
        self.next_start = chunk.end

    def committed(self, chunk: _Chunk) -> CommittedChunk:
        return CommittedChunk(
            chunk.reservation.slot,
            chunk.reservation.generation,
            self.chunk_ids[chunk.start // self.chunk_tokens],
            self._parent(chunk),
            self.namespace,
            chunk.end - chunk.start,
        )

    @property
    def unsaved(self) -> list[_Chunk]:
        """All that is copied, and the daemon did not confirm, oldest first."""
        sent = [chunk for commit in self.commits for chunk in commit.chunks]
        return [*sent, *self.filled, *([self.chunk] if self.chunk is not None else [])]

    def rewind(self) -> list[_Chunk]:
        """Forget what is unsaved, to copy it again. Returns it."""
        unsaved = self.unsaved
        if unsaved:
            self.next_start = unsaved[0].start
            del self.chunk_ids[self.next_start // self.chunk_tokens :]
        self.commits, self.filled, self.chunk = [], [], None
        return unsaved

    def _append_id(self, token_ids: TokenArray | Sequence[int]) -> None:
        link = self._links.get(len(self.chunk_ids)) or (self.chunk_ids[-1] if self.chunk_ids else ROOT)
        self.chunk_ids.append(chunk_id(self.namespace, link, token_ids))

    def _parent(self, chunk: _Chunk) -> bytes:
        return self.chunk_ids[chunk.start // self.chunk_tokens - 1] if chunk.start else ROOT


class Saver:
    """The saver's thread. Methods may be called from any thread but its own.

    Requests to the daemon run on the event loop while the thread copies on, and wake it when they are answered.
    """

    def __init__(
        self,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        observe: Callable[[int, float], None],
        *,
        link_bandwidth: int = 0,
        copies: Copies | None = None,
    ) -> None:
        """observe: called with (tokens, seconds of copying) for every chunk committed.

        link_bandwidth: in bytes per second, for measurements; 0: as fast as it goes.
        """
        self._store = store
        self._link = Throttle(link_bandwidth)
        self._copies = Copies() if copies is None else copies
        self._loop = loop
        self._observe = observe
        self._tasks: list[SaveTask] = []
        self._spare: list[Reservation] = []
        self._reserving: Future[list[Reservation]] | None = None
        self._given: deque[Reservation] = deque()  # with the answers to commits; the event loop appends
        self._retry_s = 0.0  # after a failure the daemon is left alone until then
        self._worker = Worker("saver", self._step_all, torch_threads=1)

    @property
    def backlog(self) -> int:
        """Turns that are over and not saved yet."""
        return sum(task.final is not None for task in list(self._tasks))

    def start(self) -> None:
        self._worker.start()

    def stop(self) -> None:
        self._worker.stop(5.0)

    def begin(self, task: SaveTask) -> None:
        self._tasks.append(task)

    def notify(self) -> None:
        """Something was computed that could complete a chunk."""
        self._worker.notify()

    def finish(
        self, task: SaveTask, manifest: Manifest, on_end: Callable[[bool], None], *, is_preempted: bool = False
    ) -> None:
        """The turn is over: save the rest, then `manifest` (without chunk ids; they are filled in).

        is_preempted: it is not over, but leaves the engine: `manifest` only tells how much there is to save.

        on_end: called once from the saver's thread; False: given up.
        """
        if task not in self._tasks:  # with synchronous saving it begins here
            self._tasks.append(task)
        task.on_end = on_end
        task.is_preempted = is_preempted
        task.final_s = time.monotonic()
        task.final_tokens = kept_tokens(manifest.kv_tokens, manifest.truncations)
        task.final = manifest
        self.notify()

    def abandon(self, task: SaveTask) -> None:
        """The turn failed or was cancelled: what is committed stays, the rest is dropped."""
        task.is_abandoned = True
        self.notify()

    # -- the thread ---------------------------------------------------------------------------------------

    def _step_all(self) -> float | None:
        for task in list(self._tasks):
            if self._step(task):
                self._tasks.remove(task)
        if not self._tasks:
            with contextlib.suppress(CachedAttentionError):
                self._take_reserved()
            if len(self._spare) > _SPARE_SLOTS:
                spare, self._spare = self._spare[_SPARE_SLOTS:], self._spare[:_SPARE_SLOTS]
                self._ask(self._store.unreserve(spare))
        busy_s = self._link.busy_s(time.monotonic())
        if busy_s:
            return busy_s
        is_waiting = any(task.final is not None for task in self._tasks) or time.monotonic() < self._retry_s
        return _RETRY_S if is_waiting else None

    def _step(self, task: SaveTask) -> bool:
        """Save what can be saved now. True: the task is over."""
        saved = False
        try:
            if not task.is_abandoned and time.monotonic() >= self._retry_s:
                saved = self._advance(task)
        except CachedAttentionError:  # the daemon is away or full; tried again until the turn is given up
            self._retry_s = time.monotonic() + _RETRY_S
        except Exception:
            log.exception("saving failed")
            task.is_abandoned = True
        gave_up = task.final is not None and time.monotonic() - task.final_s > GIVE_UP_S
        if not saved and not task.is_abandoned and not gave_up:
            return False
        self._give_back(task.rewind())
        if not saved and task.final is not None:
            log.warning("a turn was not saved", tokens=len(task.token_ids) - task.next_start)
        # The callback holds the task: without letting go of it, only the cycle collector would free the memory.
        task.hold.release()
        on_end, task.on_end = task.on_end, _nobody
        task.span.end({"saved": saved, "tokens": task.next_start})
        on_end(saved)
        return True

    @torch.inference_mode()
    def _advance(self, task: SaveTask) -> bool:
        """Copy and commit as far as computed. True: all of it is in the store.

        Raises PeerError; CachedAttentionError: what was refused is to be copied again.
        """
        if any(chunk.reservation.session != self._store.session for chunk in task.unsaved):
            self._give_back(task.rewind())  # the daemon forgot the slots
        while True:
            if self._take_answers(task):
                return True
            if self._link.busy_s(time.monotonic()):
                return False
            copied = self._copy_chunk(task)
            if self._is_time_to_commit(task, is_copying=copied):
                self._commit(task)
            if not copied:
                return False

    def _copy_chunk(self, task: SaveTask) -> bool:
        """Copy of the next chunk what is computed. False: it cannot be filled now."""
        chunk = task.chunk
        if chunk is None:
            if task.is_copied or task.ready_layers(task.next_end) == 0:
                return False
            reservation = self._reserve(task)
            if reservation is None:
                return False
            # Its end stays, even if the turn ends before it: layers that were copied have as many tokens.
            chunk = task.chunk = _Chunk(task.next_start, task.next_end, reservation)
        ready, from_layer = task.ready_layers(chunk.end), chunk.layers
        if ready == from_layer:
            return False
        started = time.monotonic()
        with task.kv.lock:  # nothing is moved meanwhile
            with self._copies.running():
                self._copies.follow()
                # Not waited for, a copy from the device is made into pinned memory.
                raw_keys = task.raw.span(slice(from_layer, ready), chunk.start, chunk.end).to("cpu", non_blocking=True)
                new_values = [
                    part.to("cpu", non_blocking=True)
                    for part in task.kv.values_of(range(from_layer, ready), chunk.start, chunk.end)
                ]
                self._copies.join()
            keys, values = as_bytes(raw_keys), [row for part in new_values for row in as_bytes(part)]
            with self._store.writing(chunk.reservation) as arena:
                if arena is None:
                    return False  # found void and begun again in the next step
                for key, value in zip(keys, values, strict=True):
                    arena.write_layer(chunk.reservation.slot, chunk.layers, key, value)
                    chunk.layers += 1
        self._link.transfer((ready - from_layer) * (keys[0].nbytes + values[0].nbytes), started)
        chunk.copied_s += time.monotonic() - started
        if chunk.layers < task.kv.shape.layers:
            return False
        task.fill(chunk)
        return True

    def _reserve(self, task: SaveTask) -> Reservation | None:
        """An empty slot; None: it is asked for, or there is none. Raises PeerError."""
        self._take_reserved()
        self._spare = [r for r in self._spare if r.session == self._store.session]
        if not self._spare and (task.filled or time.monotonic() < self._retry_s):
            return None  # what is filled is committed first: a full store has no slot to give before
        to_copy = max(1, -(-(min(task.computed) - task.next_start) // task.chunk_tokens))
        if self._reserving is None and len(self._spare) < to_copy:
            # Those that are left are filled while the answer is on its way.
            self._reserving = self._ask(self._store.reserve(to_copy + _SPARE_SLOTS - len(self._spare)))
        return self._spare.pop() if self._spare else None

    def _take_reserved(self) -> None:
        """Take in the slots that were asked for, if the answer is there. Raises PeerError."""
        while self._given:
            self._spare.append(self._given.popleft())
        if self._reserving is None or not self._reserving.done():
            return
        try:
            self._spare += self._reserving.result()
        finally:
            self._reserving = None
        if not self._spare:
            self._retry_s = time.monotonic() + _RETRY_S

    def _give_back(self, chunks: list[_Chunk]) -> None:
        self._spare += [chunk.reservation for chunk in chunks if not chunk.was_told]
        for chunk in chunks:
            if chunk.was_told:  # taken back by the daemon, too, if it is not the daemon's own by now
                self._ask(self._store.unreserve([chunk.reservation]))

    def _is_time_to_commit(self, task: SaveTask, is_copying: bool) -> bool:
        """One commit at a time, and while there is more to copy, a large one. The last one waits for nobody."""
        if task.is_copied:
            return not (task.commits and task.commits[-1].is_last)
        if task.commits or not task.filled:
            return False
        filled_bytes = len(task.filled) * task.chunk_tokens * task.kv.shape.token_bytes
        return not is_copying or filled_bytes >= _COMMIT_BYTES

    def _commit(self, task: SaveTask) -> None:
        # Asked once: the turn may end at any moment, and the last commit is the one with its manifest.
        is_last, manifest = task.is_copied, None
        if is_last and task.final is not None and not task.is_preempted:
            manifest = task.saved_manifest(task.final)
        chunks, task.filled = task.filled, []
        for chunk in chunks:
            chunk.was_told = True
        # Slots for what comes next, so that it need not ask.
        coming = sum(commit.reserve for other in self._tasks for commit in other.commits)
        reserve = max(0, _SPARE_SLOTS - len(self._spare) - coming) if self._reserving is None else 0
        committed = [task.committed(chunk) for chunk in chunks]
        accepted = self._ask(self._hand_over(committed, manifest, reserve, task.span.traceparent))
        task.commits.append(_Commit(chunks, is_last, reserve, accepted))

    async def _hand_over(
        self, chunks: list[CommittedChunk], manifest: Manifest | None, reserve: int, trace: str
    ) -> tuple[bool, ...]:
        """Tell the daemon of chunks and of the context that they complete. Raises PeerError."""
        if not chunks and manifest is None:  # all that a preempted turn had was told of before
            return ()
        accepted, slots = await self._store.commit(chunks, manifest, reserve, trace)
        self._given += slots  # whatever becomes of the task meanwhile
        return accepted

    def _take_answers(self, task: SaveTask) -> bool:
        """See what became of the commits. True: all is saved. Raises PeerError; CachedAttentionError: refused."""
        while task.commits and task.commits[0].accepted.done():
            try:
                # No name of ours holds a future that raises: with the traceback and the task in it, that is a cycle.
                accepted = task.commits[0].accepted.result()
                for was_accepted in accepted:
                    if not was_accepted:
                        raise CachedAttentionError("the store refused a chunk")
                    chunk = task.commits[0].chunks.pop(0)
                    task.hold.start = chunk.end
                    self._observe(chunk.end - chunk.start, chunk.copied_s)
            except CachedAttentionError:
                # What became of the rest nobody knows. Copied again, it is there twice for a moment at most.
                self._give_back(task.rewind())
                raise
            if task.commits.pop(0).is_last:
                return True
        return False

    def _ask(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a request on the event loop; it has a deadline of its own. The answer wakes this thread."""
        answer = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        answer.add_done_callback(lambda _: self._worker.notify())
        return answer
