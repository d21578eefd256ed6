"""Working KV: keys and values of running jobs on the device, and of finished ones as long as there is room.

One job's KV is contiguous (CPU), keys rotated to their current positions. Beside them the job keeps its *raw*
(un-rotated) keys from `raw_base` on: the part that the store does not hold yet, which asynchronous saving copies
from. Everything before `length` is whole in every layer, as far back as its window reaches; steps write behind it and
then move it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protocol.errors import CapacityError
from protocol.ids import TokenArray

_GRAIN_TOKENS = 256  # the smallest buffer


@dataclass(frozen=True)
class KvShape:
    """What a token's KV looks like on the device."""

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    windows: tuple[
        int | None, ...
    ] = ()  # by layer: how many tokens, itself included, a token sees; None: all before it

    def hidden_before(self, layer: int, position: int) -> int:
        """How many leading tokens the one at `position` does not see in that layer, nor do those behind it."""
        window = self.windows[layer] if self.windows else None
        return 0 if window is None else max(0, position - window + 1)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token over all layers."""
        return self.layers * self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class OutOfKv(CapacityError):
    """Running jobs and what is not saved yet fill the working KV. For this process alone: jobs wait, none fails."""

    code = "out_of_kv"


def _nobody() -> None:
    """Nobody waits for memory."""


class Buffers:
    """Memory for working KV, bounded, and used again and again.

    The first touch of fresh memory costs more than loading a whole history into memory that was used before
    (measured: 65 ms against 8 for 40 MiB), so what a finished job leaves is kept for the next one, up to
    `spare_bytes`; it gives way to what is wanted now. Safe from any thread.
    """

    def __init__(
        self, shape: KvShape, spare_bytes: int, capacity_bytes: int | None = None, longest_tokens: int = 1 << 30
    ) -> None:
        """capacity_bytes: of all that is in use and spare; None: no limit. longest_tokens: no context grows beyond."""
        self.shape = shape
        self.longest_tokens = longest_tokens
        self.capacity_bytes = capacity_bytes
        self.on_given: Callable[[], None] = _nobody  # memory came back; called from any thread
        self._spare_bytes = 0
        self._spare_limit_bytes = spare_bytes
        self._spare: dict[int, list[torch.Tensor]] = {shape.key_dim: [], shape.value_dim: []}
        self._used_bytes = 0
        self._lock = threading.Lock()
        # What destructors give back. They may run at any instruction, also of a thread that holds the lock.
        self._given: deque[tuple[torch.Tensor | None, int]] = deque()

    @property
    def used_bytes(self) -> int:
        """Held by running jobs, retained contexts and the write buffer."""
        with self._lock:
            self._take_in()
            return self._used_bytes

    @property
    def spare_bytes(self) -> int:
        with self._lock:
            self._take_in()
            return self._spare_bytes

    def take(self, tokens: int, dim: int) -> torch.Tensor:
        """Uninitialised memory for at least `tokens` tokens.  # [layers, >= tokens, kv_heads, dim]

        Raises OutOfKv.
        """
        shape = self.shape
        size = round_up(tokens)
        wanted_bytes = size * shape.layers * shape.kv_heads * dim * shape.dtype.itemsize
        with self._lock:
            self._take_in()
            found = self._find_spare(tokens, size, dim)
            if found is None:
                self._make_room(wanted_bytes)
            self._used_bytes += wanted_bytes if found is None else found.nbytes
        if found is not None:
            return found
        # Made in a step, it would be an inference tensor, which no thread may write to outside of one.
        with torch.inference_mode(False):
            return torch.empty(shape.layers, size, shape.kv_heads, dim, dtype=shape.dtype, device=shape.device)

    def expect(self, nbytes: int) -> None:
        """Raises OutOfKv: there is no memory for so much."""
        with self._lock:
            self._take_in()
            self._check_room(nbytes)

    def nothing(self, dim: int) -> torch.Tensor:
        """No memory yet.  # [layers, 0, kv_heads, dim]"""
        shape = self.shape
        with torch.inference_mode(False):
            return torch.empty(shape.layers, 0, shape.kv_heads, dim, dtype=shape.dtype, device=shape.device)

    def warm(self, tokens: int) -> None:
        """Make and touch memory for one context of `tokens` tokens, so that the first turns do not pay for it."""
        shape = self.shape
        for dim in (shape.key_dim, shape.value_dim):
            self.give(self.take(tokens, dim).zero_())
        self.give(self.take(2 * _GRAIN_TOKENS, shape.key_dim).zero_())

    def give(self, buffer: torch.Tensor) -> None:
        """Give memory back. Nobody may read or write it any more."""
        self._give(buffer, buffer.nbytes)

    def retire(self, buffer: torch.Tensor) -> None:
        """Give memory back that somebody may still be reading: nobody uses it again."""
        self._give(None, buffer.nbytes)

    def _give(self, buffer: torch.Tensor | None, nbytes: int) -> None:
        if not nbytes:
            return
        self._given.append((buffer, nbytes))
        if self._lock.acquire(blocking=False):  # otherwise whoever is next in here takes it in
            try:
                self._take_in()
            finally:
                self._lock.release()
        self.on_given()

    # -- with the lock held ---------------------------------------------------------------------------------

    def _take_in(self) -> None:
        while self._given:
            buffer, nbytes = self._given.popleft()
            self._used_bytes -= nbytes
            if buffer is not None and self._spare_bytes + nbytes <= min(self._spare_limit_bytes, self._room_bytes):
                self._spare[buffer.shape[3]].append(buffer)
                self._spare_bytes += nbytes

    @property
    def _room_bytes(self) -> int:
        """What is not in use."""
        return 1 << 62 if self.capacity_bytes is None else self.capacity_bytes - self._used_bytes

    def _find_spare(self, tokens: int, size: int, dim: int) -> torch.Tensor | None:
        # Not much larger than asked for: a short job must not sit on a long job's memory. And no larger at all where
        # memory is scarce: a context that fits into the whole must not fail because of such waste.
        fitting = [b for b in self._spare[dim] if tokens <= b.shape[1] <= 4 * max(tokens, _GRAIN_TOKENS)]
        best = min(fitting, key=lambda buffer: buffer.shape[1], default=None)
        if best is None or best.nbytes > self._room_bytes:
            return None
        is_scarce = self.capacity_bytes is not None and self._used_bytes + best.nbytes > self.capacity_bytes // 4
        if best.shape[1] > size and is_scarce:
            return None
        self._remove_spare(best)
        return best

    def _make_room(self, nbytes: int) -> None:
        """Let spare memory go until so much more fits. Raises OutOfKv: it does not fit even so."""
        self._check_room(nbytes)
        while nbytes > self._room_bytes - self._spare_bytes:
            self._remove_spare(max((b for held in self._spare.values() for b in held), key=lambda b: b.nbytes))

    def _check_room(self, nbytes: int) -> None:
        if nbytes > self._room_bytes:
            raise OutOfKv(f"{nbytes} bytes of working KV do not fit beside {self._used_bytes} in use")

    def _remove_spare(self, buffer: torch.Tensor) -> None:
        held = self._spare[buffer.shape[3]]
        self._spare[buffer.shape[3]] = [b for b in held if b is not buffer]
        self._spare_bytes -= buffer.nbytes


