"""Working KV: keys and values of running jobs on the device, and of finished ones as long as there is room.

One job's KV is contiguous (CPU; for CUDA see paged_kv.py), keys rotated to their current positions. Beside them the
job keeps its *raw* (un-rotated) keys from `raw_base` on: the part that the store does not hold yet, which asynchronous
saving copies from. Everything before `length` is whole in every layer, as far back as its window reaches; steps write
behind it and then move it. What no window reaches any more is let go, group by group (layer_groups.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from inference.layer_groups import (
    GRAIN_TOKENS,
    Hold,
    Holds,
    LayerGroup,
    held_from,
    layer_groups,
    places_of,
    round_up,
    unsaved_from,
)
from protocol.errors import CapacityError
from protocol.ids import TokenArray
from protocol.lineage import Truncation, kept_tokens


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

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers by their windows."""
        return layer_groups(self.layers, self.windows)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """By layer: its group, and which layer of the group it is."""
        return places_of(self.groups)

    def hidden_before(self, layer: int, position: int) -> int:
        """How many leading tokens the one at `position` does not see in that layer, nor do those behind it."""
        return self.groups[self.places[layer][0]].hidden_before(position)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token over all layers."""
        return self.layers * self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class RawSpans(Protocol):
    """Un-rotated keys of positions from `base` on."""

    base: int

    def span(self, layers: int | slice, start: int, end: int) -> torch.Tensor:
        """Those of one chunk or a part of it.  # [(layers,) end - start, kv_heads, key_dim], a view"""


