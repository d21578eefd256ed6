"""Which saved contexts are turns of one conversation. Pure.

Turn keys do not tell; token ids do: a turn is *earlier* than another whose token ids begin with all of its own, and a
conversation is a turn that nothing continues, with its earlier turns. Turns of two conversations may be the same, where
somebody went back and asked differently.
"""

from __future__ import annotations

from collections import defaultdict
from enum import Enum
from hashlib import blake2b

import numpy as np

from protocol.ids import ID_BYTES, ROOT
from protocol.messages import Manifest, ManifestEntry

_TOKEN_BYTES = 4

Context = Manifest | ManifestEntry


class Relation(Enum):
    SAME = "same"
    EARLIER = "earlier"
    LATER = "later"
    OTHER = "other"


def common_tokens(one: Context, other: Context) -> int:
    """How many leading tokens two contexts have in common; 0 across namespaces, where no KV is shared."""
    if one.namespace != other.namespace:
        return 0
    size = min(len(one.token_ids), len(other.token_ids))
    differs = np.frombuffer(one.token_ids, np.uint32, size // _TOKEN_BYTES) != np.frombuffer(
        other.token_ids, np.uint32, size // _TOKEN_BYTES
    )
    return int(differs.argmax()) if differs.any() else len(differs)


def relation(context: Context, to: Context) -> Relation:
    """What `context` is to another one."""
    if context.turn_key == to.turn_key:
        return Relation.SAME
    common = _TOKEN_BYTES * common_tokens(context, to)
    if len(to.token_ids) == common < len(context.token_ids):
        return Relation.LATER
    if len(context.token_ids) == common < len(to.token_ids):
        return Relation.EARLIER
    return Relation.OTHER


class EarlierTurns:
    """Finds the earlier turns among many, in two passes: `note` each context, then ask for the `earlier` ones of each.

    Memory is linear in contexts, not in tokens. A context is looked for only where its second last chunk is passed by,
    so the time is linear in tokens and in turns found.
    """

    def __init__(self) -> None:
        # (namespace, second last chunk) -> length in tokens -> digest of the tokens -> turn keys
        self._ends: dict[tuple[bytes, bytes], dict[int, dict[bytes, list[bytes]]]] = defaultdict(dict)

    def note(self, context: Context) -> None:
        length = len(context.token_ids) // _TOKEN_BYTES
        lengths = self._ends[context.namespace, context.chunk_ids[-2] if len(context.chunk_ids) > 1 else ROOT]
        digest = blake2b(context.token_ids, digest_size=ID_BYTES).digest()
        lengths.setdefault(length, {}).setdefault(digest, []).append(context.turn_key)

    def earlier(self, context: Context) -> list[bytes]:
        """Turn keys of the earlier turns that were noted, shortest first."""
        length = len(context.token_ids) // _TOKEN_BYTES
        candidates: dict[int, list[dict[bytes, list[bytes]]]] = defaultdict(list)
        for chunk_id in (ROOT, *context.chunk_ids):
            for end, digests in self._ends.get((context.namespace, chunk_id), {}).items():
                if end < length:
                    candidates[end].append(digests)
        found: list[bytes] = []
        state = blake2b(digest_size=ID_BYTES)
        start = 0
        for end in sorted(candidates):
            state.update(context.token_ids[_TOKEN_BYTES * start : _TOKEN_BYTES * end])
            start = end
            digest = state.copy().digest()
            for digests in candidates[end]:
                found += digests.get(digest, ())
        return found
