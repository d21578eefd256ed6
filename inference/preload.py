"""Layer-wise pre-loading (the paper's section 3.2.1): history comes back layer by layer under the computation.

One thread moves layer l of a job's chunks from the arena into working KV, rotating keys to their positions on
the way, while the engine computes layer l - 1. Jobs that wait for the engine are loaded while others compute: first
as far as the read buffer reaches, then the rest. Chunks that come from SSD are taken up as their layers arrive.

Nothing here can wait in a circle. The engine waits for the loader, and what it waits for is *due*: no buffer bounds
that. The loader waits for the link and the SSD alone; a task comes with its working KV taken and its slots leased, so
it never needs what another job holds. And both waits have a deadline.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inference.copies import Copies
from inference.load_or_compute import Choice, choose
from inference.paged_kv import PagedKv
from inference.paged_load import PagedPiece, PageRotation, cut_pages
from inference.rates import Rates
from inference.read_buffer import Waiting, layers_ahead, read_buffer_bytes
from inference.rotary import KeyRotation, Rotary
from inference.throttle import Throttle
from inference.worker import Worker
from inference.working_kv import Kv, KvShape, OutOfKv, WorkingKv, as_bytes
from monitoring.logs import get_logger
from protocol.arena import Arena, HeldSlots
from protocol.errors import CachedAttentionError
from protocol.messages import SlotRef

log = get_logger(__name__)

_POLL_S = 0.0002  # how often a layer that comes from SSD is looked for
_POLL_AHEAD_S = 0.002  # if nobody waits for it
_USUAL_S = 0.005  # a load's own rate counts as much as that of earlier ones after so long


def _nobody() -> None:
    """Nobody waits for this."""


class LoadFailed(CachedAttentionError):
    """History did not arrive. The turn computes it instead. `reason` is the miss reason of the account."""

    code = "load_failed"

    def __init__(self, reason: str, task: LoadTask, ref: SlotRef | None = None) -> None:
        super().__init__(f"history did not arrive: {reason}")
        self.reason = reason
        self.task = task
        self.ref = ref


@dataclass(frozen=True)
class Span:
    """What of a chunk belongs to a history."""

    ref: SlotRef
    start: int  # its first position
    end: int  # its last + 1 that the job uses
    is_seen: tuple[bool, ...]  # by layer; False: it lies before the window of all tokens behind the history
    nbytes: int  # of the layers in which it is seen


def _spans(chunks: Sequence[SlotRef], shape: KvShape, history: int) -> list[Span]:
    hidden = [shape.hidden_before(layer, history) for layer in range(shape.layers)]
    spans, start = [], 0
    for ref in chunks:
        if start < history:
            end = min(start + ref.tokens, history)
            # The last chunk may be saved again, so all of it is wanted.
            is_seen = tuple(end > border or end == history for border in hidden)
            spans.append(
                Span(ref, start, end, is_seen, (end - start) * shape.token_bytes * sum(is_seen) // shape.layers)
            )
        start += ref.tokens
    return spans


class LoadTask:
    """The history of one job on its way. Written by the loader's thread, waited for by the engine's.

    What lies before `start` is computed by the engine instead; only the engine moves `start`.
    """

    def __init__(
        self,
        kv: Kv,
        arena: Arena,
        chunks: Sequence[SlotRef],
        deadline_s: float,
        on_end: Callable[[], None],
        *,
        end: int | None = None,
        new_tokens: int = 0,
        is_layer_wise: bool = True,
    ) -> None:
        """kv: begun, with the history's length, or with 0 where part of it may be computed instead.

        deadline_s: monotonic, for a job whose turn it is at once. on_end: called once, from the loader's thread.
        end: the history's length, where kv does not tell. new_tokens: to compute behind it.
        is_layer_wise: False: no layer may be computed before all are there.
        """
        self.kv = kv
        self.arena = arena
        self.start = 0
        self.end = kv.length if end is None else end
        self.new_tokens = new_tokens
        self.is_layer_wise = is_layer_wise
        self.loaded_bytes = 0
        self.busy_s = 0.0  # the loader's work on it, waiting for the link and the SSD included
        self.waited_s = 0.0  # the engine's wait for it
        self.started_s = 0.0
        self.ended_s = 0.0
        self.deadline_s = deadline_s
        self.on_end = on_end
        self.wake: Callable[[], None] = _nobody  # the loader; set when it takes the task in
        self.choice: Choice | None = None  # the first that the engine made
        self.is_due = False  # the engine would compute it now
        self.is_cancelled = False
        self.failure: LoadFailed | None = None
        self._allowed_s = deadline_s - time.monotonic()
        self._busy_since_s = 0.0
        self._ready = 0
        self._writing = -1  # first position of the piece that the loader writes; -1: none
        self._changed = threading.Condition()
        self.spans = _spans(chunks, kv.shape, self.end)
        self.hold = kv.hold(0)  # as long as it is written to, all of it stays where it is
        self.slots = HeldSlots(arena, [(span.ref.slot, span.ref.generation, span.ref.chunk_id) for span in self.spans])
        self.pieces: Sequence[Piece | PagedPiece] = ()  # the loader's, from its start to its end
        self.rotation: PageRotation | None = None  # with pages: to be done when a layer's pieces are there
        self.next_piece = 0  # of the layer that is being loaded
        self.is_requested = False  # that piece is on the link

    @property
    def ready_layers(self) -> int:
        return self._ready

    @property
    def is_busy(self) -> bool:
        """Something is on its way: from the SSD, or over the link."""
        return self._busy_since_s > 0

    @property
    def layer_bytes(self) -> int:
        """Of what is loaded; the mean, where layers have windows."""
        return sum(span.nbytes for span in self.wanted()) // self.kv.shape.layers

    @property
    def tier(self) -> str:
        """The slowest that it comes from."""
        return "ssd" if any(span.ref.tier == "ssd" for span in self.wanted() or self.spans) else "dram"

    @property
    def lump_bytes(self) -> int:
        """What comes at once: a chunk's layer, or all chunks' from the SSD."""
        spans = self.wanted() or self.spans
        sizes = [span.nbytes for span in spans]
        return (sum(sizes) if self.tier == "ssd" else max(sizes, default=0)) // self.kv.shape.layers

    @property
    def overlap_ratio(self) -> float:
        """Part of the loading time that ran under computation."""
        return 1.0 - min(1.0, self.waited_s / self.busy_s) if self.busy_s > 0 else 1.0

    @property
    def is_over(self) -> bool:
        """Nothing more will come."""
        return (
            self.is_cancelled
            or self.failure is not None
            or self._ready == self.kv.shape.layers
            or self.start == self.end
        )

    @property
    def is_late(self) -> bool:
        """The engine has waited for it long enough."""
        return self.is_due and time.monotonic() > self.deadline_s

    def wanted(self) -> list[Span]:
        """What is loaded, of all layers; the rest is computed."""
        return [span for span in self.spans if span.start >= self.start]

    # -- the engine's side --------------------------------------------------------------------------------

    def has_begun(self) -> bool:
        """Whether computing behind the history may start: a layer is there, or it never will be."""
        if self.is_over or self.is_late:
            return True
        return self.is_layer_wise and self._ready > 0

    def has_enough(self, rates: Rates, tokens: int) -> bool:
        """Whether a step that computes `tokens` tokens behind the history would not have to wait for the rest of it."""
        if self.is_over or self.is_late:
            return True
        return self.has_begun() and self._ready * self.layer_bytes >= self.wanted_bytes(rates, tokens)

    def wanted_bytes(self, rates: Rates, tokens: int | None = None) -> int:
        """What should be there when computing begins. All of it, while nothing is measured.

        tokens: in the first step behind the history; None: as many as a step takes of the new ones.
        """
        total = self.layer_bytes * self.kv.shape.layers
        to_load_s = self._load_s(rates) if rates.prefill.is_known else None
        if to_load_s is None:
            return total
        first = min(self.new_tokens, rates.prefill.step_tokens) if tokens is None else tokens
        return read_buffer_bytes(total, sum(to_load_s), rates.prefill.seconds(self.end, first))

    def make_due(self) -> None:
        """The engine would compute this job now: load it before those that are not due, whatever the buffer holds.

        From here on it has its time; that it waited for its turn before does not count.
        """
        if not self.is_due:
            self.deadline_s = time.monotonic() + self._allowed_s
            self.is_due = True
            self.wake()

    def choose(self, rates: Rates) -> None:
        """Load or compute, for what is neither computed nor there. To be asked when all before `start` is computed."""
        to_load_s = self._load_s(rates) if rates.prefill.is_known and not self.is_over else None
        if to_load_s is None:
            return
        layers = self.kv.shape.layers
        left = 1.0 - self._ready / layers
        borders = [span.start for span in self.wanted()]
        choice = choose(
            [*borders, self.end], [seconds * left for seconds in to_load_s], self.new_tokens, layers, rates.prefill
        )
        if self.choice is None:
            self.choice = choice
        if choice.start > self.start:
            try:
                self.kv.open_front(rates.prefill.step_tokens)
            except OutOfKv:  # no room for KV that is needed for a while only
                return
            self._compute_before(choice.start)

    def _compute_before(self, start: int) -> None:
        """Load nothing before `start` any more. When this comes back, the loader writes nothing there."""
        # Each side says first what it does and then looks at the other. A lock would do the same, but the loader takes
        # it again at once for each piece, and the engine might not get it before the end.
        self.start = start
        while 0 <= self._writing < start:
            time.sleep(_POLL_S)  # one copy of one chunk's layer
        if self.kv.shape.device.type == "cuda":
            torch.cuda.synchronize(self.kv.shape.device)  # the copy is issued; now it is through
        self.wake()

    def _load_s(self, rates: Rates) -> list[float] | None:
        """How long all layers of each chunk from `start` on take; None: nobody knows.

        By the rates of loads before, and more and more by that of this one.
        """
        now_s = time.monotonic()
        left = [(span.ref.tier, span.nbytes) for span in self.wanted()]
        expected = [rates.load_s(tier, nbytes, now_s) for tier, nbytes in left]
        since_s = self._busy_since_s
        busy_s = self.busy_s + (now_s - since_s if since_s else 0.0)
        lump = self.lump_bytes  # the next one may be nearly there
        known = [seconds for seconds in expected if seconds is not None]
        if len(known) == len(left):
            usual = sum(nbytes for _, nbytes in left) / max(sum(known), 1e-9)
            loaded = min(max(self.loaded_bytes, usual * busy_s), self.loaded_bytes + lump)
            slower = usual * (busy_s + _USUAL_S) / (loaded + usual * _USUAL_S)
            return [seconds * slower for seconds in known]
        if busy_s == 0.0:
            return None
        rate = max(self.loaded_bytes, lump) / busy_s
        return [nbytes / rate for _, nbytes in left]

    def wait_layer(self, layer: int) -> None:
        """Wait until layer `layer` is in working KV. Raises LoadFailed: it will not come.

        Whoever waits makes it due: a step may take up jobs that wait for their turn no longer, and its loads would
        stop at what the read buffer holds.
        """
        self.make_due()
        if not self.is_layer_wise:
            layer = self.kv.shape.layers - 1
        if self._ready > layer:
            return
        started = time.monotonic()
        with self._changed:
            while self._ready <= layer and self.failure is None and not self.is_cancelled:
                if not self._changed.wait(max(0.0, self.deadline_s - time.monotonic()) + 0.1):
                    raise LoadFailed("load_failed", self)
            self.waited_s += time.monotonic() - started
            if self._ready <= layer:
                raise self.failure or LoadFailed("cancelled", self)

    def cancel(self) -> None:
        """Nothing more of it is wanted. From any thread."""
        with self._changed:
            self.is_cancelled = True
            self._changed.notify_all()
        self.wake()

    # -- the loader's side --------------------------------------------------------------------------------

    def load(self, piece: Piece | PagedPiece, layer: int) -> None:
        """Bring one chunk's layer, if it is still wanted."""
        self._writing = piece.span.start
        try:
            if piece.span.start >= self.start:
                piece.load(layer)
                self.loaded_bytes += piece.layer_bytes
        finally:
            self._writing = -1

    def finish_layer(self, layer: int) -> None:
        """All wanted pieces of the layer are brought."""
        if self.rotation is None:
            return
        try:
            for piece in self.pieces:
                if piece.span.start >= self.start and piece.span.is_seen[layer]:
                    self._writing = piece.span.start
                    if piece.span.start >= self.start:  # still: the engine does not compute there
                        self.rotation.rotate(layer, piece.span.start)
                        break
        finally:
            self._writing = -1

    def work(self, now_s: float) -> None:
        """The time from here on counts for this load, until `rest`."""
        if not self._busy_since_s:
            self._busy_since_s = now_s
            self.started_s = self.started_s or now_s

    def rest(self, now_s: float) -> None:
        if self._busy_since_s:
            self.busy_s += now_s - self._busy_since_s
            self._busy_since_s = 0.0

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

    span: Span
    layer_bytes: int
    stored_keys: Sequence[torch.Tensor]  # by layer, [tokens, kv_heads, key_dim]
    keys: Sequence[torch.Tensor]  # the same
    rotate: KeyRotation
    copies: list[tuple[Any, Any]]  # to, from; see as_bytes

    def load(self, layer: int) -> None:
        keys = self.keys[layer]
        self.rotate(layer, self.stored_keys[layer], keys)
        for target, source in self.copies:
            target[layer][:] = source[layer]