class Kv(Protocol):
    """What the rest of the engine knows of one context's working KV, wherever its bytes lie. See WorkingKv."""

    shape: KvShape
    length: int
    whole_from: int
    pending_saves: int
    lock: threading.Lock

    @property
    def raw(self) -> RawSpans: ...

    @property
    def capacity(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def begin(self, length: int, raw_base: int, capacity: int) -> None: ...

    def hold(self, start: int) -> Hold: ...

    def open_front(self, piece_tokens: int) -> None: ...

    def ensure(self, tokens: int) -> None: ...

    def compact(self, chunk_tokens: int) -> None: ...

    def wipe(self) -> None: ...

    def branch(self, tokens: int, raw_base: int, capacity: int) -> Kv: ...

    def write(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor) -> None: ...

    def keys_at(self, layer: int, start: int, end: int) -> torch.Tensor: ...

    def values_at(self, layer: int, start: int, end: int) -> torch.Tensor: ...

    def values_of(self, layers: range, start: int, end: int) -> list[torch.Tensor]: ...


class KvPool(Protocol):
    """Where working KV comes from: Buffers, or Pages. Safe from any thread."""

    shape: KvShape
    on_given: Callable[[], None]

    @property
    def capacity_bytes(self) -> int | None: ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def spare_bytes(self) -> int: ...

    def expect(self, tokens: int, raw_base: int) -> None: ...

    def new(self, tokens: int, raw_base: int = 0) -> Kv: ...

    def warm(self, tokens: int) -> None: ...

    def wipe(self) -> None: ...


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
        self,
        shape: KvShape,
        spare_bytes: int,
        capacity_bytes: int | None = None,
        longest_tokens: int = 1 << 30,
        chunk_tokens: int = GRAIN_TOKENS,
    ) -> None:
        """capacity_bytes: of all that is in use and spare; None: no limit. longest_tokens: no context grows beyond.

        chunk_tokens: what is kept of a context begins with a whole chunk.
        """
        self.shape = shape
        self.longest_tokens = longest_tokens
        self.chunk_tokens = chunk_tokens
        self.capacity_bytes = capacity_bytes
        self.on_given: Callable[[], None] = _nobody  # memory came back; called from any thread
        self._spare_bytes = 0
        self._spare_limit_bytes = spare_bytes
        self._spare: dict[tuple[int, int], list[torch.Tensor]] = {}  # by layers and dim
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

    def take(self, tokens: int, dim: int, group: LayerGroup | None = None) -> torch.Tensor:
        """Uninitialised memory for at least `tokens` tokens.  # [layers, >= tokens, kv_heads, dim]

        group: whose layers; None: all. Raises OutOfKv.
        """
        return self._take(tokens, dim, group)[0]

    def _take(self, tokens: int, dim: int, group: LayerGroup | None = None) -> tuple[torch.Tensor, bool]:
        """Whether it is fresh, too."""
        shape = self.shape
        layers = shape.layers if group is None else len(group.layers)
        size = round_up(tokens) if group is None else group.size_for(tokens, self.chunk_tokens)
        # Not much larger than asked for: a short job must not sit on a long job's memory.
        largest = 4 * max(tokens, GRAIN_TOKENS)
        if group is not None:  # nor what a window has left behind come back
            largest = max(size, min(largest, group.settled_tokens(self.chunk_tokens)))
        wanted_bytes = size * layers * shape.kv_heads * dim * shape.dtype.itemsize
        with self._lock:
            self._take_in()
            found = self._find_spare(tokens, size, largest, (layers, dim))
            if found is None:
                self._make_room(wanted_bytes)
            self._used_bytes += wanted_bytes if found is None else found.nbytes
        if found is not None:
            return found, False
        # Made in a step, it would be an inference tensor, which no thread may write to outside of one.
        with torch.inference_mode(False):
            fresh = torch.empty(layers, size, shape.kv_heads, dim, dtype=shape.dtype, device=shape.device)
        return fresh, True

    def expect(self, tokens: int, raw_base: int) -> None:
        """Raises OutOfKv: a context of so many tokens, with un-rotated keys from raw_base on, finds no room."""
        with self._lock:
            self._take_in()
            self._check_room(context_bytes(self.shape, tokens, raw_base, self.chunk_tokens))

    def expect_rows(self, tokens: int, group: LayerGroup) -> None:
        """Raises OutOfKv: keys and values of so many tokens find no room."""
        with self._lock:
            self._take_in()
            self._check_room(_rows_bytes(self.shape, group, tokens, self.chunk_tokens))

    def new(self, tokens: int, raw_base: int = 0) -> WorkingKv:
        """Raises OutOfKv."""
        return WorkingKv(self, tokens, raw_base)

    def nothing(self, dim: int, layers: int) -> torch.Tensor:
        """No memory yet.  # [layers, 0, kv_heads, dim]"""
        shape = self.shape
        with torch.inference_mode(False):
            return torch.empty(layers, 0, shape.kv_heads, dim, dtype=shape.dtype, device=shape.device)

    def warm(self, tokens: int) -> None:
        """Have memory for one context of `tokens` tokens that was touched before, so that no turn pays for it.

        What is spare is not touched again. May take as long as a step: not for the engine's thread.
        """
        shape = self.shape
        wanted: list[tuple[int, int, LayerGroup | None]] = [(tokens, shape.key_dim, None)]  # for un-rotated keys
        for group in shape.groups:
            kept = tokens - group.kept_from(tokens, self.chunk_tokens)
            wanted += [(kept, shape.key_dim, group), (kept, shape.value_dim, group)]
        taken: list[torch.Tensor] = []
        with contextlib.suppress(OutOfKv):  # there is work for all memory
            for count, dim, whose in wanted:
                buffer, is_fresh = self._take(count, dim, whose)
                taken.append(buffer.zero_() if is_fresh else buffer)
        for buffer in taken:
            self.give(buffer)

    def wipe(self) -> None:
        """Overwrite what earlier contexts left in memory that nobody uses. Not for the engine's thread."""
        with self._lock:
            self._take_in()
            unused = [buffer for held in self._spare.values() for buffer in held]
            for buffer in unused:
                self._remove_spare(buffer)
                self._used_bytes += buffer.nbytes
        for buffer in unused:
            self.give(buffer.zero_())

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
                self._spare.setdefault((buffer.shape[0], buffer.shape[3]), []).append(buffer)
                self._spare_bytes += nbytes

    @property
    def _room_bytes(self) -> int:
        """What is not in use."""
        return 1 << 62 if self.capacity_bytes is None else self.capacity_bytes - self._used_bytes

    def _find_spare(self, tokens: int, size: int, largest: int, kind: tuple[int, int]) -> torch.Tensor | None:
        # No larger than asked for at all where memory is scarce: a context that fits into the whole must not fail
        # because of such waste.
        fitting = [b for b in self._spare.get(kind, ()) if tokens <= b.shape[1] <= largest]
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
        kind = (buffer.shape[0], buffer.shape[3])
        self._spare[kind] = [b for b in self._spare[kind] if b is not buffer]
        self._spare_bytes -= buffer.nbytes


