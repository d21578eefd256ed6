"""Copies between the arena and the device: on CUDA on streams of their own, straight from and to pinned memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch

from monitoring.logs import get_logger
from protocol.arena import Arena

log = get_logger(__name__)


class Copies:
    """The loader's or the saver's, beside the computation. On the CPU a thread of its own is all that it takes."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Copies made within go their own way: they may begin before, and end after, they are asked for."""
        yield

    def follow(self) -> None:
        """What is copied from here on has seen everything that the engine computes by now."""

    def join(self) -> None:
        """Wait until all copies are through."""


class CudaCopies(Copies):
    """A stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._computing = torch.cuda.default_stream(device)  # the engine's

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def follow(self) -> None:
        self._stream.wait_stream(self._computing)

    def join(self) -> None:
        self._stream.synchronize()


def copies_for(device: torch.device) -> Copies:
    return CudaCopies(device) if device.type == "cuda" else Copies()


def pin(arena: Arena, device: torch.device) -> bool:
    """Register the arena's memory with the device as long as the arena lives, so that it is copied from directly.

    False: it is not. Copies still work then, by way of the driver's own buffers and several times slower.
    """
    if device.type != "cuda":
        return False
    address, size = arena.memory
    with torch.cuda.device(device):
        error = torch.cuda.cudart().cudaHostRegister(address, size, 0)
    if error != torch.cuda.cudart().cudaError.success:
        log.warning("the arena is not pinned; copies to the device are slow", error=str(error), bytes=size)
        return False
    weakref.finalize(arena, _unpin, address)
    return True


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