def cut(task: LoadTask, rotary: Rotary) -> Sequence[Piece | PagedPiece]:
    """The pieces of a task. Views are made here, once: for every layer they would cost as much as a small copy."""
    if not all(all(span.is_seen) for span in task.spans):
        task.kv.whole_from = task.end
    if isinstance(task.kv, PagedKv):
        pieces, task.rotation = cut_pages(task.kv, task.arena, task.spans, rotary)
        return pieces
    assert isinstance(task.kv, WorkingKv)
    return _cut(task, task.kv, rotary)


def _cut(task: LoadTask, kv: WorkingKv, rotary: Rotary) -> list[Piece]:
    arena, shape = task.arena, kv.shape
    key_bytes, value_bytes = arena.geometry.key_bytes, arena.geometry.value_bytes
    heads = (arena.geometry.chunk_tokens, shape.kv_heads, shape.key_dim)
    stored_keys = torch.from_numpy(arena.keys).view(shape.dtype).unflatten(2, heads)
    values = [as_bytes(rows.values) for rows in kv.rows]
    raw, raw_base = as_bytes(kv.raw.keys), kv.raw.base
    pieces = []
    for span in task.spans:
        ref, start, end, used = span.ref, span.start, span.end, span.end - span.start
        # In layers that do not see it, there may be no place for it.
        places = [(rows, max(0, start - rows.base), max(0, end - rows.base)) for rows in kv.rows]
        to_values = [part[:, a * value_bytes : b * value_bytes] for part, (_, a, b) in zip(values, places, strict=True)]
        copies = [(_by_layer(to_values, shape), arena.values[ref.slot, :, : used * value_bytes])]
        tail = max(start, raw_base)
        if tail < end:  # of a chunk that will be saved again, longer: its raw keys
            to = raw[:, (tail - raw_base) * key_bytes : (end - raw_base) * key_bytes]
            copies.append((to, arena.keys[ref.slot, :, (tail - start) * key_bytes : used * key_bytes]))
        rotate = rotary.key_rotation(start, end, shape)
        from_ = stored_keys[ref.slot, :, :used].unbind()
        to_ = _by_layer([rows.keys[:, a:b].unbind() for rows, a, b in places], shape)
        pieces.append(Piece(span, used * (key_bytes + value_bytes), from_, to_, rotate, copies))
    return pieces