def context_bytes(shape: KvShape, tokens: int, raw_base: int = 0, chunk_tokens: int = GRAIN_TOKENS) -> int:
    """What the working KV of one context of `tokens` tokens takes, with un-rotated keys kept from raw_base on.

    Tokens before raw_base are the store's: of those, layers with a window keep what it reaches from there.
    """
    raw_bytes = round_up(tokens - raw_base) * shape.layers * shape.kv_heads * shape.key_dim * shape.dtype.itemsize
    return raw_bytes + sum(
        _rows_bytes(shape, group, tokens - group.kept_from(raw_base, chunk_tokens), chunk_tokens)
        for group in shape.groups
    )


def _rows_bytes(shape: KvShape, group: LayerGroup, tokens: int, chunk_tokens: int) -> int:
    row_bytes = len(group.layers) * shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.dtype.itemsize
    return group.size_for(tokens, chunk_tokens) * row_bytes


class RawKeys:
    """Un-rotated keys of positions from `base` on.  # [layers, capacity, kv_heads, key_dim]

    Its memory goes back when the last holder lets go of it: the context, or a saver behind it.
    """

    def __init__(self, buffers: Buffers, base: int, capacity: int) -> None:
        """Raises OutOfKv."""
        self.base = base
        self._buffers = buffers
        self.keys = buffers.nothing(buffers.shape.key_dim, buffers.shape.layers)
        if capacity:
            self.keys = buffers.take(capacity, buffers.shape.key_dim)

    def span(self, layers: int | slice, start: int, end: int) -> torch.Tensor:
        """The keys of positions start..end-1.  # [(layers,) end - start, kv_heads, key_dim], a view"""
        return self.keys[layers, start - self.base : end - self.base]

    def grow(self, capacity: int) -> None:
        """Raises OutOfKv; nothing is changed then."""
        if capacity > self.keys.shape[1]:
            self.keys = _grown(self._buffers, self.keys, capacity)

    def let_go(self, base: int, capacity: int) -> None:
        """Hold those from `base` on alone, with the context's lock held. Raises OutOfKv; nothing is changed then."""
        keys = self._buffers.take(capacity, self._buffers.shape.key_dim)
        _copy(self.keys, self.base, keys, base, min(self.base + self.keys.shape[1], base + keys.shape[1]))
        old, self.base, self.keys = self.keys, base, keys
        self._buffers.give(old)

    def __del__(self) -> None:
        self._buffers.give(self.keys)


