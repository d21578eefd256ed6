"""What of a prompt is there already, and how each of its tokens is accounted for. Pure.

The account, in tokens: hbm + dram + ssd + computed + missed = prompt. "computed" is new in this turn; "missed"
had been computed by an earlier turn and is computed again, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.ids import ROOT, TokenArray, chunk_id
from protocol.messages import Manifest, SlotRef, TurnUsage


@dataclass(frozen=True)
class Known:
    """How many leading tokens of a prompt an earlier turn has computed, as far as anyone can tell.

    reason names why they would not hit although the store had them all: "" while nothing speaks against it.
    """

    tokens: int
    reason: str = ""


def known_history(
    prompt: TokenArray, parent: Manifest | None, continues: bool, parent_tokens: int, lost_reason: str
) -> Known:
    """What a turn could reuse at best.

    continues: the prompt's ids begin with the parent's. parent_tokens: what the journal says the parent left
    behind, for when its manifest is lost (lost_reason says how).
    """
    most = len(prompt) - 1  # the last token is always computed: its logits start the answer
    if parent is None:
        return Known(min(parent_tokens, most), lost_reason) if parent_tokens else Known(0)
    if continues:
        return Known(min(parent.kv_tokens, most))
    return Known(min(parent.kv_tokens, most), "text_changed")


@dataclass(frozen=True)
class Wanted:
    """The chunks to ask the store for: every full chunk of the prompt, and the partial one that the parent ends in."""

    chunk_ids: tuple[bytes, ...]
    partial_id: bytes | None = None
    partial_index: int = 0


def wanted_chunks(
    namespace: bytes, prompt: TokenArray, parent: Manifest | None, continues: bool, chunk_tokens: int
) -> Wanted:
    """Chunk ids by lineage. The store finds what other turns with the same beginning saved, too."""
    usable = len(prompt) - 1
    full: list[bytes] = []
    link = ROOT
    for start in range(0, len(prompt) - chunk_tokens + 1, chunk_tokens):
        link = chunk_id(namespace, link, prompt[start : start + chunk_tokens])
        full.append(link)
    if parent is not None and continues and parent.kv_tokens % chunk_tokens and parent.kv_tokens <= usable:
        index = parent.kv_tokens // chunk_tokens
        if len(parent.chunk_ids) == index + 1:
            return Wanted(tuple(full), parent.chunk_ids[index], index)
    return Wanted(tuple(full))


def worth_taking(retained: int, prompt: int, known: int, chunk_tokens: int) -> bool:
    """Whether working KV that shares its first `retained` tokens with a prompt is to be used.

    Always, where it holds what is known of this conversation. Another one's is worth its copy where it shares a chunk,
    or most of the prompt: a template's first words are not, and would hide where the history really comes from.
    """
    return retained >= known > 0 or retained >= chunk_tokens or 2 * retained >= prompt


@dataclass(frozen=True)
class History:
    """The part of a prompt that is not computed: the working KV's own, then chunks of the store."""

    tokens: int = 0
    hbm: int = 0
    dram: int = 0
    ssd: int = 0


def account_chunks(chunks: Sequence[SlotRef], prompt_tokens: int) -> History:
    """Tokens by tier of the chunks that the store will deliver, never the whole prompt."""
    by_tier = {"dram": 0, "ssd": 0}
    total = 0
    for chunk in chunks:
        used = min(chunk.tokens, prompt_tokens - 1 - total)
        by_tier[chunk.tier] += used
        total += used
    return History(total, 0, by_tier["dram"], by_tier["ssd"])


def account(prompt_tokens: int, completion_tokens: int, history: History, known: Known, miss_reason: str) -> TurnUsage:
    """The account of a turn. miss_reason explains known tokens that did not hit; known.reason goes before it."""
    missed_tokens = max(0, known.tokens - history.tokens)
    missed = {known.reason or miss_reason or "evicted": missed_tokens} if missed_tokens else {}
    return TurnUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        hbm=history.hbm,
        dram=history.dram,
        ssd=history.ssd,
        computed=prompt_tokens - history.tokens - missed_tokens,
        missed=missed,
    )