def context_bytes(shape: KvShape, tokens: int, raw_base: int = 0) -> int:
    """What the working KV of one context of `tokens` tokens takes, with un-rotated keys kept from raw_base on."""
    number_bytes = shape.layers * shape.kv_heads * shape.dtype.itemsize
    held = round_up(tokens) * (shape.key_dim + shape.value_dim) + round_up(tokens - raw_base) * shape.key_dim
    return held * number_bytes


class RawKeys:
    """Un-rotated keys of positions from `base` on.  # [layers, capacity, kv_heads, key_dim]

    Its memory goes back when the last holder lets go of it: the context, or a saver behind it.
    """

    def __init__(self, buffers: Buffers, base: int, capacity: int) -> None:
        """Raises OutOfKv."""
        self.base = base
        self._buffers = buffers
        self.keys = buffers.nothing(buffers.shape.key_dim)
        if capacity:
            self.keys = buffers.take(capacity, buffers.shape.key_dim)

    def span(self, layers: int | slice, start: int, end: int) -> torch.Tensor:
        """The keys of positions start..end-1.  # [(layers,) end - start, kv_heads, key_dim], a view"""
        return self.keys[layers, start - self.base : end - self.base]

    def grow(self, capacity: int) -> None:
        """Raises OutOfKv; nothing is changed then."""
        if capacity > self.keys.shape[1]:
            self.keys = _grown(self._buffers, self.keys, capacity)

    def __del__(self) -> None:
        self._buffers.give(self.keys)


