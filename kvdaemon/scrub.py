"""The scrub: reads chunks that lie still, and puts aside those whose bytes have changed where they lay.

Readers check what comes from SSD, and a sample of what they load from DRAM. A chunk that nobody loads would keep its
damage until somebody does; the scrub walks over all of them, slowly and for ever. On demand it walks once and fast,
over the SSD tier too.

Checksums are computed in a thread. A chunk may be evicted and its slot given away meanwhile, so what the thread found
counts only if the slot still has the generation that it had before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from kvdaemon.index import Chunk, Residence
from kvdaemon.ssd.client import SsdLink
from kvdaemon.store import Store
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.logs import get_logger
from protocol.arena import Arena, SlotState
from protocol.errors import CachedAttentionError, PeerProtocolError
from protocol.messages import ScrubProgress, ScrubReport

log = get_logger(__name__)

_BATCH_BYTES = (
    16 * 1024 * 1024
)  # in one go: some milliseconds of a thread, which costs more to wake than to read one MiB
_ROUND_PAUSE_S = 1.0


@dataclass(frozen=True)
class _Item:
    """A chunk, and where the books say it lies whole."""

    chunk: Chunk
    slot: int
    generation: int


class Scrubber:
    """One event loop owns it."""

    def __init__(
        self, store: Store, ssd: SsdLink | None, metrics: KvDaemonMetrics, opening: asyncio.Lock, bytes_per_s: int
    ) -> None:
        """bytes_per_s: how fast `run` reads; 0: not at all. opening: held while the arena must not be replaced."""
        self._store = store
        self._ssd = ssd
        self._metrics = metrics
        self._opening = opening
        self._bytes_per_s = bytes_per_s

    async def run(self) -> None:
        """Verify the chunks in DRAM, round after round, for ever."""
        while self._bytes_per_s:
            for batch in self._batches():
                started = time.monotonic()
                report = await self._verify(batch)
                await asyncio.sleep(max(0.0, report.dram_bytes / self._bytes_per_s - (time.monotonic() - started)))
            await asyncio.sleep(_ROUND_PAUSE_S)
        await asyncio.Event().wait()

    async def everything(self, progress: Callable[[ScrubProgress], Awaitable[None]]) -> ScrubReport:
        """Verify all chunks of both tiers and all manifests, as fast as it goes beside those who load and save."""
        index = self._store.index
        total = ScrubReport(0, 0, 0, 0, 0)
        for batch in self._batches():
            await progress(ScrubProgress("dram", total.dram_chunks, index.dram_chunks))
            total = _sum(total, await self._verify(batch))
        if self._ssd is None:
            return total
        try:
            after, more = b"", True
            while more:
                await progress(ScrubProgress("ssd", total.ssd_chunks, index.ssd_chunks))
                chunks = await self._ssd.scrub("chunks", after)
                self._metrics.scrubbed("ssd", chunks.bytes)
                for chunk_id in chunks.damaged:
                    self._store.damaged_on_ssd(chunk_id)
                total = _sum(total, ScrubReport(0, 0, chunks.records, chunks.bytes, 0, ssd_damaged=chunks.damaged))
                after, more = chunks.last, bool(chunks.last)
            after, more = b"", True
            expected = (await self._ssd.status()).manifests
            while more:
                await progress(ScrubProgress("manifests", total.manifests, expected))
                page = await self._ssd.scrub("manifests", after)
                total = _sum(total, ScrubReport(0, 0, 0, 0, page.records, manifests_damaged=page.damaged))
                after, more = page.last, bool(page.last)
        except CachedAttentionError as error:
            return replace(total, problem=error.message)
        return total

    def _batches(self) -> Iterator[list[Chunk]]:
        """The chunks in DRAM as they are now, by a few megabytes."""
        dram = self._store.dram
        if dram is None:
            return
        token_bytes = dram.arena.geometry.token_bytes
        batch: list[Chunk] = []
        size = 0
        for chunk in list(self._store.index.resident()):
            batch.append(chunk)
            size += chunk.tokens * token_bytes
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    async def _verify(self, batch: list[Chunk]) -> ScrubReport:
        """Read a batch, and quarantine what is damaged. Chunks on their way in or out are checked by who moves them."""
        async with self._opening:
            dram = self._store.dram
            if dram is None:
                return ScrubReport(0, 0, 0, 0, 0, skipped=len(batch))
            arena = dram.arena
            items = [_Item(chunk, chunk.slot, chunk.generation) for chunk in batch if _lies_still(chunk)]
            sound = await asyncio.to_thread(lambda: [_is_sound(arena, item) for item in items])
            damaged = [item for item, is_sound in zip(items, sound, strict=True) if not is_sound and self._holds(item)]
            for item in damaged:
                log.error("the scrub found a corrupt chunk in DRAM", chunk=item.chunk.chunk_id.hex(), slot=item.slot)
                self._store.quarantine(item.chunk)
        size = sum(item.chunk.tokens for item in items) * arena.geometry.token_bytes
        self._metrics.scrubbed("dram", size)
        ids = tuple(item.chunk.chunk_id for item in damaged)
        return ScrubReport(len(items), size, 0, 0, 0, dram_damaged=ids, skipped=len(batch) - len(items))

    def _holds(self, item: _Item) -> bool:
        """Whether the slot was this chunk's all the time that we read."""
        resident = self._store.resident(item.slot, item.generation, item.chunk.chunk_id)
        return resident is item.chunk and not item.chunk.writing


def _lies_still(chunk: Chunk) -> bool:
    return chunk.residence is Residence.READY and not chunk.writing


def _is_sound(arena: Arena, item: _Item) -> bool:
    """Whether the slot's table entry says what the books say, and its bytes have their checksums."""
    slot, chunk = item.slot, item.chunk
    try:
        is_ready = arena.state(slot) is SlotState.READY
    except PeerProtocolError:
        return False
    return (
        is_ready
        and arena.is_current(slot, item.generation, chunk.chunk_id)
        and (arena.parent_id(slot), arena.namespace(slot)) == (chunk.parent_id, chunk.namespace)
        and (arena.tokens(slot), arena.ready_layers(slot)) == (chunk.tokens, arena.geometry.layers)
        and all(arena.verify_layer(slot, layer, chunk.tokens) for layer in range(arena.geometry.layers))
    )


def _sum(total: ScrubReport, part: ScrubReport) -> ScrubReport:
    return ScrubReport(
        total.dram_chunks + part.dram_chunks,
        total.dram_bytes + part.dram_bytes,
        total.ssd_chunks + part.ssd_chunks,
        total.ssd_bytes + part.ssd_bytes,
        total.manifests + part.manifests,
        total.dram_damaged + part.dram_damaged,
        total.ssd_damaged + part.ssd_damaged,
        total.manifests_damaged + part.manifests_damaged,
        total.skipped + part.skipped,
    )
