"""How much memory there is for working KV."""

from __future__ import annotations

from pathlib import Path

import torch

from inference.paged_kv import context_pages, page_bytes
from inference.working_kv import KvShape, context_bytes
from protocol.errors import ConfigError

# Of what is free at start: the store, other processes and the computation need some, too. A device has the last alone.
_SHARE = {"cpu": 0.5, "cuda": 0.85}
_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN_BYTES = 2 << 30


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now; on the CPU as far as this process's cgroup allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return _UNKNOWN_BYTES
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return max(0, min(found, limit - int((_CGROUP / "memory.current").read_text())))
    except (OSError, ValueError):  # no cgroup of our own, or one without a limit ("max")
        return found


def working_kv_bytes(
    asked: int | None,
    free: int,
    shape: KvShape,
    max_context: int,
    max_running: int,
    retain: int,
    page_tokens: int | None = None,
) -> int:
    """The bound of working KV: what was asked for, or a share of what is free, if that much can be used. Pure.

    page_tokens: where it lies in pages.

    Raises ConfigError: not even one context of max_context tokens fits.
    """
    if page_tokens is None:
        one = context_bytes(shape, max_context)
    else:
        one = context_pages(shape, page_tokens, max_context) * page_bytes(shape, page_tokens)
    share = _SHARE[shape.device.type]
    found = asked if asked is not None else min(int(free * share), max_running * one + retain)
    if found < one:
        fitting = max_context * found // one
        source = "were asked for" if asked is not None else f"are {share:.0%} of the free memory"
        raise ConfigError(
            f"working_kv: a context of {max_context} tokens takes {one} bytes, and {found} {source};"
            f" give more, or lower max_context to about {fitting}",
            param="working_kv",
        )
    return found
