"""Conversations as the command line lists them: turns that nothing continues, put together from saved contexts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from kvdaemon.conversations import EarlierTurns
from protocol.messages import ManifestEntry


@dataclass(frozen=True)
class Conversation:
    """A turn that nothing continues, with its earlier turns.

    tokens: of its context; kv_tokens of them have KV, of which stored_tokens are in either tier. Bytes are KV by tier;
    chunks that several conversations share count in each. Times are wall clock; 0 means for saved_s: not on SSD yet,
    for last_hit_s: not since the daemon started.
    """

    turn_key: str
    turns: int
    tokens: int
    kv_tokens: int
    stored_tokens: int
    dram_tokens: int
    dram_bytes: int
    ssd_tokens: int
    ssd_bytes: int
    text_bytes: int
    saved_s: float
    last_hit_s: float


@dataclass(frozen=True)
class _End:
    """What an earlier turn adds to its conversation: its last chunk, where it is its own."""

    chunk_id: bytes
    dram_bytes: int
    ssd_bytes: int
    last_hit_s: float


async def conversations(entries: Callable[[], AsyncIterator[ManifestEntry]]) -> list[Conversation]:
    """All of them, the one saved last first. Calls `entries` twice: memory is linear in turns, not in tokens."""
    earlier = EarlierTurns()
    ends: dict[bytes, _End] = {}
    async for entry in entries():
        earlier.note(entry)
        end = entry.chunk_ids[-1] if entry.chunk_ids else b""
        ends[entry.turn_key] = _End(end, entry.end_dram_bytes, entry.end_ssd_bytes, entry.last_hit_s)
    found: dict[str, Conversation] = {}
    continued: set[str] = set()
    async for entry in entries():
        before = earlier.earlier(entry)
        continued.update(turn_key.hex() for turn_key in before)
        found[entry.turn_key.hex()] = _conversation(entry, [ends[turn_key] for turn_key in before])
    ours = [one for turn_key, one in found.items() if turn_key not in continued]
    return sorted(ours, key=lambda one: (one.saved_s or float("inf"), one.turn_key), reverse=True)


def _conversation(entry: ManifestEntry, earlier: Sequence[_End]) -> Conversation:
    own = set(entry.chunk_ids)
    partial = {end.chunk_id: end for end in earlier if end.chunk_id not in own}.values()
    return Conversation(
        turn_key=entry.turn_key.hex(),
        turns=1 + len(earlier),
        tokens=len(entry.token_ids) // 4,
        kv_tokens=entry.kv_tokens,
        stored_tokens=entry.stored_tokens,
        dram_tokens=entry.dram_tokens,
        dram_bytes=entry.dram_bytes + sum(end.dram_bytes for end in partial),
        ssd_tokens=entry.ssd_tokens,
        ssd_bytes=entry.ssd_bytes + sum(end.ssd_bytes for end in partial),
        text_bytes=entry.text_bytes,
        saved_s=entry.saved_s,
        last_hit_s=max([entry.last_hit_s, *(end.last_hit_s for end in earlier)]),
    )
