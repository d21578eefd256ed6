"""The catalog: what is stored, told page by page: contexts, where their chunks lie, when they were last of use."""

from __future__ import annotations

import asyncio
import string
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from kvdaemon.index import Residence
from kvdaemon.manifests import ManifestStore
from kvdaemon.ssd.client import SsdLink
from kvdaemon.store import Store
from protocol.errors import InvalidRequest, PeerError, PeerUnavailable
from protocol.ids import ID_BYTES
from protocol.messages import (
    MAX_DESCRIBED,
    Acquired,
    ChunkPlace,
    FoundTurns,
    Manifest,
    ManifestEntry,
    ManifestPage,
    NamespacesMeasured,
    StoreDescription,
    TurnPlace,
    TurnsDescribed,
)

_PAGE_BYTES = 512 * 1024
_LARGEST_PAGE_BYTES = 4 * 1024 * 1024
_MOST_FOUND = 1000
_REMEMBERED_HITS = 65_536
_AT_ONCE = 10_000  # chunks looked at before others have a turn on the event loop


class HitLog:
    """When contexts were last handed out to their end, by their last chunk: the latest of them, in memory only."""

    def __init__(self) -> None:
        self._times: OrderedDict[bytes, float] = OrderedDict()

    def note(self, acquired: Acquired) -> None:
        if not acquired.chunks:
            return
        end = acquired.chunks[-1].chunk_id
        self._times[end] = time.time()
        self._times.move_to_end(end)
        if len(self._times) > _REMEMBERED_HITS:
            self._times.popitem(last=False)

    def last_s(self, chunk_ids: Sequence[bytes]) -> float:
        """Wall clock; 0: never since the daemon started, or too long ago."""
        return self._times.get(chunk_ids[-1], 0.0) if chunk_ids else 0.0

    def forget(self, chunk_id: bytes) -> None:
        self._times.pop(chunk_id, None)