class Rows:
    """Keys and values of one group of layers, of positions from `base` on.

    Moving and resizing is for whoever holds the context's lock; see WorkingKv.
    """

    def __init__(self, buffers: Buffers, group: LayerGroup, base: int, tokens: int) -> None:
        """Raises OutOfKv."""
        self.group = group
        self.base = base
        self._buffers = buffers
        # [layers, capacity, kv_heads, key_dim], rotated, and [layers, capacity, kv_heads, value_dim]
        self.keys, self.values = self._nothing()
        self.renew(base, tokens)

    def __del__(self) -> None:
        # Whoever reads holds the context, not only its tensors; so nobody reads any more.
        self._buffers.give(self.keys)
        self._buffers.give(self.values)

    @property
    def capacity(self) -> int:
        return min(self.keys.shape[1], self.values.shape[1])

    @property
    def end(self) -> int:
        """The first position that there is no room for."""
        return self.base + self.capacity

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, at: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """KV of new tokens from position `start` on, as far as it is kept, in the group's layer `at`."""
        skipped = max(0, self.base - start)
        if skipped < len(key):
            first, end = start + skipped - self.base, start + len(key) - self.base
            self.keys[at, first:end] = key[skipped:]
            self.values[at, first:end] = value[skipped:]

    def take_over(self, other: Rows, end: int) -> None:
        """What `other` holds of the positions before `end`."""
        _copy(other.keys, other.base, self.keys, self.base, end)
        _copy(other.values, other.base, self.values, self.base, end)

    def renew(self, base: int, tokens: int) -> None:
        """Room for `tokens` tokens from `base` on, in place of what is held. Raises OutOfKv; nothing is held then."""
        self._swap(base, *self._nothing())
        if tokens:
            self._swap(base, *self._room_for(tokens))

    def resize(self, base: int, tokens: int) -> None:
        """Room for so many tokens from `base` on, with what is held of it. Raises OutOfKv; nothing is changed then."""
        keys, values = self._room_for(tokens)
        end = min(self.end, base + keys.shape[1], base + values.shape[1])
        _copy(self.keys, self.base, keys, base, end)
        _copy(self.values, self.base, values, base, end)
        self._swap(base, keys, values)

    def move(self, base: int) -> None:
        """Let go of what lies before `base`; the rest moves down."""
        if shift := base - self.base:
            for memory in (self.keys, self.values):
                for at in range(shift, self.capacity, shift):  # a piece at a time: none moves onto itself
                    piece = memory[:, at : min(at + shift, self.capacity)]
                    memory[:, at - shift : at - shift + piece.shape[1]] = piece
            self.base = base

    def _nothing(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape, layers = self._buffers.shape, len(self.group.layers)
        return self._buffers.nothing(shape.key_dim, layers), self._buffers.nothing(shape.value_dim, layers)

    def _room_for(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        buffers, shape = self._buffers, self._buffers.shape
        buffers.expect_rows(tokens, self.group)  # before any is taken: whoever waits is not woken by its own attempt
        keys = buffers.take(tokens, shape.key_dim, self.group)
        try:
            values = buffers.take(tokens, shape.value_dim, self.group)
        except OutOfKv:
            buffers.give(keys)
            raise
        return keys, values

    def _swap(self, base: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        old = self.keys, self.values
        self.base, self.keys, self.values = base, keys, values
        for memory in old:
            self._buffers.give(memory)


def _copy(from_: torch.Tensor, from_base: int, to: torch.Tensor, to_base: int, end: int) -> None:
    """All that both have room for of the positions before `end`."""
    start = max(from_base, to_base)
    if start < end:
        to[:, start - to_base : end - to_base] = from_[:, start - from_base : end - from_base]


class WorkingKv:
    """The KV of one context.

    The engine's thread writes behind `length`; the loader writes positions below `length` before anybody
    reads them; the saver only reads, with the lock held, and only what was written. With the lock, too, what is held
    moves or goes elsewhere; what somebody has a Hold on stays, and where a loader writes it stays in place.
    """

    def __init__(self, buffers: Buffers, capacity: int, raw_base: int = 0) -> None:
        """raw_base: that of the job to begin. Raises OutOfKv."""
        shape = buffers.shape
        self.shape = shape
        self._buffers = buffers
        self.length = 0
        self.whole_from = 0  # tokens before this one would see KV that is not held, in layers with a sliding window
        self.raw = RawKeys(buffers, 0, 0)
        self.pending_saves = 0  # turns whose KV the saver still copies from here; the event loop counts
        self.lock = threading.Lock()
        self._chunk_tokens = buffers.chunk_tokens
        self._promised = capacity  # positions that the job has room for from its beginning
        self._holds = Holds()
        self.rows: list[Rows] = []  # by group
        for group in shape.groups:
            base = group.kept_from(raw_base, self._chunk_tokens)
            self.rows.append(Rows(buffers, group, base, capacity - base))
        self._sliding = [rows for rows in self.rows if rows.group.window is not None]
        self._fronts: dict[int, Rows] = {}  # by group, where computing begins before what `rows` holds

    @property
    def keys(self) -> torch.Tensor:
        """Of a model without windows, or with one for all layers.  # [layers, capacity, kv_heads, key_dim]"""
        (rows,) = self.rows
        return rows.keys

    @property
    def values(self) -> torch.Tensor:
        """The same of values."""
        (rows,) = self.rows
        return rows.values

    @property
    def capacity(self) -> int:
        return min(rows.end for rows in self.rows)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (*self.rows, *self._fronts.values())) + self.raw.keys.nbytes

    def begin(self, length: int, raw_base: int, capacity: int) -> None:
        """Start a job whose first `length` tokens are given, with raw keys kept from raw_base on.

        Tokens before raw_base are the store's. Raw keys of raw_base..length-1 are carried over where they are held; a
        loader brings them otherwise. Raises OutOfKv; what is held stays usable then.
        """
        self._promised, self._fronts = capacity, {}
        if self.length == 0:
            self.whole_from = 0
        for rows in self.rows:
            base = rows.group.kept_from(raw_base, self._chunk_tokens)
            if self.length == 0 and (base < rows.base or capacity > rows.end):
                rows.renew(base, capacity - base)  # nothing to carry over: its memory first
            elif capacity > rows.end:
                self._make_room(rows, capacity, capacity)
        wanted = max(capacity, length) - raw_base
        if self.raw.base != raw_base or self.raw.keys.shape[1] < wanted:
            if self.length == 0:
                self.raw = RawKeys(self._buffers, 0, 0)  # nothing to carry over: its memory first
            old, new = self.raw, RawKeys(self._buffers, raw_base, wanted)
            _copy(old.keys, old.base, new.keys, raw_base, min(old.base + old.keys.shape[1], length))
            self.raw = new
        self.length = length
        self._note_bases()

    def hold(self, start: int) -> Hold:
        """Keep what is held from `start` on, until the hold moves on or is released. From any thread."""
        return self._holds.add(start)

    def open_front(self, piece_tokens: int) -> None:
        """Have room to compute, in pieces of up to so many tokens, what lies before the kept part of a history.

        It is there until what the next token sees is kept. Raises OutOfKv.
        """
        for number, rows in enumerate(self.rows):
            first = rows.group.hidden_before(self.length)
            if first < rows.base and number not in self._fronts:
                assert rows.group.window is not None, "other layers keep everything"
                self._fronts[number] = Rows(self._buffers, rows.group, first, rows.group.window + piece_tokens)

    def ensure(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all: let go of what no window reaches any more, or get more memory, half as
        much again.

        Raises OutOfKv; what is held stays usable then.
        """
        for rows in self.rows:
            if tokens > rows.end:
                grown = min(rows.base + rows.capacity * 3 // 2, self._buffers.longest_tokens)
                self._make_room(rows, tokens, max(tokens, grown))
        if self._sliding:
            self._slide(tokens)
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
        self._promised = self.length
        self._slide(self.length)

    def wipe(self) -> None:
        """Overwrite it. Nobody may read it any more."""
        for rows in self.rows:
            rows.keys.zero_()
            rows.values.zero_()
        self.raw.keys.zero_()

    def branch(self, tokens: int, raw_base: int, capacity: int) -> WorkingKv:
        """Other working KV that begins with this one's first `tokens` tokens, its raw keys from raw_base on.

        Raises OutOfKv, before it takes anything.
        """
        self._buffers.expect(capacity, raw_base)
        other = WorkingKv(self._buffers, capacity, raw_base)
        other.begin(tokens, raw_base, capacity)
        other.whole_from = max(other.whole_from, self.whole_from)
        for own, rows in zip(other.rows, self.rows, strict=True):
            own.take_over(rows, tokens)
        for layer in range(self.shape.layers):
            other.raw.span(layer, raw_base, tokens).copy_(self.raw.span(layer, raw_base, tokens))
        return other

    def keys_at(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Rotated keys of a chunk or a part of it.  # [end - start, kv_heads, key_dim], a view"""
        group, at = self.shape.places[layer]
        rows = self.rows[group]
        return rows.keys[at, start - rows.base : end - rows.base]

    def values_at(self, layer: int, start: int, end: int) -> torch.Tensor:
        """The same of values."""
        group, at = self.shape.places[layer]
        rows = self.rows[group]
        return rows.values[at, start - rows.base : end - rows.base]

    def values_of(self, layers: range, start: int, end: int) -> list[torch.Tensor]:
        """The same of several layers, as few views as it takes.  # each [layers, end - start, kv_heads, value_dim]"""
        assert all(start >= rows.base for rows in self.rows), "what is not saved is held"
        if len(self.rows) == 1:
            first = self.rows[0].base
            return [self.rows[0].values[layers.start : layers.stop, start - first : end - first]]
        return [self.values_at(layer, start, end).unsqueeze(0) for layer in layers]

    def seen(self, layer: int, past: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the positions before `total` that a token at `past` sees, and maybe of some before them.

        # [<= total, kv_heads, dim], views
        """
        group, at = self.shape.places[layer]
        rows = self.rows[group]
        if group in self._fronts and rows.group.hidden_before(past) < rows.base:
            rows = self._fronts[group]
        end = total - rows.base
        return rows.keys[at, :end], rows.values[at, :end]

    def write(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor) -> None:
        """Store the KV of new tokens from `start` on.  # each [n, kv_heads, dim]

        Raw keys before raw_base are not kept: the store has those tokens, and they are only computed again.
        """
        group, at = self.shape.places[layer]
        self.rows[group].write(at, start, key, value)
        if group in self._fronts:
            self._fronts[group].write(at, start, key, value)
        end = start + key.shape[0]
        kept = max(start, self.raw.base)
        if kept < end:
            self.raw.span(layer, kept, end).copy_(raw_key[kept - start :])

    def _first_needed(self, rows: Rows) -> int:
        return max(rows.base, held_from(rows.group, self.length, self._holds, self._chunk_tokens))

    def _make_room(self, rows: Rows, tokens: int, wanted: int) -> None:
        """For `tokens` tokens in all; where that takes more memory, for `wanted`. Raises OutOfKv."""
        with self.lock:
            base = self._first_needed(rows)
            if base + rows.capacity >= tokens:
                rows.move(base)
            else:
                rows.resize(base, wanted - base)
        self._note_bases()

    def _slide(self, tokens: int) -> None:
        """Give back what windows have left behind, and un-rotated keys that are saved; have room in front."""
        for number, rows in enumerate(self.rows):
            front = self._fronts.get(number)
            if front is not None:
                first = rows.group.hidden_before(self.length)
                if first >= rows.base:
                    del self._fronts[number]
                elif tokens > front.end:
                    front.move(first)
            if rows.capacity <= rows.group.settled_tokens(self._chunk_tokens):
                continue
            base = self._first_needed(rows)
            wanted = max(tokens, self._promised) - base
            if base > rows.base and rows.group.size_for(wanted, self._chunk_tokens) < rows.capacity:
                with contextlib.suppress(OutOfKv), self.lock:  # where the copy finds no room, later
                    rows.resize(base, wanted)
                self._note_bases()
        base, room = unsaved_from(self.length, self._holds, self._chunk_tokens), self.raw.keys.shape[1]
        wanted = max(tokens, self._promised) - base
        if base > self.raw.base and (round_up(wanted) < room or tokens > self.raw.base + room):
            with contextlib.suppress(OutOfKv), self.lock:
                self.raw.let_go(base, wanted)

    def _note_bases(self) -> None:
        for rows in self._sliding:
            self.whole_from = max(self.whole_from, rows.group.whole_from(rows.base))


def new_context(buffers: KvPool, capacity: int, raw_base: int, length: int = 0) -> Kv:
    """Working KV that is begun; `length` tokens are still to be written or loaded.

    Raises OutOfKv before it takes anything: whoever waits for memory is not woken by its own attempt.
    """
    buffers.expect(capacity, raw_base)
    kv = buffers.new(capacity, raw_base)
    kv.begin(length, raw_base, capacity)
    return kv


def _grown(buffers: Buffers, old: torch.Tensor, tokens: int) -> torch.Tensor:
    """Larger memory with the same bytes. Another thread may be reading from the old one at this moment."""
    new = buffers.take(tokens, old.shape[3])
    new[:, : old.shape[1]] = old
    buffers.retire(old)
    return new


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
    token_ids: TokenArray  # of the transcript as far as it was computed
    truncations: tuple[Truncation, ...]  # what is left is in the KV
    kv: Kv
    nbytes: int
    turn_key: bytes


class RetentionPool:
    """HBM retention and write buffer: finished contexts stay until their bytes are needed, oldest out first.

    A context that is not saved yet stays whatever it takes (the paper's write buffer, section 3.2.2).
    The event loop puts and takes; contexts are let go from any thread.
    """

    def __init__(self, capacity_bytes: int, chunk_tokens: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._chunk_tokens = chunk_tokens
        self._held: OrderedDict[int, _Retained] = OrderedDict()
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def match(
        self, namespace: bytes, prompt: TokenArray, truncations: Sequence[Truncation] = ()
    ) -> RetainedMatch | None:
        """The retained context that shares the longest prefix with what is left of `prompt`, short of its last token.

        Where the shared prefix ends before the raw keys of its last chunk begin, it is cut to a chunk border:
        the chunk could not be saved again otherwise. Where it ends before `whole_from`, the store has more.
        """
        best: RetainedMatch | None = None
        with self._lock:
            held = [(key, held) for key, held in self._held.items() if held.namespace == namespace]
        for key, context in held:
            shared = common_prefix(context.token_ids, prompt)
            # Before whatever only one of them has dropped, both stand at the same positions and have seen the same.
            shared = min([shared, *(one.start for one in {*context.truncations} ^ {*truncations})])
            tokens = min(kept_tokens(shared, truncations), kept_tokens(len(prompt), truncations) - 1)
            border = tokens // self._chunk_tokens * self._chunk_tokens
            if border < context.kv.raw.base:
                tokens = border
            if tokens > 0 and tokens >= context.kv.whole_from and (best is None or tokens >= best.tokens):
                best = RetainedMatch(key, tokens)
        return best

    def take(self, match: RetainedMatch, capacity: int) -> Kv | None:
        """Working KV that begins with the matched tokens, ready for a job of up to `capacity` tokens.

        A context that only grows is handed over and no longer retained. A branch gets working KV of its own:
        the other branch may go on too, and the saver may still read from it. None: it was let go meanwhile.
        Raises OutOfKv: it stays retained, and is the last to go.
        """
        with self._lock:
            held = self._held.get(match.key)
            if held is None:
                return None
            self._held.move_to_end(match.key)
        raw_base = match.tokens // self._chunk_tokens * self._chunk_tokens
        if match.tokens == held.kv.length:
            held.kv.begin(match.tokens, raw_base, capacity)
            with self._lock:
                if self._held.pop(match.key, None) is not None:
                    self.used_bytes -= held.nbytes
            return held.kv
        return held.kv.branch(match.tokens, raw_base, capacity)

    def put(
        self,
        namespace: bytes,
        token_ids: TokenArray,
        kv: Kv,
        truncations: tuple[Truncation, ...] = (),
        turn_key: bytes = b"",
    ) -> None:
        """Keep a finished context, at the price of the oldest ones.

        token_ids: all that was computed. truncations: what of it is not in the KV any more. turn_key: see forget.
        """
        with self._lock:
            self._held[self._next] = _Retained(namespace, token_ids, truncations, kv, kv.nbytes, turn_key)
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

    def forget(self, turn_keys: Collection[bytes]) -> list[Kv]:
        """The contexts of these turns, no longer retained. Those that are not saved yet stay."""
        with self._lock:
            found = [
                key for key, held in self._held.items() if held.turn_key in turn_keys and not held.kv.pending_saves
            ]
            forgotten = [self._held.pop(key) for key in found]
            self.used_bytes -= sum(held.nbytes for held in forgotten)
        return [held.kv for held in forgotten]

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
