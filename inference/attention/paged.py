"""Attention over working KV in pages: all jobs of a step in one call, each through its block table.

Three ways, by what the installed torch and the model offer:

- FlashAttention through a block table (torch's varlen_attn has one from 2.12 on),
- FlashAttention over keys gathered from their pages (torch 2.11's varlen_attn),
- scaled_dot_product_attention over gathered keys: on the CPU, in float32, and where scores are bent or have sinks.

Which of the first two works here is tried out once.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inference.attention.dense import Masks, attend
from inference.paged_kv import FLASH_PAGE_TOKENS, PagedKv, Pages, Rows, to_device
from inference.working_kv import KvShape, new_context
from monitoring.logs import get_logger
from protocol.errors import InternalError

log = get_logger(__name__)

_LARGEST_HEAD = 256
_TRIAL = ((1, 300), (1, 17), (40, 300), (7, 7))  # new and all tokens of each job
_TRIAL_GROUP = 4  # query heads to a KV head
_TOLERANCE = 2e-2  # of values around 1


@dataclass(frozen=True)
class Part:
    """One job's tokens in a step: `new` of them from position `past` on."""

    kv: PagedKv
    past: int
    new: int

    @property
    def total(self) -> int:
        return self.past + self.new


class Run:
    """Jobs side by side in the flat row that all have one new token, or all more: FlashAttention's own terms."""

    def __init__(self, parts: Sequence[Part], start: int, longest: int | None = None) -> None:
        """longest: as PagedStep has it."""
        self._parts = parts
        self._device = parts[0].kv.shape.device
        new, total = [part.new for part in parts], [part.total for part in parts]
        self.tokens = slice(start, start + sum(new))  # in the flat row
        self.longest_new, self.longest = max(new), max(total) if longest is None else longest
        ends = np.zeros((3, len(parts) + 1), dtype=np.int32)
        ends[0, 1:], ends[1, 1:], ends[2, 1:] = np.cumsum(new), np.cumsum(total), total
        on_device = torch.from_numpy(ends).to(self._device, non_blocking=True)
        self.new_ends, self.ends, self.totals = on_device[0], on_device[1], on_device[2, 1:]  # int32

    @functools.cached_property
    def block_tables(self) -> torch.Tensor:
        """Places that are unused, or not held, name page 0.  # [strips, jobs, pages of the longest] int32"""
        pages = self._parts[0].kv.pages
        tables = np.zeros((pages.strips, len(self._parts), -(-self.longest // pages.page_tokens)), dtype=np.int32)
        for job, part in enumerate(self._parts):
            held = part.kv.tables[:, : -(-part.total // pages.page_tokens)]
            tables[:, job, : held.shape[1]] = np.maximum(held, 0)
        return torch.from_numpy(tables).to(self._device, non_blocking=True)

    @functools.cached_property
    def rows(self) -> list[Rows]:
        """Where all tokens lie, job by job, for each strip.  # each [sum of totals]"""
        return _by_strip(to_device(_places(self._parts, from_start=True), self._device))


# (query [tokens, heads, dim] of a run; a layer's keys and values [pages, page_tokens, kv_heads, dim]; the run; the
# layer's strip; scale; window) -> [tokens, heads, dim]
Flash = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Run, int, float | None, int | None], torch.Tensor]


def through_block_table(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    run: Run,
    strip: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """FlashAttention that finds the pages itself. Nothing is copied."""
    return _varlen_attn()(
        query,
        keys,
        values,
        run.new_ends,
        run.ends,  # FlashAttention 2 wants it, although the table and the totals say as much
        run.longest_new,
        run.longest,
        scale=scale,
        window_size=_window(window),
        enable_gqa=True,
        seqused_k=run.totals,
        block_table=run.block_tables[strip],
        num_splits=1,  # a sum in the same order whatever else is in the batch
    )


def over_gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    run: Run,
    strip: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """FlashAttention over copies."""
    varlen_attn = _varlen_attn()
    # Later ones want to be told that query heads share KV heads; that of torch 2.11 sees it.
    said = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(
        query,
        keys[run.rows[strip]],
        values[run.rows[strip]],
        run.new_ends,
        run.ends,
        run.longest_new,
        run.longest,
        scale=scale,
        window_size=_window(window),
        **said,
    )


def _varlen_attn() -> Callable[..., torch.Tensor]:
    from torch.nn.attention import varlen

    found: Callable[..., torch.Tensor] = varlen.varlen_attn  # type: ignore[assignment]  # a tuple, if asked for
    return found


def _window(window: int | None) -> tuple[int, int]:
    """How many tokens before and behind itself a token sees; -1: all."""
    return (-1, 0) if window is None else (window - 1, 0)


class PagedStep:
    """What all layers of one step share: where its new tokens lie, and what they see."""

    def __init__(self, parts: Sequence[Part], flash: Flash | None, longest: int | None = None) -> None:
        """parts: in the order of the flat row, with room for their new tokens.

        longest: of a step that is recorded, for other parts to be filled in later: the tokens of the longest context.
        """
        self._parts = parts
        self._pages = parts[0].kv.pages
        self._flash = flash
        self._longest = longest
        self._masks = Masks()
        self._made: dict[tuple[int, int | None], list[tuple[torch.Tensor, int]]] = {}  # see _tables
        device = self._pages.shape.device
        self._rows = _by_strip(to_device(_places(parts), device))
        kept, raw_places, end = [], [], 0
        for part in parts:
            start, end = end, end + part.new
            raw_from = max(part.past, part.kv.raw.base)
            if raw_from < part.total:
                kept.append(np.arange(start + raw_from - part.past, end))
                raw_places.append(np.stack(part.kv.raw.places(np.arange(raw_from, part.total))))
        # Of which tokens un-rotated keys are kept, and where.
        self._raw: tuple[slice | torch.Tensor, list[Rows]] | None = None
        if kept:
            *raw_rows, tokens = to_device([*np.concatenate(raw_places, 1), np.concatenate(kept)], device)
            self._raw = (slice(None) if len(tokens) == end else tokens), _by_strip(raw_rows, 2)

    def fill(self, parts: Sequence[Part]) -> None:
        """Name other parts' places, in the same tensors. As many parts, of one new token each, all with `longest`.

        What is recorded of this step's writing and attention does it for them from then on.
        """
        for own, other in zip(self._tensors, PagedStep(parts, self._flash, self._longest)._tensors, strict=True):
            own.copy_(other, non_blocking=True)

    @functools.cached_property
    def _tensors(self) -> list[torch.Tensor]:
        """All that the device reads of a step in which each job has one new token and keeps its un-rotated key."""
        (run,) = self._runs
        assert self._raw is not None, "un-rotated keys are kept"
        rows = [index for rows in (self._rows, self._raw[1]) for strip in rows for index in strip]
        return [*rows, run.new_ends, run.ends, run.totals, run.block_tables]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, raw_key: torch.Tensor) -> None:
        """Store the KV of all new tokens.  # each [tokens, kv_heads, dim]"""
        strip, at = self._pages.places[layer]
        self._pages.keys[at][self._rows[strip]] = key
        self._pages.values[at][self._rows[strip]] = value
        if self._raw is not None:
            tokens, rows = self._raw
            self._pages.raw[at][rows[strip]] = raw_key[tokens]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Causal attention of each job's new tokens over all of it, these included. As `dense.attend`, for all jobs.

        query [heads, tokens, dim], rotated. Returns [tokens, heads, dim].
        """
        if self._flash is None or softcap is not None or sinks is not None:
            if self._longest is not None:
                raise InternalError("attention over gathered keys differs from step to step")
            return self._attend_gathered(layer, query, scale, window, softcap, sinks)
        strip, at = self._pages.places[layer]
        keys, values, rows = self._pages.keys[at], self._pages.values[at], query.transpose(0, 1)
        found = [self._flash(rows[run.tokens], keys, values, run, strip, scale, window) for run in self._runs]
        return found[0] if len(found) == 1 else torch.cat(found)

    @functools.cached_property
    def _runs(self) -> list[Run]:
        """Jobs with one new token apart from others: how theirs is computed does not depend on who else is there."""
        runs, start = [], 0
        for _, group in itertools.groupby(self._parts, key=lambda part: part.new == 1):
            runs.append(Run(list(group), start, self._longest))
            start = runs[-1].tokens.stop
        return runs

    def _attend_gathered(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        found, end = [], 0
        strip, at = self._pages.places[layer]
        for part, (table, first) in zip(self._parts, self._tables(strip, window), strict=True):
            start, end = end, end + part.new
            keys, values = (
                memory[at][table].flatten(0, 1)[: part.total - first]
                for memory in (self._pages.keys, self._pages.values)
            )
            found.append(attend(query[:, start:end], keys, values, self._masks, scale, window, softcap, sinks))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _tables(self, strip: int, window: int | None) -> list[tuple[torch.Tensor, int]]:
        """Each job's pages that its new tokens see, int64, and the position that these begin with."""
        if (strip, window) not in self._made:
            size, found = self._pages.page_tokens, []
            for part in self._parts:
                first = 0 if window is None else max(0, part.past - window + 1) // size
                held = part.kv.tables[strip, first : -(-part.total // size)].astype(np.int64)
                found.append((torch.from_numpy(held).to(self._pages.shape.device), first * size))
            self._made[strip, window] = found
        return self._made[strip, window]


def _places(parts: Sequence[Part], *, from_start: bool = False) -> list[np.ndarray]:
    """Each strip's page, and the offset, of the parts' new tokens, or of all their tokens, one part after another."""
    return list(
        np.concatenate([part.kv.places(np.arange(0 if from_start else part.past, part.total)) for part in parts], 1)
    )


def _by_strip(places: Sequence[torch.Tensor], shared: int = 1) -> list[Rows]:
    """places: each strip's page, and then `shared` indices that are those of all strips."""
    pages, rest = places[:-shared], places[-shared:]
    return [(page, *rest) for page in pages]


@functools.cache
def flash_for(shape: KvShape) -> Flash | None:
    """The fastest way that gives the right answer here; None: neither does."""
    if (
        shape.device.type != "cuda"
        or shape.dtype not in (torch.bfloat16, torch.float16)
        or shape.key_dim != shape.value_dim
        or shape.key_dim % 8
        or shape.key_dim > _LARGEST_HEAD
    ):
        return None
    for flash in (through_block_table, over_gathered):
        try:
            difference = trial(shape, flash)
        except (ImportError, TypeError, RuntimeError) as error:  # not in this torch, or not on this device
            log.info("no such attention here", way=flash.__name__, reason=str(error))
            continue
        if difference <= _TOLERANCE:
            log.info("attention", way=flash.__name__, difference=f"{difference:.1e}")
            return flash
        log.warning("attention gives wrong answers here", way=flash.__name__, difference=difference)
    return None


@torch.inference_mode()
def trial(shape: KvShape, flash: Flash) -> float:
    """How far `flash` is from scaled_dot_product_attention, at most, over jobs of several lengths and windows."""
    one = KvShape(1, shape.kv_heads, shape.key_dim, shape.value_dim, shape.dtype, shape.device)
    pages = Pages(one, FLASH_PAGE_TOKENS, 4 * len(_TRIAL) * FLASH_PAGE_TOKENS * one.token_bytes)
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int, heads: int) -> torch.Tensor:
        made = torch.randn(tokens, heads, shape.key_dim, generator=generator)
        return made.to(shape.device, shape.dtype)

    parts = []
    for new, total in _TRIAL:
        kv = new_context(pages, total, 0)
        assert isinstance(kv, PagedKv)
        key, value = random(total, shape.kv_heads), random(total, shape.kv_heads)
        kv.write(0, 0, key, value, key)
        parts.append(Part(kv, total - new, new))
    query = random(sum(part.new for part in parts), _TRIAL_GROUP * shape.kv_heads).transpose(0, 1)
    differences = []
    for window in (None, 20):
        expected, found = (PagedStep(parts, way).attend(0, query, 0.1, window, None, None) for way in (None, flash))
        differences.append(float((found.float() - expected.float()).abs().max()))
    return max(differences)
