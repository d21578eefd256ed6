"""Leasing 64 resident chunks, against a bare ZeroMQ echo between two processes.

The echo is DEALER to ROUTER over ipc, as ours; it carries what an acquire's answer weighs and does nothing else. Two
forms: blocking sockets, the least that ZeroMQ costs, and zmq.asyncio on both sides. The bounds are held to the
blocking one. Rounds of a hundred alternate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zmq
import zmq.asyncio

from benchmarks.store.echo import echo_server
from benchmarks.store.engine import EngineSide, engine_side, kv_shape, running_daemon, save_contexts
from benchmarks.store.figures import Figure, Section
from protocol.codec import Frame, decode, encode
from protocol.ids import new_id
from protocol.messages import Acquire, Acquired, SlotRef

CHUNKS = 64
_MIB = 2**20


def measure(disk: Path, quick: bool, step: Callable[[], None]) -> Section:
    section = Section("acquire", f"acquire of {CHUNKS} resident chunks against a bare ZeroMQ echo")
    shape = kv_shape(_MIB // 4, 1)
    rounds, calls = (3, 20) if quick else (40, 100)
    weight = len(_answer())
    with (
        running_daemon(disk, dram="32MiB", ssd="0") as stack,
        engine_side(stack, shape, CHUNKS * 256) as side,
        echo_server(stack.run_dir / "echo-blocking.sock", blocking=True) as blocking_at,
        echo_server(stack.run_dir / "echo-asyncio.sock", blocking=False) as asyncio_at,
    ):
        context = save_contexts(side, 1, CHUNKS)[0]
        request = Acquire(new_id(), side.namespace, tuple(context.chunk_ids))
        blocking: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        blocking.connect(blocking_at)
        data = bytes(weight)
        found: dict[str, list[float]] = {"acquire": [], "echo": [], "asyncio echo": []}
        with blocking:
            for _ in range(rounds):
                found["echo"] += _blocking_round(blocking, data, calls)
                found["asyncio echo"] += side.ask(_asyncio_round(asyncio_at, data, calls))
                found["acquire"] += side.ask(_acquire_round(side, request, calls))
                step()
    for quantile, name, most in ((0.5, "p50", 3.0), (0.99, "p99", 10.0)):
        acquire, echo, other = (
            float(np.quantile(found[who], quantile)) * 1e6 for who in ("acquire", "echo", "asyncio echo")
        )
        section.figures += [
            Figure(f"acquire {name}", acquire, "us", echo, "blocking echo", at_most=most),
            Figure(f"acquire {name}", acquire, "us", other, "asyncio echo"),
        ]
    section.facts["calls of each"] = f"{rounds * calls}, answers of {weight} bytes"
    section.facts["of which codec, both ends"] = f"{_codec_us(request):.0f} us"
    return section


def _answer() -> bytes:
    refs = tuple(SlotRef(slot, 3, new_id(), 256, "dram") for slot in range(CHUNKS))
    return encode(Frame("end", 1000, Acquired(new_id(), refs)))


def _codec_us(request: Acquire) -> float:
    """Encoding and decoding of an acquire and its answer, once each, in microseconds."""
    asked, answered = encode(Frame("req", 1000, request, 1000)), _answer()
    question, answer = decode(asked), decode(answered)
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        encode(question)
        decode(asked)
        encode(answer)
        decode(answered)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e6


async def _acquire_round(side: EngineSide, request: Acquire, calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        lease, reason, _ = await side.store.acquire(request)
        seconds.append(time.perf_counter() - started)
        if lease is None or len(lease.chunks) < CHUNKS:
            raise RuntimeError(f"chunks are missing: {reason}")
        await side.store.release(lease.lease_id)
    return seconds


async def _asyncio_round(endpoint: str, data: bytes, calls: int) -> list[float]:
    seconds = []
    with zmq.asyncio.Context.instance().socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        await socket.send(data)  # connected
        await socket.recv()
        for _ in range(calls):
            started = time.perf_counter()
            await socket.send(data)
            await socket.recv()
            seconds.append(time.perf_counter() - started)
    return seconds


def _blocking_round(socket: zmq.Socket[bytes], data: bytes, calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        socket.send(data)
        socket.recv()
        seconds.append(time.perf_counter() - started)
    return seconds
