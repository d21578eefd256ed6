"""Traces as conversations: who asks what when, and of which chunks a prompt consists.

Chunk ids are made here, 16 bytes each: equal ids mean equal content from the first token on, as everywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import IO, Any

from benchmarks.simulator.names import Format

_MOONCAKE_BLOCK = 512
_TEXT_CHARACTERS_PER_TOKEN = 4
_TEXT_GAP_S = 60.0  # mean of the gap between turns, which chat texts do not tell

# What the parsing of a foreign file ends with.
_NOT_OF_THIS_FORMAT = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError),
    *(EOFError, zlib.error, gzip.BadGzipFile),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One turn of a conversation. Chunks are in order, oldest first; the last of a chain may be partial."""

    chain: tuple[bytes, ...]  # of the prompt, as far as anybody may have stored it
    chain_tokens: int
    left: tuple[bytes, ...]  # what is stored when the turn has ended
    left_tokens: int
    whole: int  # of `left`, how many are full
    prompt_tokens: int
    answer_tokens: int
    next_speaker: str  # "person", "tool" or "": who is expected to speak after the answer
    number: int = 0  # of the turn in its conversation
    at_s: float | None = None  # when it arrives, or ...
    after_s: float = 0.0  # ... so long after the answer before it


@dataclass(frozen=True, slots=True)
class Trace:
    """Conversations in the order of their start, each a list of requests that wait for one another."""

    chunk_tokens: int
    conversations: Sequence[Sequence[Request]]
    requests: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", sum(map(len, self.conversations)))


def load(path: Path, format: Format, *, rate: float, seed: int, chunk_tokens: int = 256) -> Trace:
    """Read a trace, gzip or plain.

    rate: conversations that begin per second (Poisson), where the trace does not tell. chunk_tokens: rounded down to
    what the trace's blocks allow. Raises ValueError: not a trace of this format, or an empty one; OSError: cannot be
    read.
    """
    try:
        with _open(path) as file:
            if format == "mooncake":
                trace = _mooncake(file)
            elif format == "agentic":
                trace = _agentic(file, rate, Random(seed), chunk_tokens)
            else:
                trace = _text(file, rate, Random(seed), chunk_tokens)
        _check(trace)
    except _NOT_OF_THIS_FORMAT as error:
        raise ValueError(f"{path} is no trace of format {format}: {type(error).__name__} {error}") from error
    if not trace.requests:
        raise ValueError(f"{path} holds no requests")
    return trace


