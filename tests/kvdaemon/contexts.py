"""Contexts with tokens of their own, as inference saves them: equal beginnings are equal chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocol.arena import Geometry
from protocol.ids import ROOT, digest, pack_tokens
from protocol.lineage import Truncation, lineage_of
from protocol.messages import Ack, Manifest, SaveManifest
from tests.kvdaemon.client import NAMESPACE, SMALL, Kv, StoreClient


@dataclass(frozen=True)
class Turn:
    """A saved turn: its manifest, and the KV of its chunks."""

    manifest: Manifest
    chain: list[Kv]

    @property
    def key(self) -> bytes:
        return self.manifest.turn_key


def markers(kv: Kv) -> list[bytes]:
    """Bytes that occur in the KV of a chunk, at its beginning and end, and nowhere else."""
    return [marker for keys, values in kv.layers for marker in (keys.tobytes()[:16], values.tobytes()[-16:])]


def tokens(count: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 50_000, count)]


def make_turn(
    token_ids: Sequence[int],
    *,
    text: str = "",
    geometry: Geometry = SMALL,
    namespace: bytes = NAMESPACE,
    truncations: tuple[Truncation, ...] = (),
) -> Turn:
    """The turn whose transcript is `token_ids`; the last one has no KV yet. Its KV depends on its tokens alone."""
    kv_tokens = np.array(token_ids[:-1], dtype=np.uint32)
    chain: list[Kv] = []
    parent = ROOT
    names = iter(lineage_of(namespace, kv_tokens, geometry.chunk_tokens, truncations).chunk_ids)
    for start in range(0, len(kv_tokens), geometry.chunk_tokens):
        part = kv_tokens[start : start + geometry.chunk_tokens]
        if any(one.start <= start < one.end for one in truncations):
            continue
        this = next(names)
        rng = np.random.default_rng(list(this))
        layers = tuple(
            tuple(
                rng.integers(0, 256, len(part) * size, dtype=np.uint8)
                for size in (geometry.key_bytes, geometry.value_bytes)
            )
            for _ in range(geometry.layers)
        )
        chain.append(Kv(this, parent, len(part), layers))  # type: ignore[arg-type]
        parent = this
    packed = pack_tokens(token_ids)
    key = digest("turn key", namespace, packed, text.encode())
    ids = tuple(kv.chunk_id for kv in chain)
    text = text or f"text of {key.hex()}"
    return Turn(Manifest(key, namespace, packed, text, ids, len(kv_tokens), truncations), chain)


async def save_turn(client: StoreClient, turn: Turn) -> None:
    await client.save(turn.chain)
    await client.rpc.request(SaveManifest(turn.manifest), Ack, 5.0)
