"""Attention of jobs that decode, all of a step in one call for each layer.

A decoding job has one new token, and its reading of the KV takes less time than the calls of torch's operators; nor
has torch one on the CPU for contexts of different lengths where they lie. So this is a kernel of our own. It writes the
new KV, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from inference.kernels import BLOCK, attention_kernel, softmax_kernel, take_threads
from inference.rotary import HalfTurn
from inference.working_kv import KvShape, WorkingKv

_BYTES_PER_THREAD = 1 << 20  # what is read in some multiples of the time that a thread takes to wake


def takes(shape: KvShape) -> bool:
    """Whether there is a kernel for such working KV."""
    is_cpu = shape.device.type == "cpu" and shape.dtype in (torch.float32, torch.bfloat16)
    return is_cpu and shape.key_dim == shape.value_dim and shape.key_dim % 4 == 0


def prepare(shape: KvShape) -> None:
    """Compile the kernels now: seconds, once on a machine. A step would do it otherwise, and all jobs wait for that."""
    if takes(shape):
        attention_kernel(shape.key_dim, shape.dtype.itemsize)
        softmax_kernel(shape.dtype.itemsize)


class Decoding:
    """The jobs of a step that decode. Their new tokens are the first ones of the step."""

    def __init__(self, kvs: Sequence[WorkingKv]) -> None:
        """kvs: of one shape, which `takes` takes, each with room for a token behind its `length`."""
        self.count = len(kvs)
        self._kvs = kvs  # their memory stays while we have its addresses
        self.shape = kvs[0].shape
        self._last = max(kv.length for kv in kvs)  # position
        self._places: dict[int, Any] = {}  # by group of layers
        self._shares: dict[int | None, tuple[Any, Any]] = {}  # by window
        self._scratch = torch.empty(0)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        raw_key: torch.Tensor,
        scale: float | None,
        window: int | None,
        turn: HalfTurn | None = None,
    ) -> torch.Tensor:
        """Write the KV of the first `count` tokens into that layer, and let each attend over its context.

        query [tokens, heads, dim] and key [tokens, kv_heads, dim], rotated unless `turn` says how; value and raw_key
        as key. Returns [count, heads, dim]. Raises IndexError: `turn` has no row for a job's position.
        """
        shape, heads = self.shape, query.shape[1]
        if window not in self._shares:
            totals = [kv.length + 1 for kv in self._kvs]
            firsts = [0 if window is None else max(0, total - window) for total in totals]
            self._shares[window] = share_out(firsts, totals, self._threads(firsts, totals))
        rows = [_rows(x) for x in (query, key, value, raw_key)]
        if turn is not None and self._last >= len(turn[0]):  # the kernel would read whatever lies there
            raise IndexError(f"there is no rotation for position {self._last}")
        tables = (0, 0) if turn is None else tuple(table.data_ptr() for table in turn)
        addresses = np.array([*((x.data_ptr(), x.stride(0) * x.itemsize) for x in rows), tables], dtype=np.int64)
        found = torch.empty(self.count, heads, shape.key_dim)
        dim, width = shape.key_dim, shape.dtype.itemsize
        parts, bounds = self._shares[window]
        group, place = shape.places[layer]
        if group not in self._places:
            self._places[group] = np.array([_place(kv, group) for kv in self._kvs], dtype=np.int64)
        # Not the kernel's own: numba frees an array of which only the address is still in use. One for all layers.
        wanted = heads * (len(parts) * (dim + 2) + (len(bounds) - 1) * (dim + BLOCK))
        if self._scratch.numel() < wanted:
            self._scratch = torch.empty(wanted)
        attention_kernel(dim, width)(
            *(dim, width, heads, shape.kv_heads, layer, place, addresses, found.data_ptr(), self._places[group]),
            *(parts, bounds, self._scratch.data_ptr()),
            dim**-0.5 if scale is None else scale,
        )
        return found.to(shape.dtype)

    def _threads(self, firsts: Sequence[int], totals: Sequence[int]) -> int:
        """How many are worth waking for that."""
        shape = self.shape
        read = (sum(totals) - sum(firsts)) * shape.token_bytes // shape.layers
        return take_threads(1 + read // _BYTES_PER_THREAD)


def share_out(firsts: Sequence[int], totals: Sequence[int], threads: int) -> tuple[Any, Any]:
    """Divide the reading of tokens firsts[i]..totals[i]-1 of every job i evenly among threads.

    Returns parts  # [parts, 3] int64: job, first token, token behind the last
    and the first part of each thread, and the end  # [threads + 1] int64.
    A job's parts follow one another, none is empty, and most jobs have one.
    """
    tokens = sum(totals) - sum(firsts)
    ends = [tokens * (thread + 1) // threads for thread in range(threads)]
    parts, bounds, done = [], [0], 0
    for job, (first, total) in enumerate(zip(firsts, totals, strict=True)):
        while first < total:
            end = min(total, first + ends[len(bounds) - 1] - done)
            if end > first:
                parts.append((job, first, end))
            done, first = done + end - first, end
            while len(bounds) <= threads and done == ends[len(bounds) - 1]:
                bounds.append(len(parts))
    return np.array(parts, dtype=np.int64), np.array(bounds, dtype=np.int64)


def _place(kv: WorkingKv, group: int) -> tuple[int, ...]:
    """Where a job's KV lies: address and bytes from layer to layer of keys, values, the new raw key (0: not kept).

    Addresses are those of position 0, though rows begin with what the group keeps. Layers of raw keys are the model's.
    """
    rows = kv.rows[group]
    layer_bytes = [x.stride(0) * x.itemsize for x in (rows.keys, rows.values, kv.raw.keys)]
    keys, values, raw = (
        x.data_ptr() + at * x.stride(1) * x.itemsize
        for x, at in ((rows.keys, -rows.base), (rows.values, -rows.base), (kv.raw.keys, kv.length - kv.raw.base))
    )
    raw = raw if kv.length >= kv.raw.base else 0
    return keys, layer_bytes[0], values, layer_bytes[1], raw, layer_bytes[2], kv.length


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With each token's heads one behind the other.  # [tokens, heads, dim]"""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
