"""Clients: a turn over HTTP, a turn straight to inference, and many at a rate. They do as little as they can."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from benchmarks.gateway.stand_in import MODEL
from protocol.ids import digest, new_id
from protocol.messages import ChatMessage, RunTurn, Sampling, TurnDelta
from protocol.rpc import RpcClient

_PATIENCE_S = 120.0
_HISTORY = ("What did we say about the delivery of Thursday? " * 5, "It comes at nine. " * 10) * 4


@dataclass(frozen=True)
class Sample:
    """Of one turn, in seconds since it was sent."""

    first_token_s: float
    done_s: float


class HttpClients:
    """Streams over kept-alive connections, parsed by hand: a client library would take longer than the gateway."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def turn(self, number: int, tokens: int) -> Sample:
        """Raises RuntimeError: it was not answered in full."""
        head, body = _http_request(number, tokens)
        connection = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = connection
        sent_s = time.perf_counter()
        writer.write(head + body)
        seen, first_s = b"", 0.0
        async with asyncio.timeout(_PATIENCE_S):
            while b"[DONE]" not in seen[-64:]:
                piece = await reader.read(65_536)
                if not piece:
                    raise RuntimeError(f"the gateway hung up: {seen[-300:]!r}")
                seen += piece
                if not first_s and b'"content":"w' in seen:
                    first_s = time.perf_counter()
                if not first_s and b"HTTP/1.1 200" not in seen[:20]:
                    raise RuntimeError(f"the gateway refused: {seen[:500]!r}")
            done_s = time.perf_counter()
            while not seen.endswith(b"0\r\n\r\n"):
                seen += await reader.read(65_536)
        if seen.count(b'"content":"w') != tokens:
            raise RuntimeError(f"{seen.count(b'content')} pieces of {tokens}")
        self._idle.append(connection)
        return Sample(first_s - sent_s, done_s - sent_s)

    def close(self) -> None:
        """Those that are idle; the gateway does so after five seconds."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


class DirectClient:
    """The gateway's own client of inference, alone."""

    def __init__(self, endpoint: str) -> None:
        self._client = RpcClient(endpoint, "gateway")

    async def start(self) -> None:
        await self._client.start()
        await self._client.wait_connected(_PATIENCE_S)

    async def turn(self, number: int, tokens: int) -> Sample:
        messages = tuple(ChatMessage(**message) for message in _messages(number))
        job = RunTurn(new_id(), messages, digest("bench", b"k"), b"salt", Sampling(max_tokens=tokens))
        sent_s, first_s = time.perf_counter(), 0.0
        async with aclosing(self._client.stream(job, _PATIENCE_S, _PATIENCE_S)) as parts:
            async for part in parts:
                if not first_s and isinstance(part, TurnDelta):
                    first_s = time.perf_counter()
        return Sample(first_s - sent_s, time.perf_counter() - sent_s)

    async def stop(self) -> None:
        await self._client.stop()


async def at_rate(turn: Callable[[int], Awaitable[Sample]], rate: float, seconds: float, seed: int) -> list[Sample]:
    """Turns that come at random, so many per second, whoever is still waiting."""
    chance, loop = random.Random(seed), asyncio.get_running_loop()
    tasks: list[asyncio.Future[Sample]] = []
    due = begin = loop.time()
    for number in itertools.count():
        due += chance.expovariate(rate)
        if due - begin > seconds:
            break
        await asyncio.sleep(max(0.0, due - loop.time()))
        tasks.append(asyncio.ensure_future(turn(seed * 1_000_000 + number)))
    return await asyncio.gather(*tasks)


def quantile(values: Sequence[float], share: float) -> float:
    """By the nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _messages(number: int) -> list[dict[str, Any]]:
    """A conversation of eight messages, some 2 KB, and a question of its own."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(_HISTORY)]
    return [*talk, {"role": "user", "content": f"Question {number}?"}]


def _http_request(number: int, tokens: int) -> tuple[bytes, bytes]:
    body = json.dumps({"model": MODEL, "messages": _messages(number), "max_tokens": tokens, "stream": True}).encode()
    head = ("POST /v1/chat/completions HTTP/1.1", "Host: gateway", f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(head).encode(), body