def _check(trace: Trace) -> None:
    for requests in trace.conversations:
        for r in requests:
            if not (r.prompt_tokens > 0 and r.answer_tokens >= 0 and r.after_s >= 0 and (r.at_s or 0.0) >= 0):
                raise ValueError(
                    f"a request of {r.prompt_tokens} prompt tokens, {r.answer_tokens} answer tokens, "
                    f"at {r.at_s} s or {r.after_s} s after the one before"
                )


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _records(file: IO[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in file if line.strip())


def _id(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _mooncake(file: IO[str]) -> Trace:
    """One request per line, at its recorded time; blocks of 512 tokens with global prefix hashes."""
    ids: dict[int, bytes] = {}
    conversations = []
    for record in _records(file):
        tokens = record["input_length"]
        chain = tuple(ids.setdefault(h, h.to_bytes(16, "big")) for h in record["hash_ids"])
        whole = min(tokens // _MOONCAKE_BLOCK, len(chain))
        at_s = record["timestamp"] / 1e3
        request = Request(chain, tokens, chain, tokens, whole, tokens, record["output_length"], "", at_s=at_s)
        conversations.append([request])
    return Trace(_MOONCAKE_BLOCK, conversations)


def _agentic(file: IO[str], rate: float, random: Random, chunk_tokens: int) -> Trace:
    """One conversation per line; block ids are local to it. Sub-agents are conversations of their own."""
    started: list[tuple[float, list[Request]]] = []
    now_s = 0.0
    size = block_tokens = 0
    for number, record in enumerate(_records(file)):
        now_s += random.expovariate(rate)
        block_tokens = record["block_size"]
        size = max(1, chunk_tokens // block_tokens)
        # Sub-agents share their parent's block ids: one table for the whole conversation.
        chunks: dict[tuple[bytes, int], bytes] = {}
        stack = [(now_s, record["requests"])]
        while stack:
            start_s, entries = stack.pop()
            for entry in entries:
                if entry["type"] == "subagent":
                    stack.append((start_s + entry["t"], entry["requests"]))
            requests = list(_agentic_requests(entries, start_s, number, size, block_tokens, chunks))
            if requests:
                started.append((start_s, requests))
    started.sort(key=lambda item: item[0])
    return Trace(size * block_tokens, [requests for _, requests in started])


def _agentic_requests(
    entries: list[dict[str, Any]],
    start_s: float,
    number: int,
    size: int,
    block_tokens: int,
    chunks: dict[tuple[bytes, int], bytes],
) -> Iterator[Request]:
    blocks: list[int] = []
    chain: list[bytes] = []
    before: dict[str, Any] | None = None
    turn = 0
    for entry in entries:
        if entry["type"] == "subagent":
            continue
        gap_s = 0.0
        if before is not None:  # where the think time is not noted, what the clock leaves for it
            gap_s = entry.get("think_time", max(0.0, entry["t"] - before["t"] - before.get("api_time", 0.0)))
        blocks = blocks[: entry["keep"]]
        for begin, count in entry["add"]:
            blocks.extend(range(begin, begin + count))
        chain = chain[: entry["keep"] // size]
        for i in range(len(chain), len(blocks) // size):
            key = (chain[-1] if chain else b"", hash(tuple(blocks[i * size : (i + 1) * size])))
            chunk_id = chunks.get(key)
            if chunk_id is None:
                chunk_id = chunks[key] = _id(number, len(chunks))
            chain.append(chunk_id)
        speaker = "tool" if entry["stop"] == "tool_use" else "person"
        rest = entry["in"] > len(chain) * size * block_tokens
        partial = [_id(number, "partial", start_s, entry["t"])] if rest else []
        known = (*chain, *partial)
        tokens = entry["in"]
        at_s = start_s + entry["t"] if before is None else None
        yield Request(known, tokens, known, tokens, len(chain), tokens, entry["out"], speaker, turn, at_s, gap_s)
        before = entry
        turn += 1


def _text(file: IO[str], rate: float, random: Random, chunk_tokens: int) -> Trace:
    """Chats: every assistant message is a request, and what it leaves behind includes the answer.

    Lengths are characters / 4; gaps are exponential.
    """
    conversations = []
    now_s = 0.0
    for number, record in enumerate(_records(file)):
        now_s += random.expovariate(rate)
        requests: list[Request] = []
        chain: tuple[bytes, ...] = ()
        known = tokens = 0
        for message in record["messages"]:
            size = max(1, len(message["content"] or "") // _TEXT_CHARACTERS_PER_TOKEN)
            if message["role"] == "assistant" and tokens:
                whole, rest = divmod(tokens + size, chunk_tokens)
                partial = [_id(number, "partial", tokens + size)] if rest else []
                left = (*(_id(number, i) for i in range(whole)), *partial)
                at_s = None if requests else now_s
                gap_s = random.expovariate(1 / _TEXT_GAP_S)
                turn = len(requests)
                requests.append(
                    Request(chain, known, left, tokens + size, whole, tokens, size, "person", turn, at_s, gap_s)
                )
                chain, known = left, tokens + size
            tokens += size
        if requests:
            conversations.append(requests)
    return Trace(chunk_tokens, conversations)


def repeat(trace: Trace, sessions: int, rate: float, seed: int) -> Trace:
    """A longer trace: `sessions` conversations drawn from this one, each a new one, beginning at `rate` per second."""
    random = Random(seed)
    now_s = 0.0
    conversations = []
    for number in range(sessions):
        now_s += random.expovariate(rate)
        copy = _copier(number.to_bytes(8, "big"))
        drawn = random.choice(trace.conversations)
        conversations.append(
            [replace(r, chain=copy(r.chain), left=copy(r.left), at_s=None if i else now_s) for i, r in enumerate(drawn)]
        )
    return Trace(trace.chunk_tokens, conversations)


def _copier(salt: bytes) -> Callable[[tuple[bytes, ...]], tuple[bytes, ...]]:
    """Equal chunks to equal chunks, of no other salt."""
    copies: dict[bytes, bytes] = {}

    def copy(chain: tuple[bytes, ...]) -> tuple[bytes, ...]:
        for chunk_id in chain:
            if chunk_id not in copies:
                copies[chunk_id] = hashlib.blake2b(chunk_id, digest_size=16, salt=salt).digest()
        return tuple(copies[chunk_id] for chunk_id in chain)

    return copy
