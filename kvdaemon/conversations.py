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

from protocol.ids import ID_BYTES
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

    Memory is linear in contexts, not in tokens. A context is looked for only behind the last whole stride of its
    tokens, so the time is linear in tokens and in turns found.
    """

    def __init__(self, stride: int = 256) -> None:
        self._stride = stride
        # (namespace, digest of all whole strides) -> length in tokens -> digest of the tokens -> turn keys
        self._ends: dict[tuple[bytes, bytes], dict[int, dict[bytes, list[bytes]]]] = defaultdict(dict)

    def note(self, context: Context) -> None:
        length = len(context.token_ids) // _TOKEN_BYTES
        strides = max(0, length - 1) // self._stride * self._stride
        lengths = self._ends[context.namespace, _digest(context.token_ids[: _TOKEN_BYTES * strides])]
        lengths.setdefault(length, {}).setdefault(_digest(context.token_ids), []).append(context.turn_key)

    def earlier(self, context: Context) -> list[bytes]:
        """Turn keys of the earlier turns that were noted, shortest first."""
        length = len(context.token_ids) // _TOKEN_BYTES
        found: list[bytes] = []
        state = blake2b(digest_size=ID_BYTES)
        for start in range(0, length, self._stride):
            for end, digests in sorted(self._ends.get((context.namespace, state.digest()), {}).items()):
                if end < length:
                    to_end = state.copy()
                    to_end.update(context.token_ids[_TOKEN_BYTES * start : _TOKEN_BYTES * end])
                    found += digests.get(to_end.digest(), ())
            state.update(context.token_ids[_TOKEN_BYTES * start : _TOKEN_BYTES * (start + self._stride)])
        return found


def _digest(token_ids: bytes) -> bytes:
    return blake2b(token_ids, digest_size=ID_BYTES).digest()