def _by_layer(parts: Sequence[Any], shape: KvShape) -> Any:
    """parts: of each group's layers. Returns the same of all layers in order."""
    return parts[0] if len(parts) == 1 else [parts[group][at] for group, at in shape.places]


class Loader:
    """The loader's thread. `submit` from any thread."""

    def __init__(
        self,
        rotary: Rotary,
        on_layer: Callable[[], None],
        *,
        rates: Rates | None = None,
        read_buffer_bytes: int | None = None,
        link_bandwidth: int = 0,
        copies: Copies | None = None,
    ) -> None:
        """on_layer: called from the loader's thread when a layer is there or never will be.

        rates: where loads are noted. read_buffer_bytes: how much of waiting jobs' histories may be loaded; None: all,
        but of each first what the rates say it needs. link_bandwidth: in bytes per second, for measurements; 0: as
        fast as it goes.
        """
        self._rotary = rotary
        self._on_layer = on_layer
        self._rates = rates if rates is not None else Rates()
        self._read_buffer_bytes = read_buffer_bytes
        self._link = Throttle(link_bandwidth)
        self._copies = Copies() if copies is None else copies
        self._new: deque[LoadTask] = deque()
        self._active: list[LoadTask] = []
        # KV copies are best on one thread; the others belong to the computation.
        self._worker = Worker("loader", self._advance_all, torch_threads=1)

    def start(self) -> None:
        self._worker.start()

    def stop(self) -> None:
        self._worker.stop(5.0)

    def submit(self, task: LoadTask) -> None:
        task.wake = self._worker.notify
        self._new.append(task)
        self._worker.notify()

    def _advance_all(self) -> float | None:
        """Load the layer that is needed most of those that are there, and take out the tasks that end."""
        while self._new:
            self._active.append(self._new.popleft())
        progressed = False
        for task, layers in self._in_order():
            if self._link.busy_s(time.monotonic()):
                break
            progressed = self._advance(task, layers)
            if progressed:
                break  # somebody may be due by now
        for task in [task for task in self._active if task.is_over]:
            self._active.remove(task)
            self._end(task)
        if not self._active:
            return None
        if busy_s := self._link.busy_s(time.monotonic()):
            return busy_s
        if progressed:
            return 0.0
        if not any(task.is_busy for task in self._active):
            return None
        return _POLL_S if any(task.is_due for task in self._active) else _POLL_AHEAD_S

    def _in_order(self) -> Iterator[tuple[LoadTask, int]]:
        """The tasks, each with how many of its layers may be loaded now. One that waits for the SSD lets others pass.

        What is due goes first; of what may be needed by the same step, the layer that it comes to first. Then each
        waiting task gets what its computation needs to begin with, and then all of it: its memory is taken, and its
        lease ends with the load. A read buffer of a given size bounds that, for what is not due.
        """
        due = [task for task in self._active if task.is_due]
        for task in sorted(due, key=lambda task: task.ready_layers):
            yield task, task.kv.shape.layers
        ahead = [task for task in self._active if not task.is_due]
        if self._read_buffer_bytes is not None:
            waiting = [_waiting(task, 0) for task in ahead]
            yield from zip(ahead, layers_ahead(waiting, self._read_buffer_bytes), strict=True)
            return
        for task in ahead:
            yield task, layers_ahead([_waiting(task, task.wanted_bytes(self._rates))], None)[0]
        for task in ahead:
            yield task, task.kv.shape.layers

    @torch.inference_mode()
    def _advance(self, task: LoadTask, layers: int) -> bool:
        """Load the next layer of a task, if it is there and of the first `layers`. False: it was not, or is not yet."""
        begun = task.ready_layers
        if task.is_over or begun >= layers:
            task.rest(time.monotonic())
            return False
        task.work(time.monotonic())
        is_waiting = False
        try:
            arrived = task.slots.ready_layers()
            if not task.slots.are_current():
                raise LoadFailed("revoked", task)
            if arrived == begun and time.monotonic() > task.deadline_s:
                raise LoadFailed("load_failed", task)
            with self._copies.running():
                if not task.pieces:
                    # The memory was somebody else's: behind what is still computed or copied with it.
                    self._copies.follow()
                    task.pieces = cut(task, self._rotary)
                is_waiting = arrived == begun or not self._load_layer(task, begun)
        except LoadFailed as failure:
            self._fail(task, failure)
        except Exception:  # whatever it is, the turn goes on by computing
            log.exception("loading failed")
            self._fail(task, LoadFailed("load_failed", task))
        if not is_waiting:
            task.rest(time.monotonic())
        return task.ready_layers > begun

    def _load_layer(self, task: LoadTask, layer: int) -> bool:
        """The slots were found current. False: the link is busy, and the rest is for later. Raises LoadFailed."""
        while task.next_piece < len(task.pieces):
            piece = task.pieces[task.next_piece]
            if piece.span.start >= task.start and piece.span.is_seen[layer]:
                if not task.is_requested:
                    self._link.transfer(piece.layer_bytes, time.monotonic())
                    task.is_requested = True
                if self._link.busy_s(time.monotonic()):
                    return False
                ref = piece.span.ref
                if ref.verify and not task.arena.verify_layer(ref.slot, layer, ref.tokens):
                    raise LoadFailed("corrupt", task, ref)
                task.load(piece, layer)
            task.is_requested = False
            task.next_piece += 1
        task.finish_layer(layer)
        self._copies.join()
        # The bytes count only if the slots were ours to read from first to last. With that they are for the next layer.
        if not task.slots.are_current():
            raise LoadFailed("revoked", task)
        task.next_piece = 0
        task.layer_ready(layer)
        self._on_layer()
        return True

    def _end(self, task: LoadTask) -> None:
        task.pieces, task.rotation = (), None
        task.ended_s = time.monotonic()
        task.rest(task.ended_s)
        self._note_rate(task)
        task.hold.release()
        task.wake = _nobody
        task.on_end()

    def _note_rate(self, task: LoadTask) -> None:
        if task.failure is not None or not task.busy_s:
            return
        nbytes = task.loaded_bytes
        if task.ready_layers < task.kv.shape.layers:  # cut short, so much is the most that can have come
            nbytes = max(nbytes, task.lump_bytes)
            expected_s = self._rates.load_s(task.tier, nbytes, task.ended_s)
            if expected_s is not None and task.busy_s <= expected_s:
                return  # it may have been as quick as ever
        self._rates.loaded(task.tier, nbytes, task.busy_s, task.ended_s)

    def _fail(self, task: LoadTask, failure: LoadFailed) -> None:
        task.fail(failure)
        self._on_layer()


def _waiting(task: LoadTask, wanted_bytes: int) -> Waiting:
    return Waiting(task.kv.shape.layers, task.layer_bytes, wanted_bytes)
