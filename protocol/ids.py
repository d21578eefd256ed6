"""Names of things: chunks by lineage, namespaces, conversation states by turn key.

Everything is a 16-byte BLAKE2b digest with a personalisation of its own, so that an id of one kind can
never equal an id of another. Pure functions; equal inputs give equal ids in every process, for ever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

ID_BYTES = 16
ROOT = bytes(ID_BYTES)  # the parent of a context's first chunk

TokenArray = npt.NDArray[np.uint32]


def digest(kind: str, *parts: bytes) -> bytes:
    """A 16-byte id of `kind` (at most 16 ASCII characters) over length-prefixed `parts`."""
    state = blake2b(digest_size=ID_BYTES, person=kind.encode("ascii"))
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def pack_tokens(token_ids: Sequence[int] | TokenArray) -> bytes:
    """Token ids as little-endian unsigned 32-bit integers: their form in messages, manifests and ids."""
    return np.asarray(token_ids, dtype="<u4").tobytes()


def unpack_tokens(packed: bytes) -> TokenArray:
    """The inverse of pack_tokens, as a read-only array. Raises ValueError: not a whole number of ids."""
    return np.frombuffer(packed, dtype="<u4")


def new_id() -> bytes:
    """A random id, for jobs, leases and clients."""
    return os.urandom(ID_BYTES)


def model_namespace(weights_digest: bytes, geometry_digest: bytes, dtype: str, codec: str, rope: str = "") -> bytes:
    """What a model's KV depends on beside the tokens. KV never crosses a namespace.

    weights_digest covers the weights and the configuration; geometry_digest the shape of KV; codec its
    encoding in the store; rope the choice of rotary table where that depends on the context length.
    """
    return digest("model namespace", weights_digest, geometry_digest, dtype.encode(), codec.encode(), rope.encode())


def tenant_namespace(model: bytes, tenant_salt: bytes) -> bytes:
    """The namespace of one tenant's KV under one model: equal text of two tenants shares nothing."""
    return digest("tenant namesp", model, tenant_salt)


def chunk_id(namespace: bytes, parent: bytes, token_ids: TokenArray | Sequence[int]) -> bytes:
    """The lineage id of a chunk: its own tokens and, through `parent`, all tokens before them.

    `parent` is ROOT for the first chunk. A partial chunk has the id of the tokens that it holds, so the
    same chunk grown longer is another chunk.
    """
    return digest("chunk", namespace, parent, pack_tokens(token_ids))


def lineage(namespace: bytes, token_ids: TokenArray, chunk_tokens: int) -> list[bytes]:
    """Ids of all chunks that hold `token_ids`, oldest first; the last one is partial where tokens are left over."""
    chain: list[bytes] = []
    parent = ROOT
    for start in range(0, len(token_ids), chunk_tokens):
        parent = chunk_id(namespace, parent, token_ids[start : start + chunk_tokens])
        chain.append(parent)
    return chain


@dataclass(frozen=True)
class Message:
    """One chat message as it counts for a turn key: exactly what can change the rendered prompt."""

    role: str
    content: str
    name: str = ""
    tool_call_id: str = ""
    tool_calls: str = ""  # canonical JSON, see canonical_json


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def conversation_root(tenant_salt: bytes, model: bytes, template_digest: bytes) -> bytes:
    """The turn key of the empty conversation of one tenant with one model and chat template."""
    return digest("conversation", tenant_salt, model, template_digest)


def turn_key(parent: bytes, message: Message) -> bytes:
    """The turn key after one more message. Chained, so the keys of all prefixes cost one pass."""
    parts = (message.role, message.content, message.name, message.tool_call_id, message.tool_calls)
    # surrogatepass: JSON may carry lone surrogates; the key must exist for whatever a client can send.
    return digest("turn key", parent, *(part.encode("utf-8", "surrogatepass") for part in parts))


def turn_keys(root: bytes, messages: Sequence[Message]) -> list[bytes]:
    """The turn key after each of `messages`, in order."""
    keys: list[bytes] = []
    for message in messages:
        root = turn_key(root, message)
        keys.append(root)
    return keys
