"""`cachedattention chat`: a conversation in the terminal, and below each answer where its prompt came from."""

from __future__ import annotations

import codecs
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import httpx
from rich.console import Console

from inference.embedded.small_talk import SUGGESTION
from protocol.errors import ConfigError, PeerError, PeerUnavailable

KEY_VARIABLE = "CACHEDATTENTION_API_KEY"
_PATIENCE = httpx.Timeout(10.0, read=600.0)
_HELP = "/new begins a new conversation · /system TEXT sets its system message · /quit leaves · Ctrl-C stops an answer"
_PROMPT = "› "
Json = dict[str, Any]


class _Stopped(Exception):
    """Ctrl-C while an answer came."""


@dataclass
class Conversation:
    """What the server is told each time: it knows conversations by their text."""

    system: str = ""
    messages: list[Json] = field(default_factory=list)

    def with_user(self, text: str) -> list[Json]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.messages, {"role": "user", "content": text}]

    def record(self, user: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def run_chat(url: str, *, model: str | None, system: str, max_tokens: int | None, temperature: float) -> int:
    """Chat until /quit or the end of input. Raises PeerUnavailable: no server there; ConfigError: no such model."""
    options: Json = {"temperature": temperature}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    console = Console(highlight=False, soft_wrap=True)
    with _client(url) as client:
        chat = _Chat(client, console, options)
        chat.model = _choose(_get_models(client, url), model)
        return chat.run(Conversation(system))


def summary(usage: Json, ttft_s: float) -> str:
    """One line on where a prompt came from."""
    parts = usage.get("cachedattention") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    missed = sum((parts.get("missed") or {}).values())
    tiers = [f"{name} {parts.get(name, 0):,}" for name in ("hbm", "dram", "ssd", "computed")]
    if missed:
        tiers.append(f"missed {missed:,}")
    return (
        f"cached {cached:,} of {usage.get('prompt_tokens', 0):,} tokens ({' · '.join(tiers)})"
        f" · TTFT {ttft_s * 1e3:,.0f} ms"
    )


class _Chat:
    def __init__(self, client: httpx.Client, console: Console, options: Json) -> None:
        self.model = ""
        self._client = client
        self._console = console
        self._options = options
        self._at_terminal = sys.stdin.isatty()

    def run(self, conversation: Conversation) -> int:
        if self._at_terminal:
            self._console.print(f"[bold]{self.model}[/]  [dim]{_HELP}[/]")
            if self.model == "embedded":
                self._note(f"try: {SUGGESTION}")
        for line in self._lines():
            word, _, rest = line.partition(" ")
            if word in ("/quit", "/exit"):
                break
            if word == "/new":
                conversation = Conversation(conversation.system)
                self._note("a new conversation")
            elif word == "/system":
                conversation = Conversation(rest.strip())
                self._note("a new conversation with this system message")
            elif word.startswith("/"):
                self._note(_HELP)
            else:
                self._turn(conversation, line)
        return 0

    def _turn(self, conversation: Conversation, text: str) -> None:
        """One question. An error is told, and the conversation is as before."""
        answer: list[str] = []
        try:
            with _ctrl_c_stops():
                usage, ttft_s = self._ask(conversation.with_user(text), answer)
        except _Stopped:
            self._console.print()
            self._note("stopped; this question is forgotten")
        except httpx.HTTPError as error:
            self._complain(f"the server went away: {error or type(error).__name__}")
        except PeerError as error:
            self._complain(error.message)
        else:
            conversation.record(text, "".join(answer))
            self._console.print()
            self._note(summary(usage, ttft_s))

    def _ask(self, messages: list[Json], answer: list[str]) -> tuple[Json, float]:
        """Print an answer as it streams. Returns its usage and the time to its first token.

        Raises PeerError: the server refused, or broke off.
        """
        body = {"model": self.model, "messages": messages, "stream": True, **self._options}
        body["stream_options"] = {"include_usage": True}
        started_s, ttft_s, usage = time.monotonic(), 0.0, None
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise PeerError(_refusal(response))
            for event in events(response):
                if "error" in event:
                    raise PeerError(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices", ()):
                    if text := choice.get("delta", {}).get("content"):
                        ttft_s = ttft_s or time.monotonic() - started_s
                        answer.append(text)
                        self._console.print(printable(text), end="", markup=False)
                usage = event.get("usage") or usage
        if usage is None:
            raise PeerError("the answer broke off")
        return usage, ttft_s

    def _lines(self) -> Iterator[str]:
        """What the user says, without empty lines, until Ctrl-D or the end of a pipe, whose lines are shown."""
        if not self._at_terminal:
            for raw in sys.stdin.buffer:  # bytes: a pipe may carry anything
                if text := raw.decode("utf-8", "replace").strip():
                    self._console.print(f"{_PROMPT}{printable(text)}", markup=False)
                    yield text
            return
        while True:
            try:
                text = input(_PROMPT).encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if text:
                yield text

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)

    def _complain(self, text: str) -> None:
        self._console.print()
        self._console.print(text, style="red", markup=False)


def events(response: httpx.Response) -> Iterator[Json]:
    """The data of server-sent events, up to [DONE]. Raises PeerError: one is no JSON object."""
    for line in _sse_lines(response):
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise PeerError("the server sent no JSON") from error
        if not isinstance(event, dict):
            raise PeerError("the server sent no JSON object")
        yield event


def _sse_lines(response: httpx.Response) -> Iterator[str]:
    """Lines at \\n only. httpx's own also split at U+2028 and its like, which JSON may carry unescaped."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from lines
    if rest:
        yield rest


def printable(text: str) -> str:
    """Text whose control characters cannot command the terminal, as those of an untrained model like to."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _client(url: str) -> httpx.Client:
    try:
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=url.rstrip("/"), timeout=_PATIENCE, trust_env=False, headers=headers)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url: {error}", param="url") from error


def _get_models(client: httpx.Client, url: str) -> list[str]:
    try:
        response = client.get("/v1/models")
        response.raise_for_status()
        return [str(model["id"]) for model in response.json()["data"]]
    except httpx.UnsupportedProtocol as error:
        raise ConfigError(f"--url: {error}", param="url") from error
    except httpx.HTTPStatusError as error:
        raise PeerUnavailable(f"{url}: {_refusal(error.response)}") from error
    except httpx.HTTPError as error:
        raise PeerUnavailable(f"no server answers at {url}; start one with `cachedattention up`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PeerUnavailable(f"what answers at {url} is no server of ours") from error


def _choose(models: list[str], wanted: str | None) -> str:
    if not models:
        raise PeerUnavailable("the server has no model yet")
    if wanted is not None and wanted not in models:
        raise ConfigError(f"--model: the server has {', '.join(models)}, not {wanted}", param="model")
    return wanted or models[0]


def _refusal(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


@contextmanager
def _ctrl_c_stops() -> Iterator[None]:
    """Within, Ctrl-C raises _Stopped: leaving the stream tells the server to cancel."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