class WorkingKv:
    """The KV of one context.

    The engine's thread writes behind `length`; the loader writes positions below `length` before anybody
    reads them; the saver only reads, and only what was written. Growing swaps in larger tensors that hold all
    that the old ones held, so a reader that still has the old ones reads the same bytes.
    """

    def __init__(self, buffers: Buffers, capacity: int) -> None:
        """Raises OutOfKv."""
        shape = buffers.shape
        self.shape = shape
        self._buffers = buffers
        self.keys = buffers.nothing(shape.key_dim)  # rotated, [layers, capacity, kv_heads, key_dim]
        self.values = buffers.nothing(shape.value_dim)  # [layers, capacity, kv_heads, value_dim]
        self.length = 0
        self.whole_from = 0  # tokens before this one would see KV that was not loaded, in layers with a sliding window
        self.raw = RawKeys(buffers, 0, 0)
        self.pending_saves = 0  # turns whose KV the saver still copies from here; the event loop counts
        self._grow_cache(capacity)

    def __del__(self) -> None:
        # Whoever reads holds the object, not only its tensors; so nobody reads any more.
        self._buffers.give(self.keys)
        self._buffers.give(self.values)

    @property
    def capacity(self) -> int:
        return min(self.keys.shape[1], self.values.shape[1])

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.raw.keys.nbytes

    def begin(self, length: int, raw_base: int, capacity: int) -> None:
        """Start a job whose first `length` tokens are given, with raw keys kept from raw_base on.

        Raw keys of raw_base..length-1 are carried over where they are held; a loader brings them otherwise.
        Raises OutOfKv; what is held stays usable then.
        """
        self._grow_cache(capacity)
        wanted = max(capacity, length) - raw_base
        if self.raw.base != raw_base or self.raw.keys.shape[1] < wanted:
            if self.length == 0:
                self.raw = RawKeys(self._buffers, 0, 0)  # nothing to carry over: its memory first
            old, new = self.raw, RawKeys(self._buffers, raw_base, wanted)
            held_from, held_to = max(old.base, raw_base), min(old.base + old.keys.shape[1], length)
            if held_from < held_to:
                new.keys[:, held_from - raw_base : held_to - raw_base] = old.keys[
                    :, held_from - old.base : held_to - old.base
                ]
            self.raw = new
        self.length = length

    def ensure(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, half as much again where it has to grow.

        Raises OutOfKv; what is held stays usable then.
        """
        if tokens > self.capacity:
            self._grow_cache(max(tokens, min(self.capacity * 3 // 2, self._buffers.longest_tokens)))
        if tokens > self.raw.base + self.raw.keys.shape[1]:
            # In place: the saver holds this RawKeys object and must see the larger one.
            self.raw.grow(self.capacity - self.raw.base)

    def compact(self, chunk_tokens: int) -> None:
        """Keep no more raw keys than the last, partial chunk needs, if there is room. Call when all of it is saved."""
        base = self.length // chunk_tokens * chunk_tokens
        if base > self.raw.base:
            try:
                tail = RawKeys(self._buffers, base, self.length - base)
            except OutOfKv:
                return
            tail.keys[:, : self.length - base] = self.raw.keys[:, base - self.raw.base : self.length - self.raw.base]
            self.raw = tail

    def write(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor) -> None:
        """Store the KV of new tokens from `start` on.  # each [n, kv_heads, dim]"""
        end = start + key.shape[0]
        self.keys[layer, start:end] = key
        self.values[layer, start:end] = value
        self.raw.span(layer, start, end).copy_(raw_key)

    def _grow_cache(self, tokens: int) -> None:
        if tokens > self.keys.shape[1]:
            self.keys = _grown(self._buffers, self.keys, tokens)
        if tokens > self.values.shape[1]:
            self.values = _grown(self._buffers, self.values, tokens)


def new_context(buffers: Buffers, capacity: int, raw_base: int, length: int = 0) -> WorkingKv:
    """Working KV that is begun; `length` tokens are still to be written or loaded.

    Raises OutOfKv before it takes anything: whoever waits for memory is not woken by its own attempt.
    """
    buffers.expect(context_bytes(buffers.shape, capacity, raw_base))
    kv = WorkingKv(buffers, capacity)
    kv.begin(length, raw_base, capacity)
    return kv


def _grown(buffers: Buffers, old: torch.Tensor, tokens: int) -> torch.Tensor:
    """Larger memory with the same bytes. Another thread may be reading from the old one at this moment."""
    new = buffers.take(tokens, old.shape[3])
    new[:, : old.shape[1]] = old
    buffers.retire(old)
    return new


def round_up(tokens: int) -> int:
    """The next size of 256 times 1, 1.5, 2, 3, 4, 6, 8 ...: few sizes, so that a growing context finds spare memory."""
    size = _GRAIN_TOKENS
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def as_bytes(part: torch.Tensor) -> Any:
    """KV as the bytes of each layer, a view.  # [layers, tokens, kv_heads, dim] -> [layers, bytes] uint8

    On the CPU a numpy array, which copies at memcpy's speed and is cut in a tenth of a tensor's time; else a tensor.
    Both are indexed and assigned alike.
    """
    layers = part.view(torch.uint8).flatten(1)
    return layers.numpy() if part.device.type == "cpu" else layers


@dataclass(frozen=True)
class RetainedMatch:
    """The best retained context for a prompt, and how many of its leading tokens can be kept."""

    key: int
    tokens: int


@dataclass
class _Retained:
    namespace: bytes
    token_ids: TokenArray  # tokens with KV
    kv: WorkingKv
    nbytes: int


class RetentionPool:
    """HBM retention and write buffer: finished contexts stay until their bytes are needed, oldest out first.

    A context that is not saved yet stays whatever it takes (the paper's write buffer, section 3.2.2).
    The event loop puts and takes; contexts are let go from any thread.
    """

    def __init__(self, buffers: Buffers, capacity_bytes: int, chunk_tokens: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._buffers = buffers
        self.used_bytes = 0
        self._chunk_tokens = chunk_tokens
        self._held: OrderedDict[int, _Retained] = OrderedDict()
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def match(self, namespace: bytes, prompt: TokenArray) -> RetainedMatch | None:
        """The retained context that shares the longest prefix with `prompt`, short of its last token.

        Where the shared prefix ends before the raw keys of its last chunk begin, it is cut to a chunk border:
        the chunk could not be saved again otherwise. Where it ends before `whole_from`, the store has more.
        """
        best: RetainedMatch | None = None
        with self._lock:
            held = [(key, held) for key, held in self._held.items() if held.namespace == namespace]
        for key, context in held:
            tokens = min(common_prefix(context.token_ids, prompt), len(prompt) - 1)
            border = tokens // self._chunk_tokens * self._chunk_tokens
            if border < context.kv.raw.base:
                tokens = border
            if tokens > 0 and tokens >= context.kv.whole_from and (best is None or tokens >= best.tokens):
                best = RetainedMatch(key, tokens)
        return best

    def take(self, match: RetainedMatch, capacity: int) -> WorkingKv | None:
        """Working KV that begins with the matched tokens, ready for a job of up to `capacity` tokens.

        A context that only grows is handed over and no longer retained. A branch gets a copy of what it shares:
        the other branch may go on too, and the saver may still read from it. None: it was let go meanwhile.
        Raises OutOfKv: it stays retained, and is the last to go.
        """
        with self._lock:
            held = self._held.get(match.key)
            if held is None:
                return None
            self._held.move_to_end(match.key)
        raw_base = match.tokens // self._chunk_tokens * self._chunk_tokens
        if match.tokens == len(held.token_ids):
            held.kv.begin(match.tokens, raw_base, capacity)
            with self._lock:
                if self._held.pop(match.key, None) is not None:
                    self.used_bytes -= held.nbytes
            return held.kv
        kv = new_context(self._buffers, capacity, raw_base, match.tokens)
        kv.whole_from = held.kv.whole_from
        kv.keys[:, : match.tokens] = held.kv.keys[:, : match.tokens]
        kv.values[:, : match.tokens] = held.kv.values[:, : match.tokens]
        for layer in range(kv.shape.layers):
            kv.raw.span(layer, raw_base, match.tokens).copy_(held.kv.raw.span(layer, raw_base, match.tokens))
        return kv

    def put(self, namespace: bytes, token_ids: TokenArray, kv: WorkingKv) -> None:
        """Keep a finished context, `token_ids` being those with KV, at the price of the oldest ones."""
        with self._lock:
            self._held[self._next] = _Retained(namespace, token_ids, kv, kv.nbytes)
            self._next += 1
            self.used_bytes += kv.nbytes
        self.trim()

    def trim(self) -> None:
        """Compact what is saved by now, then let go the oldest saved contexts until the rest fits."""
        with self._lock:
            for held in self._held.values():
                if not held.kv.pending_saves:
                    held.kv.compact(self._chunk_tokens)
                    self.used_bytes += held.kv.nbytes - held.nbytes
                    held.nbytes = held.kv.nbytes
        while self.used_bytes > self.capacity_bytes and self.let_go():
            pass

    def let_go(self) -> bool:
        """Give the memory of the oldest saved context back. False: there is none."""
        with self._lock:
            key = next((key for key, held in self._held.items() if not held.kv.pending_saves), None)
            if key is None:
                return False
            held = self._held.pop(key)
            self.used_bytes -= held.nbytes
        return True


def common_prefix(a: TokenArray, b: TokenArray) -> int:
    """How many leading tokens two contexts share."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
