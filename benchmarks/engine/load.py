"""The load: conversations over an OpenAI-compatible API, and when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

_ANSWER_S = 120.0  # a server that has not answered by then never will


@dataclass(frozen=True)
class Reply:
    """One answer. Times are seconds after the request was sent.

    cached_tokens: of the prompt, by the server's own account; None: it gives none.
    """

    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int | None
    arrivals_s: tuple[float, ...]  # of the pieces of text, one for each token where the server sends them so
    text: str

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def tpot_s(self) -> float:
        """Seconds for each token after the first."""
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.answer_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """What a reader waits from one piece of text to the next."""
        return tuple(later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))


def client(url: str) -> httpx.AsyncClient:
    # A connection for each turn: servers close idle ones at moments of their own.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=_ANSWER_S, limits=limits, trust_env=False)


async def ask(http: httpx.AsyncClient, messages: list[dict[str, str]], answer_tokens: int) -> Reply:
    """One turn, streamed and greedy.

    Raises RuntimeError: the server refused, broke off, gave no whole answer, or none in time.
    """
    try:
        async with asyncio.timeout(_ANSWER_S):
            return await _ask(http, messages, answer_tokens)
    except TimeoutError:
        raise RuntimeError(f"no answer within {_ANSWER_S:g} s") from None
    except httpx.HTTPError as error:
        raise RuntimeError(f"the connection broke: {error!r}") from error


async def _ask(http: httpx.AsyncClient, messages: list[dict[str, str]], answer_tokens: int) -> Reply:
    body = {
        "model": "default",
        "messages": messages,
        "temperature": 0,
        "max_tokens": answer_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    arrivals: list[float] = []
    text = ""
    usage: dict[str, Any] = {}
    sent = time.perf_counter()
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event))
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    arrivals.append(time.perf_counter() - sent)
                    text += piece
            usage = event.get("usage") or usage
    if usage.get("completion_tokens") != answer_tokens or not arrivals:
        raise RuntimeError(f"no answer of {answer_tokens} tokens: {usage}")
    details = usage.get("prompt_tokens_details") or {}
    return Reply(usage["prompt_tokens"], answer_tokens, details.get("cached_tokens"), tuple(arrivals), text)


class Conversation:
    """A conversation whose user messages have a chosen number of tokens. Its beginning is like no other's.

    The byte tokenizer of the made models gives one token for each ASCII character.
    """

    def __init__(self, http: httpx.AsyncClient, name: str) -> None:
        self._http = http
        self._name = name
        self._tokens = 0
        self._messages: list[dict[str, str]] = []

    async def say(self, tokens: int, answer_tokens: int) -> Reply:
        """One turn with a user message of `tokens` tokens.

        Raises RuntimeError: no answer, or the server counts other tokens than there are.
        """
        start = f"{self._name} {len(self._messages) // 2}: "
        text = (start + "the quick brown fox jumps over the lazy dog " * (tokens // 40 + 1))[:tokens]
        self._messages.append({"role": "user", "content": text})
        reply = await ask(self._http, self._messages, answer_tokens)
        # Each message has a token before and one after it; <|assistant|> ends the prompt.
        self._tokens += tokens + 2
        if reply.prompt_tokens != self._tokens + 1:
            raise RuntimeError(f"the prompt has {self._tokens + 1} tokens, the server counts {reply.prompt_tokens}")
        self._tokens += answer_tokens + 2
        self._messages.append({"role": "assistant", "content": reply.text})
        return reply
