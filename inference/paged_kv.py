"""Working KV in pages: what WorkingKv is on the CPU, for devices whose attention reads through a block table (CUDA).

All memory is taken at start and given out in pages of so many tokens, all layers of them. A context is a block table,
the pages of its tokens in order: it grows by a page without a copy, and a branch shares its parent's whole pages. A
chunk lies whole in one page, so that what the loader and the saver copy is a view of one page. Un-rotated keys lie in
pages of the same pool, two chunks' worth in each where keys and values are of one size.

Where layers have windows, pages that none of a group sees any more go back (layer_groups.py). So that any group may
have any page, a page holds as many layers as divides the sizes of all groups, a *strip*: each strip has a block table.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from inference.layer_groups import Hold, Holds, held_from, unsaved_from
from inference.working_kv import KvShape, OutOfKv
from protocol.errors import ConfigError

FLASH_PAGE_TOKENS = 256  # FlashAttention reads pages of this many tokens, or a multiple
NOT_HELD = -1  # in a block table
Table = npt.NDArray[np.int32]
Rows = tuple[torch.Tensor, ...]  # where tokens lie: indices into the first dimensions of one layer's pages


def page_tokens_for(chunk_tokens: int) -> int:
    """The smallest page that FlashAttention reads and that holds whole chunks."""
    return math.lcm(chunk_tokens, FLASH_PAGE_TOKENS)


def _nobody() -> None:
    """Nobody waits for memory."""


class Pages:
    """The pool. A page has as many holders as contexts have it in their tables. Safe from any thread."""

    spare_bytes = 0  # a page that nobody holds is free at once

    def __init__(self, shape: KvShape, page_tokens: int, capacity_bytes: int) -> None:
        """capacity_bytes: of all pages, taken now.

        Raises ConfigError: not one page fits.
        """
        self.shape = shape
        self.page_tokens = page_tokens
        self.on_given: Callable[[], None] = _nobody  # pages came back; called from any thread
        layers = strip_layers(shape)
        self.strips = shape.layers // layers
        ends = [0, *itertools.accumulate(len(group.layers) // layers for group in shape.groups)]
        self.own = [slice(start, end) for start, end in itertools.pairwise(ends)]  # by group: its strips
        # By layer: its strip, and which layer of the strip it is.
        self.places = tuple((ends[group] + at // layers, at % layers) for group, at in shape.places)
        self.page_bytes = page_bytes(shape, page_tokens)
        self.count = capacity_bytes // self.page_bytes
        if self.count < 1:
            raise ConfigError(f"working_kv: a page takes {self.page_bytes} bytes", param="working_kv")
        self.capacity_bytes = self.count * self.page_bytes
        key, value = (page_tokens * shape.kv_heads * dim for dim in (shape.key_dim, shape.value_dim))
        self.raws_per_page = (key + value) // key
        with torch.inference_mode(False):  # so that any thread may write to it
            # Zeros: attention by whole blocks reads before a window, too, and a weight of 0 does not hide NaN.
            memory = torch.zeros(layers, self.count, key + value, dtype=shape.dtype, device=shape.device)
        # Keys, then values, as in a slot of the arena.  # [strip's layers, pages, page_tokens, kv_heads, dim]
        self.keys = memory[:, :, :key].unflatten(2, (page_tokens, shape.kv_heads, shape.key_dim))
        self.values = memory[:, :, key:].unflatten(2, (page_tokens, shape.kv_heads, shape.value_dim))
        # The same memory as un-rotated keys.  # [strip's layers, pages, raws_per_page, page_tokens, kv_heads, key_dim]
        self.raw = memory[:, :, : self.raws_per_page * key].unflatten(
            2, (self.raws_per_page, page_tokens, shape.kv_heads, shape.key_dim)
        )
        self._holders = np.zeros(self.count, dtype=np.int32)
        self._free = list(range(self.count))[::-1]  # the last one is taken first
        self._lock = threading.Lock()
        # What destructors give back. They may run at any instruction, also of a thread that holds the lock.
        self._given: deque[Table] = deque()

    @property
    def used_bytes(self) -> int:
        """Held by running jobs, retained contexts and the write buffer. A shared page counts once."""
        with self._lock:
            self._take_in()
            return (self.count - len(self._free)) * self.page_bytes

    def take(self, count: int) -> Table:
        """So many pages, uninitialised. Raises OutOfKv."""
        with self._lock:
            self._check_room(count)
            taken = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
            self._holders[taken] = 1
        return taken

    def share(self, pages: Table) -> None:
        """One more holder for pages that the caller keeps held meanwhile."""
        with self._lock:
            self._holders[pages] += 1

    def give(self, pages: Table) -> None:
        """One holder less. Nobody who held through it may read or write the pages any more."""
        if not pages.size:
            return
        self._given.append(pages.ravel())
        if self._lock.acquire(blocking=False):  # otherwise whoever is next in here takes it in
            try:
                self._take_in()
            finally:
                self._lock.release()
        self.on_given()

    def expect(self, tokens: int, raw_base: int) -> None:
        """Raises OutOfKv: a context of so many tokens, with un-rotated keys from raw_base on, finds no room."""
        self.expect_pages(context_pages(self.shape, self.page_tokens, tokens, raw_base))

    def expect_pages(self, count: int) -> None:
        """Raises OutOfKv: so many are not free."""
        with self._lock:
            self._check_room(count)

    def new(self, tokens: int, raw_base: int = 0) -> PagedKv:
        """Raises OutOfKv."""
        return PagedKv(self, tokens, raw_base)

    def warm(self, tokens: int) -> None:
        """All memory is there from the start."""

    def wipe(self) -> None:
        """Overwrite the pages that nobody holds, one after the other. Not for the engine's thread."""
        with self._lock:
            self._take_in()
            free = self._free.copy()
        for page in free:
            with self._lock:
                if self._holders[page]:
                    continue
                self._free.remove(page)
                self._holders[page] = 1
            self.keys[:, page].zero_()
            self.values[:, page].zero_()
            if self.shape.device.type == "cuda":  # before another stream writes there
                torch.cuda.synchronize(self.shape.device)
            self.give(np.array([page], dtype=np.int32))

    def _check_room(self, count: int) -> None:
        self._take_in()
        if count > len(self._free):
            raise OutOfKv(f"{count} pages of working KV are not free: {len(self._free)} of {self.count} are")

    def _take_in(self) -> None:
        while self._given:
            pages = self._given.popleft()
            self._holders[pages] -= 1
            self._free += pages[self._holders[pages] == 0].tolist()


