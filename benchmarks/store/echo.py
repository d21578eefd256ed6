"""Bare ZeroMQ echo servers in processes of their own. Imports nothing heavy: the new process imports it again."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import zmq
import zmq.asyncio

_START_S = 60.0


@contextlib.contextmanager
def echo_server(path: Path, *, blocking: bool) -> Iterator[str]:
    """An echo server at `path`, with blocking sockets or with asyncio. Yields its endpoint."""
    endpoint = f"ipc://{path}"
    target = _serve_blocking if blocking else _serve_asyncio
    process = multiprocessing.get_context("spawn").Process(target=target, args=(endpoint,), daemon=True)
    process.start()
    deadline = time.monotonic() + _START_S
    while not path.exists():
        if time.monotonic() > deadline or not process.is_alive():
            raise RuntimeError("the echo server does not start")
        time.sleep(0.01)
    try:
        yield endpoint
    finally:
        process.terminate()
        process.join(10)


def _serve_blocking(endpoint: str) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    with socket:
        socket.bind(endpoint)
        while True:
            socket.send_multipart(socket.recv_multipart())


def _serve_asyncio(endpoint: str) -> None:
    async def serve() -> None:
        with zmq.asyncio.Context.instance().socket(zmq.ROUTER) as socket:
            socket.bind(endpoint)
            while True:
                await socket.send_multipart(await socket.recv_multipart())

    asyncio.run(serve())