class Catalog:
    """One event loop owns it. Reads only."""

    def __init__(self, store: Store, manifests: ManifestStore, ssd: SsdLink | None) -> None:
        self.hits = HitLog()
        self._store = store
        self._manifests = manifests
        self._ssd = ssd

    async def describe(self) -> StoreDescription:
        namespaces: set[bytes] = set()
        chunks = list(self._store.index)
        for start in range(0, len(chunks), _AT_ONCE):
            namespaces |= {chunk.namespace for chunk in chunks[start : start + _AT_ONCE]}
            await asyncio.sleep(0)
        dram = self._store.dram
        geometry = dram.arena.geometry.to_message() if dram is not None else None
        return StoreDescription(geometry, tuple(sorted(namespaces)))

    async def measure(self, namespaces: Sequence[bytes]) -> NamespacesMeasured:
        tokens = dict.fromkeys(namespaces, 0)
        chunks = list(self._store.index)
        for start in range(0, len(chunks), _AT_ONCE):
            for chunk in chunks[start : start + _AT_ONCE]:
                if chunk.namespace in tokens:
                    tokens[chunk.namespace] += chunk.tokens
            await asyncio.sleep(0)
        dram = self._store.dram
        token_bytes = dram.arena.geometry.token_bytes if dram is not None else 0
        return NamespacesMeasured(tuple(tokens[namespace] * token_bytes for namespace in namespaces))

    async def find(self, prefix: str, limit: int) -> FoundTurns:
        """Turn keys that begin with hexadecimal digits. Raises InvalidRequest: they are none."""
        if len(prefix) > 2 * ID_BYTES or not set(prefix) <= set(string.hexdigits):
            raise InvalidRequest(f"{prefix[:100]!r} is not the beginning of a turn key", param="prefix")
        prefix, limit = prefix.lower(), min(limit, _MOST_FOUND)
        problem = ""
        stored: tuple[bytes, ...] = ()
        if self._ssd is not None:
            try:
                stored = (await self._ssd.find_turns(prefix, limit)).turn_keys
            except PeerError as error:
                problem = error.message
        in_memory = (turn_key for turn_key in self._manifests.in_memory() if turn_key.hex().startswith(prefix))
        return FoundTurns(tuple(sorted({*stored, *in_memory})[:limit]), problem)

    async def page(self, after: bytes, limit_bytes: int) -> ManifestPage:
        """Contexts in the order of turn keys after `after`: those on SSD, and those in memory only."""
        limit_bytes = min(max(limit_bytes, 1), _LARGEST_PAGE_BYTES)
        stored, problem = ManifestPage((), more=False), ""
        if self._ssd is not None:
            try:
                stored = await self._ssd.list_manifests(after, limit_bytes)
            except PeerError as error:
                problem = error.message
        # No await from here on: a manifest that leaves memory for the SSD is seen in one of the two.
        last = stored.entries[-1].turn_key if stored.more else b"\xff" * (ID_BYTES + 1)
        entries = {entry.turn_key: entry for entry in stored.entries}
        for turn_key, manifest in self._manifests.in_memory().items():
            if after < turn_key <= last:
                known = entries.get(turn_key)
                entries[turn_key] = _entry(manifest, known.saved_s if known is not None else 0.0)
        page: list[ManifestEntry] = []
        size = 0
        for turn_key in sorted(entries):
            if size > limit_bytes:
                return ManifestPage(tuple(page), more=True, problem=problem)
            page.append(self._placed(entries[turn_key]))
            size += len(page[-1].token_ids) + ID_BYTES * len(page[-1].chunk_ids)
        return ManifestPage(tuple(page), stored.more, problem)

    async def entries(self) -> AsyncIterator[ManifestEntry]:
        """All contexts. Raises PeerUnavailable: the SSD could not be asked, so some may be missing."""
        after, more = b"", True
        while more:
            page = await self.page(after, _PAGE_BYTES)
            if page.problem:
                raise PeerUnavailable(page.problem)
            for entry in page.entries:
                yield entry
            more = page.more and bool(page.entries)
            after = page.entries[-1].turn_key if page.entries else b""

    def locate(self, chunk_id: bytes) -> ChunkPlace:
        chunk = self._store.index.get(chunk_id)
        if chunk is None:
            return ChunkPlace()
        dram = self._store.dram
        in_dram = chunk.residence is Residence.READY and dram is not None
        dram_bytes = chunk.tokens * dram.arena.geometry.token_bytes if in_dram and dram is not None else 0
        return ChunkPlace(chunk.tokens, dram_bytes, chunk.ssd_bytes, chunk.leases)

    async def describe_turns(self, turn_keys: Sequence[bytes]) -> TurnsDescribed:
        """Raises InvalidRequest: more than MAX_DESCRIBED."""
        if len(turn_keys) > MAX_DESCRIBED:
            raise InvalidRequest(f"at most {MAX_DESCRIBED} turns at once", param="turn_keys")
        turns: list[TurnPlace] = []
        chunk_ids: set[bytes] = set()
        for turn_key in turn_keys:
            manifest = (await self._manifests.get(turn_key)).manifest
            if manifest is None:
                turns.append(TurnPlace(turn_key, 0, 0, 0, 0, 0.0))
                continue
            one = self._placed(_entry(manifest, 0.0))
            places = (one.kv_tokens, one.stored_tokens, one.dram_tokens, one.ssd_tokens, one.last_hit_s)
            turns.append(TurnPlace(turn_key, *places))
            chunk_ids.update(manifest.chunk_ids)
        located = [self.locate(chunk_id) for chunk_id in chunk_ids]
        return TurnsDescribed(
            tuple(turns),
            sum(place.dram_bytes for place in located),
            sum(place.ssd_bytes for place in located),
            sum(place.leases for place in located),
        )

    def _placed(self, entry: ManifestEntry) -> ManifestEntry:
        """The entry with what the store knows of its chunks."""
        places = [self.locate(chunk_id) for chunk_id in entry.chunk_ids]
        end = places[-1] if places else ChunkPlace()
        return replace(
            entry,
            last_hit_s=self.hits.last_s(entry.chunk_ids),
            stored_tokens=sum(place.tokens for place in places if place.dram_bytes or place.ssd_bytes),
            dram_tokens=sum(place.tokens for place in places if place.dram_bytes),
            dram_bytes=sum(place.dram_bytes for place in places),
            ssd_tokens=sum(place.tokens for place in places if place.ssd_bytes),
            ssd_bytes=sum(place.ssd_bytes for place in places),
            end_dram_bytes=end.dram_bytes,
            end_ssd_bytes=end.ssd_bytes,
        )


def _entry(manifest: Manifest, saved_s: float) -> ManifestEntry:
    return ManifestEntry(
        manifest.turn_key,
        manifest.namespace,
        manifest.token_ids,
        manifest.kv_tokens,
        manifest.chunk_ids,
        len(manifest.text.encode("utf-8", "surrogatepass")),
        saved_s,
        truncations=manifest.truncations,
    )