def strip_layers(shape: KvShape) -> int:
    """How many layers a page holds."""
    return math.gcd(*(len(group.layers) for group in shape.groups))


def page_bytes(shape: KvShape, page_tokens: int) -> int:
    return page_tokens * shape.token_bytes * strip_layers(shape) // shape.layers


def context_pages(shape: KvShape, page_tokens: int, tokens: int, raw_base: int = 0) -> int:
    """What the working KV of one context of `tokens` tokens takes, with un-rotated keys kept from raw_base on.

    Tokens before raw_base are the store's: of those, layers with a window keep what it reaches from there.
    """
    ends, layers = _pages(tokens, page_tokens), strip_layers(shape)
    raws_per_page = (shape.key_dim + shape.value_dim) // shape.key_dim
    raws = shape.layers // layers * -(-(ends - raw_base // page_tokens) // raws_per_page)
    firsts = [group.kept_from(raw_base, page_tokens) // page_tokens for group in shape.groups]
    kept = [len(group.layers) // layers * (ends - first) for group, first in zip(shape.groups, firsts, strict=True)]
    return raws + sum(kept)


class RawPages:
    """Un-rotated keys of positions from `base` on. The pages go back when the last holder lets go of them."""

    def __init__(self, pages: Pages, base: int, end: int) -> None:
        """end: as far as there is room. Raises OutOfKv."""
        self.base = base
        self._pages = pages
        self._first = base // pages.page_tokens  # the place of the first page's worth of tokens
        self.table = np.empty((pages.strips, 0), dtype=np.int32)
        self.grow(end)

    def __del__(self) -> None:
        self._pages.give(self.table)

    @property
    def end(self) -> int:
        """The first position that there is no room for."""
        return (self._first + self.table.shape[1] * self._pages.raws_per_page) * self._pages.page_tokens

    def grow(self, end: int) -> None:
        """Raises OutOfKv; nothing is changed then."""
        if end > max(self.end, self.base):
            worth = _pages(end, self._pages.page_tokens) - self._first
            missing = -(-worth // self._pages.raws_per_page) - self.table.shape[1]
            taken = self._pages.take(missing * len(self.table)).reshape(len(self.table), missing)
            self.table = np.concatenate((self.table, taken), 1)

    def let_go(self, base: int) -> None:
        """Of the pages before position `base`, with the context's lock held."""
        count = (base // self._pages.page_tokens - self._first) // self._pages.raws_per_page
        if count > 0:
            gone, self.table = self.table[:, :count], self.table[:, count:]
            self._first += count * self._pages.raws_per_page
            self.base = base
            self._pages.give(gone)

    def span(self, layers: int | slice, start: int, end: int) -> torch.Tensor:
        """The keys of positions start..end-1, which lie in one page; of layers in several strips, a copy.

        # [(layers,) end - start, kv_heads, key_dim]
        """
        size = self._pages.page_tokens
        at, part = divmod(start // size - self._first, self._pages.raws_per_page)
        if isinstance(layers, slice) and len(self.table) > 1:
            own = range(*layers.indices(self._pages.shape.layers))
            return torch.stack([self.span(layer, start, end) for layer in own])
        strip, layers = (0, layers) if isinstance(layers, slice) else self._pages.places[layers]
        page = int(self.table[strip, at])
        return self._pages.raw[layers, page, part, start % size : start % size + end - start]

    def by_layer(self, start: int, end: int) -> list[torch.Tensor]:
        """The same of every layer, views."""
        strips = [part.unbind() for part in self._by_strip(start, end)]
        return [strips[strip][layer] for strip, layer in self._pages.places]

    def _by_strip(self, start: int, end: int) -> list[torch.Tensor]:
        """The same of every strip, views.  # [strip's layers, end - start, kv_heads, key_dim]"""
        size, pages = self._pages.page_tokens, self._pages
        at, part = divmod(start // size - self._first, pages.raws_per_page)
        offset = start % size
        return [pages.raw[:, page, part, offset : offset + end - start] for page in self.table[:, at].tolist()]

    def places(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Each strip's page, then part and offset, of positions that lie behind `base`."""
        size = self._pages.page_tokens
        at, part = np.divmod(positions // size - self._first, self._pages.raws_per_page)
        return (*self.table[:, at].astype(np.int64), part, positions % size)

    def take_over(self, other: RawPages, start: int, end: int) -> None:
        """Those of positions start..end-1, a page at a time."""
        size = self._pages.page_tokens
        while start < end:
            stop = min(end, start // size * size + size)
            for own, others in zip(self._by_strip(start, stop), other._by_strip(start, stop), strict=True):
                own.copy_(others)
            start = stop


class PagedKv:
    """The KV of one context; see WorkingKv, which it is in everything but where the bytes lie.

    Nobody writes into shared pages: they hold what lies before all of their holders' new tokens.
    """

    def __init__(self, pages: Pages, capacity: int, raw_base: int = 0) -> None:
        """raw_base: that of the job to begin. Raises OutOfKv."""
        self.shape = pages.shape
        self.pages = pages
        self.tables: Table = np.empty((pages.strips, 0), dtype=np.int32)  # the block tables  # [strips, pages]
        self.length = 0
        self.whole_from = 0
        self.raw = RawPages(pages, 0, 0)
        self.pending_saves = 0
        self.lock = threading.Lock()
        self._firsts = self._firsts_for(raw_base)  # by group: from here on all pages are held
        self._fronts: set[int] = set()  # groups with pages before that; see open_front
        self._holds = Holds()
        self._sliding = [number for number, group in enumerate(self.shape.groups) if group.window is not None]
        self._cover(capacity)

    def __del__(self) -> None:
        self.pages.give(self.tables[self.tables != NOT_HELD])

    @property
    def table(self) -> Table:
        """Of a model whose layers all have the same window, or none.  # [pages]"""
        (table,) = self.tables
        return table

    @property
    def capacity(self) -> int:
        return self.tables.shape[1] * self.pages.page_tokens

    @property
    def nbytes(self) -> int:
        """Shared pages count in full."""
        return (int(np.count_nonzero(self.tables != NOT_HELD)) + self.raw.table.size) * self.pages.page_bytes

    def begin(self, length: int, raw_base: int, capacity: int) -> None:
        """As WorkingKv.begin."""
        if self.length == 0:
            self.whole_from = 0
            self._firsts = [min(pair) for pair in zip(self._firsts, self._firsts_for(raw_base), strict=True)]
        self._cover(capacity)
        wanted = max(capacity, length)
        if self.raw.base != raw_base or self.raw.end < wanted:
            if self.length == 0:
                self.raw = RawPages(self.pages, 0, 0)  # nothing to carry over: its memory first
            new = RawPages(self.pages, raw_base, wanted)
            new.take_over(self.raw, max(self.raw.base, raw_base), min(self.raw.end, length))
            self.raw = new
        self.length = length
        self._note_firsts()

    def hold(self, start: int) -> Hold:
        """As WorkingKv.hold."""
        return self._holds.add(start)

    def open_front(self, piece_tokens: int) -> None:
        """As WorkingKv.open_front."""
        size = self.pages.page_tokens
        for number in self._sliding:
            group, own = self.shape.groups[number], self.pages.own[number]
            first, kept = group.hidden_before(self.length) // size, self._firsts[number]
            if first < kept and number not in self._fronts:
                end = min(kept, first + _pages(self._window(number) + piece_tokens, size) + 1)
                taken = self.pages.take((own.stop - own.start) * (end - first))
                self.tables[own, first:end] = taken.reshape(-1, end - first)
                self._fronts.add(number)

    def ensure(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all. Raises OutOfKv; what is held stays usable then."""
        self._slide(tokens)
        if tokens > self.capacity:
            self._cover(tokens)
        self.raw.grow(tokens)  # in place: the saver holds this object

    def compact(self, chunk_tokens: int) -> None:
        """As WorkingKv.compact; and pages behind the last token go, too."""
        base = self.length // chunk_tokens * chunk_tokens
        if base > self.raw.base:
            try:
                tail = RawPages(self.pages, base, self.length)
            except OutOfKv:
                return
            tail.take_over(self.raw, base, self.length)
            self.raw = tail
        self._slide(self.length)
        held = _pages(self.length, self.pages.page_tokens)
        self.tables, unused = self.tables[:, :held], self.tables[:, held:]
        self.pages.give(unused)

    def wipe(self) -> None:
        """Others may have its pages, too: those that nobody holds are overwritten by Pages.wipe."""

    def branch(self, tokens: int, raw_base: int, capacity: int) -> PagedKv:
        """As WorkingKv.branch, but whole pages are shared, not copied."""
        pages, whole = self.pages, tokens // self.pages.page_tokens
        other = PagedKv(pages, 0, raw_base)
        tables, count = (
            self.tables[:, :whole].copy(),
            context_pages(self.shape, pages.page_tokens, max(tokens, capacity), raw_base),
        )
        for number, (own, first) in enumerate(zip(pages.own, self._firsts, strict=True)):
            gone = max(0, first - other._firsts[number])
            other._firsts[number] += gone
            tables[own, : other._firsts[number]] = NOT_HELD
            count -= gone * (own.stop - own.start)
        shared = tables[tables != NOT_HELD]
        pages.expect_pages(count - len(shared))
        pages.share(shared)
        other.tables, other.length = tables, tokens
        other.begin(tokens, raw_base, capacity)
        other.whole_from = max(other.whole_from, self.whole_from)
        if rest := tokens % pages.page_tokens:
            for to, from_ in zip(other.tables[:, whole].tolist(), self.tables[:, whole].tolist(), strict=True):
                for memory in (pages.keys, pages.values):
                    memory[:, to, :rest] = memory[:, from_, :rest]
        other.raw.take_over(self.raw, raw_base, tokens)
        return other

    def write(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor) -> None:
        """As WorkingKv.write. A step writes all of its tokens at once instead; see attention/paged.py."""
        positions, (strip, at) = np.arange(start, start + len(key)), self.pages.places[layer]
        rows = self.rows(positions)[strip]
        self.pages.keys[at][rows], self.pages.values[at][rows] = key, value
        is_kept = positions >= self.raw.base
        if is_kept.any():
            *raw_pages, part, offset = to_device(self.raw.places(positions[is_kept]), self.shape.device)
            self.pages.raw[at][raw_pages[strip], part, offset] = raw_key[-int(is_kept.sum()) :]

    def rows(self, positions: npt.NDArray[np.int64]) -> list[Rows]:
        """Page and offset of each position, by strip. # each [n] int64, on the device"""
        *pages, offset = to_device(self.places(positions), self.shape.device)
        return [(page, offset) for page in pages]

    def places(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Each strip's page, and the offset, of each position; page 0 where it is not held."""
        at, offset = np.divmod(positions, self.pages.page_tokens)
        return (*np.maximum(self.tables[:, at], 0).astype(np.int64), offset)

    def keys_at(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Rotated keys of positions that lie in one page.  # [end - start, kv_heads, key_dim], a view"""
        strip, at = self.pages.places[layer]
        return self._at(self.pages.keys, strip, at, start, end)

    def values_at(self, layer: int, start: int, end: int) -> torch.Tensor:
        """The same of values."""
        strip, at = self.pages.places[layer]
        return self._at(self.pages.values, strip, at, start, end)

    def by_layer(self, memory: torch.Tensor, start: int, end: int) -> list[torch.Tensor]:
        """Of positions in one page, in the pool's keys or values: a view for every layer.

        Where they are not held, it is of another page and not to be used.
        """
        at, offset = divmod(start, self.pages.page_tokens)
        held = self.tables[:, at].tolist()
        strips = [memory[:, page, offset : offset + end - start].unbind() for page in held]
        return [strips[strip][layer] for strip, layer in self.pages.places]

    def values_of(self, layers: range, start: int, end: int) -> list[torch.Tensor]:
        """As WorkingKv.values_of, of positions that lie in one page."""
        if self.pages.strips == 1:
            return [self._at(self.pages.values, 0, slice(layers.start, layers.stop), start, end)]
        return [self.values_at(layer, start, end).unsqueeze(0) for layer in layers]

    def _at(self, memory: torch.Tensor, strip: int, layers: int | slice, start: int, end: int) -> torch.Tensor:
        at, offset = divmod(start, self.pages.page_tokens)
        page = int(self.tables[strip, at])
        assert page != NOT_HELD, "what is asked for is held"
        return memory[layers, page, offset : offset + end - start]

    def _firsts_for(self, raw_base: int) -> list[int]:
        size = self.pages.page_tokens
        return [group.kept_from(raw_base, size) // size for group in self.shape.groups]

    def _window(self, number: int) -> int:
        window = self.shape.groups[number].window
        assert window is not None
        return window

    def _cover(self, tokens: int) -> None:
        """Hold all pages from `_firsts` on, as far as `tokens` reach. Raises OutOfKv; nothing is changed then."""
        end = max(_pages(tokens, self.pages.page_tokens), self.tables.shape[1])
        tables = np.full((len(self.tables), end), NOT_HELD, dtype=np.int32)
        tables[:, : self.tables.shape[1]] = self.tables
        is_missing = tables == NOT_HELD
        for own, first in zip(self.pages.own, self._firsts, strict=True):
            is_missing[own, :first] = False
        tables[is_missing] = self.pages.take(int(np.count_nonzero(is_missing)))
        self.tables = tables

    def _slide(self, tokens: int) -> None:
        """Give back what no window reaches any more, and un-rotated keys that are saved; have room in front."""
        size = self.pages.page_tokens
        for number in self._sliding:
            group, first = self.shape.groups[number], self._firsts[number]
            kept = held_from(group, self.length, self._holds, size) // size
            if kept > first:
                self._firsts[number] = kept
                self._let_go(number, kept)
                self._note_firsts()
            elif number in self._fronts:
                self._move_front(number, group.hidden_before(self.length) // size, _pages(tokens, size))
        if self._sliding:
            base = unsaved_from(self.length, self._holds, size)
            if base >= self.raw.base + size:
                with self.lock:
                    self.raw.let_go(base)

    def _move_front(self, number: int, seen: int, end: int) -> None:
        """seen, end: the pages that the next tokens see or are in."""
        kept = self._firsts[number]
        if seen >= kept:
            self._let_go(number, kept)
            return
        table = self.tables[self.pages.own[number]]
        wanted = seen + np.flatnonzero(table[0, seen : min(end, kept)] == NOT_HELD)
        unseen = np.flatnonzero(table[0, :seen] != NOT_HELD)[: len(wanted)]
        table[:, wanted] = table[:, unseen]
        table[:, unseen] = NOT_HELD

    def _let_go(self, number: int, first: int) -> None:
        """Of all pages before `first`."""
        gone = self.tables[self.pages.own[number], :first]
        self.pages.give(gone[gone != NOT_HELD])
        gone[:] = NOT_HELD
        self._fronts.discard(number)

    def _note_firsts(self) -> None:
        for number in self._sliding:
            first = self._firsts[number] * self.pages.page_tokens
            self.whole_from = max(self.whole_from, self.shape.groups[number].whole_from(first))


def _pages(tokens: int, page_tokens: int) -> int:
    return -(-tokens // page_tokens)


def to_device(indices: Sequence[npt.NDArray[np.int64]], device: torch.device) -> Rows:
    """In one copy.  # each [n] int64"""
    return torch.from_numpy(np.stack(indices)).to(device, non_blocking=True).unbind()
