"""What of a prompt is there already, and how each of its tokens is accounted for. Pure.

The account, in tokens: hbm + dram + ssd + computed + missed = prompt. "computed" is new in this turn; "missed"
had been computed by an earlier turn and is computed again, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protocol.ids import TokenArray, unpack_tokens
from protocol.lineage import Truncation, kept_tokens, lineage_of
from protocol.messages import Manifest, SlotRef, TurnUsage

COMPUTING_WAS_CHEAPER = "computing_was_cheaper"


@dataclass(frozen=True)
class Known:
    """How many leading tokens of a prompt an earlier turn has computed, as far as anyone can tell.

    reason names why they would not hit although the store had them all: "" while nothing speaks against it.
    """

    tokens: int
    reason: str = ""
    explained: str = ""  # more about the reason, in words


def known_history(
    prompt: TokenArray,
    parent: Manifest | None,
    continues: bool,
    parent_tokens: int,
    lost_reason: str,
    truncations: Sequence[Truncation] = (),
) -> Known:
    """What a turn could reuse at best.

    continues: the prompt's ids begin with the parent's. parent_tokens: what the journal says the parent left
    behind, for when its manifest is lost (lost_reason says how); of a branch, all that it may share. truncations: what
    is dropped does not count.
    """
    # The last token is always computed: its logits start the answer.
    most = kept_tokens(len(prompt), truncations) - 1
    if parent is None:
        return Known(min(parent_tokens, most), lost_reason) if parent_tokens else Known(0)
    kept = kept_tokens(parent.kv_tokens, truncations)
    if continues:
        return Known(min(kept, most))
    known = min(parent_tokens or kept, kept, most)
    shared = shared_tokens(prompt, parent)
    if shared >= known:
        return Known(known)
    return Known(known, "text_changed", f"first difference at token {shared}")


def shared_tokens(prompt: TokenArray, parent: Manifest) -> int:
    """How many leading tokens a prompt has in common with what was said in a saved context."""
    saved = unpack_tokens(parent.token_ids)[: len(prompt)]
    differs = prompt[: len(saved)] != saved
    return int(differs.argmax()) if differs.any() else len(saved)


@dataclass(frozen=True)
class Wanted:
    """The chunks to ask the store for: every full chunk of the prompt, and the one in which the parent ends, or in
    which the prompt leaves it.

    partial_tokens: how many of that chunk's tokens the prompt shares.
    """

    chunk_ids: tuple[bytes, ...]
    partial_id: bytes | None = None
    partial_index: int = 0
    partial_tokens: int = 0

    def reach(self, chunks: Sequence[SlotRef]) -> int:
        """How many leading tokens of the prompt are in these chunks, which were handed out for it."""
        held = sum(chunk.tokens for chunk in chunks)
        if chunks and chunks[-1].chunk_id == self.partial_id:
            held -= chunks[-1].tokens - self.partial_tokens
        return held


def wanted_chunks(
    namespace: bytes,
    prompt: TokenArray,
    parent: Manifest | None,
    continues: bool,
    chunk_tokens: int,
    truncations: Sequence[Truncation] = (),
) -> Wanted:
    """Chunk ids by lineage. The store finds what other turns with the same beginning saved, too.

    truncations: what of the prompt is dropped, the parent's own included.
    """
    whole = len(prompt) // chunk_tokens * chunk_tokens
    full = lineage_of(namespace, prompt[:whole], chunk_tokens, truncations).chunk_ids
    if parent is not None and not continues and not truncations and not parent.truncations:
        index, left = divmod(min(shared_tokens(prompt, parent), parent.kv_tokens, len(prompt) - 1), chunk_tokens)
        if left and len(parent.chunk_ids) > index:
            return Wanted(full, parent.chunk_ids[index], index, left)
    if parent is not None and continues and parent.kv_tokens % chunk_tokens:
        index, left = divmod(kept_tokens(parent.kv_tokens, truncations), chunk_tokens)
        is_saved = len(parent.chunk_ids) * chunk_tokens >= kept_tokens(parent.kv_tokens, parent.truncations)
        if is_saved and index * chunk_tokens + left < kept_tokens(len(prompt), truncations):
            return Wanted(full, parent.chunk_ids[-1], index, left)
    return Wanted(full)


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


def account_chunks(chunks: Sequence[SlotRef], prompt_tokens: int, computed: int = 0) -> History:
    """Tokens by tier of the chunks that the store will deliver, never the whole prompt.

    computed: so many tokens, whole chunks, are computed though the store has them.
    """
    by_tier = {"dram": 0, "ssd": 0}
    total = 0
    for chunk in chunks:
        used = min(chunk.tokens, prompt_tokens - 1 - total)
        if total >= computed:
            by_tier[chunk.tier] += used
        total += used
    return History(by_tier["dram"] + by_tier["ssd"], 0, by_tier["dram"], by_tier["ssd"])


def account(
    prompt_tokens: int,
    completion_tokens: int,
    history: History,
    known: Known,
    miss_reason: str,
    cheaper: int = 0,
    explained: Mapping[str, str] | None = None,
) -> TurnUsage:
    """The account of a turn. miss_reason explains known tokens that did not hit; known.reason goes before it.

    cheaper: so many tokens did not hit because computing them was sooner done than loading. explained: more about
    reasons, in words.
    """
    missed_tokens = max(0, known.tokens - history.tokens)
    cheaper = min(cheaper, missed_tokens)
    reasons = {COMPUTING_WAS_CHEAPER: cheaper, known.reason or miss_reason or "evicted": missed_tokens - cheaper}
    missed = {reason: tokens for reason, tokens in reasons.items() if tokens}
    words = {known.reason: known.explained, **(explained or {})}
    return TurnUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        hbm=history.hbm,
        dram=history.dram,
        ssd=history.ssd,
        computed=prompt_tokens - history.tokens - missed_tokens,
        missed=missed,
        explained={reason: words[reason] for reason in missed if words.get(reason)},
    )
