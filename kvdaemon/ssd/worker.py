"""The SSD worker: the process that owns RocksDB and moves chunks between it and the arena.

rocksdict holds the interpreter lock inside get, put and write, so whoever calls it is deaf meanwhile: a process of its
own, that nobody waits for. Its event loop answers the front; one thread does all database work, one small piece at a
time, and `Turns` decides whose piece is next.

Slots named in an SsdRead belong to the worker from the request until its reply or its death. The front frees none of
them before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from kvdaemon.failpoints import reach
from kvdaemon.ssd.garbage import Garbage
from kvdaemon.ssd.tables import ChunkRecord, DamagedDatabase, DatabaseInUse, Refused, Stalled, Tables
from kvdaemon.ssd.turns import BACKGROUND, URGENT, Turns
from monitoring import logs
from protocol.arena import Arena, SlotState, exclusive
from protocol.errors import CachedAttentionError, CapacityError, InvalidRequest, PeerError, PeerProtocolError
from protocol.ids import ID_BYTES, ROOT
from protocol.messages import (
    Ack,
    AttachArena,
    FindTurns,
    FoundTurns,
    ListManifests,
    ManifestEntry,
    ManifestPage,
    ManifestReply,
    SsdDelete,
    SsdErase,
    SsdErased,
    SsdGetManifest,
    SsdList,
    SsdPage,
    SsdPutManifest,
    SsdRead,
    SsdReadDone,
    SsdRecord,
    SsdScrub,
    SsdScrubbed,
    SsdStatus,
    SsdStatusRequest,
    SsdWrite,
    SsdWritten,
)
from protocol.rpc import Call, RpcServer

T = TypeVar("T")
log = logs.get_logger(__name__)

_PR_SET_PDEATHSIG = 1
_FLUSH_S = 2.0
_PIECE_BYTES = 8 * 1024 * 1024  # read in one go before somebody else may have a turn
_SPARE_DISK_BYTES = 32 * 1024 * 1024  # left free for RocksDB's flushes; running it into a full disk costs a restart
_WRITE_FAILURES = 5  # in a row, then a fresh process tries its luck
_SCRUB_PAGE = 512  # records; more than the 256 blocks that a listing can find unreadable, so that it gets on
# Shares of the SSD tier's capacity. Manifests wait for nothing, so chunks leave room for as many as there may be.
_MANIFEST_SHARE = 0.04
_CHUNK_SHARE = 1 - _MANIFEST_SHARE  # less the headroom that rewriting needs; the front lets chunks go long before
_RECLAIM_BELOW = 0.015  # that limit: room is made before a write has to wait for it
_RECLAIM_S = 0.2
_RECLAIM_PATIENCE_S = 60.0
DAMAGED_MARK = "DAMAGED"  # a file in the database's directory: move it aside at the next start


@dataclass
class _Arrival:
    """One chunk of a read on its way. outcome: empty while it is."""

    chunk_id: bytes
    slot: int
    generation: int
    record: ChunkRecord | None = None
    outcome: str = ""


class SsdWorker:
    """Answers the front. Handlers run on the event loop, `_in_thread` functions on the database thread."""

    def __init__(self, endpoint: str, tables: Tables, capacity_bytes: int, moved_aside: str = "") -> None:
        self.failed = asyncio.Event()  # RocksDB will not take writes any more: the process should end
        self._tables = tables
        self._capacity_bytes = capacity_bytes
        self._moved_aside = moved_aside
        self._arena: Arena | None = None
        self._turns = Turns()
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._compaction = ThreadPoolExecutor(1, thread_name_prefix="compaction")
        self._reclaiming = asyncio.Lock()
        self._largest_bytes = 0  # of a chunk, so far
        self._is_full = False  # and nothing can be reclaimed
        self._write_failures = 0
        self._error = ""  # of RocksDB, since its last flush
        self._corrupt_records = 0
        self._background: list[asyncio.Task[None]] = []
        self._touching: asyncio.Task[None] | None = None
        self._server = RpcServer(
            endpoint,
            "ssd",
            {
                AttachArena: self._attach,
                SsdRead: self._read,
                SsdWrite: self._write,
                SsdDelete: self._delete,
                SsdList: self._list,
                SsdPutManifest: self._put_manifest,
                SsdGetManifest: self._get_manifest,
                SsdStatusRequest: self._status,
                FindTurns: self._find_turns,
                ListManifests: self._list_manifests,
                SsdScrub: self._scrub,
                SsdErase: self._erase,
            },
        )

    async def start(self) -> None:
        """Raises ConfigError: the socket is taken."""
        await self._server.start()
        loops = (self._flush_often, self._reclaim_often, self._limit_manifests)
        self._background = [asyncio.ensure_future(work()) for work in loops]

    async def stop(self) -> None:
        """Answer nobody any more, finish the piece at hand, flush, close."""
        await self._server.stop()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        try:
            await self._in_thread(self._tables.close)
        finally:
            self._database.shutdown()
            self._compaction.shutdown(cancel_futures=True)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Run on the database thread, to its end even where the caller is cancelled: pieces never overlap."""
        work = asyncio.get_running_loop().run_in_executor(self._database, function)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    def _attached(self) -> Arena:
        if self._arena is None:
            raise InvalidRequest("no arena is attached")
        return self._arena

    async def _attach(self, call: Call, request: AttachArena) -> Ack:
        async with self._turns.turn(URGENT):
            if self._arena is not None:
                self._arena.close()
                self._arena = None
            arena = await self._in_thread(lambda: Arena.open(Path(request.path)))
            if arena.arena_id != request.arena_id:
                arena.close()
                raise InvalidRequest(f"{request.path} is another arena by now", param="arena_id")
            self._arena = arena
        self._touching = asyncio.ensure_future(asyncio.to_thread(_touch, arena))
        return Ack()

    # -- reading ------------------------------------------------------------------------------------------

    async def _read(self, call: Call, request: SsdRead) -> SsdReadDone:
        arena = self._attached()
        arrivals = [_Arrival(c.chunk_id, _checked_slot(arena, c.slot), c.generation) for c in request.chunks]
        order = self._turns.order()
        urgency = BACKGROUND if request.background else URGENT
        async with self._turns.turn(urgency, order):
            await self._in_thread(lambda: self._find(arena, arrivals))
        per_piece = max(1, _PIECE_BYTES // arena.geometry.layer_bytes)
        for layer in range(arena.geometry.layers):
            coming = [arrival for arrival in arrivals if not arrival.outcome]
            for start in range(0, len(coming), per_piece):
                piece = coming[start : start + per_piece]
                async with self._turns.turn(urgency, order):
                    await self._in_thread(partial(self._bring, arena, piece, layer))
        for arrival in arrivals:
            arrival.outcome = arrival.outcome or "ok"
        useless = [arrival.chunk_id for arrival in arrivals if arrival.outcome != "ok"]
        if useless:
            log.error("chunks on SSD that cannot be read are deleted", chunks=[chunk_id.hex() for chunk_id in useless])
            await self._forget(useless)
        return SsdReadDone(tuple(arrival.outcome for arrival in arrivals))

    def _find(self, arena: Arena, arrivals: list[_Arrival]) -> None:
        for arrival in arrivals:
            try:
                record = arrival.record = self._tables.record(arrival.chunk_id)
            except PeerProtocolError:
                arrival.outcome = "corrupt"
                continue
            if record is None or record.geometry != arena.geometry.digest():
                arrival.outcome = "missing"
            elif record.tokens > arena.geometry.chunk_tokens or len(record.checksums) != arena.geometry.layers:
                arrival.outcome = "corrupt"

    def _bring(self, arena: Arena, arrivals: list[_Arrival], layer: int) -> None:
        """Read one layer of each chunk, verify it, copy it into its slot."""
        geometry = arena.geometry
        for arrival in arrivals:
            record = arrival.record
            assert record is not None
            try:
                value = self._tables.layer(record, layer)
            except PeerProtocolError:
                arrival.outcome = "corrupt"
                continue
            size = record.tokens * (geometry.key_bytes + geometry.value_bytes)
            if value is None:
                arrival.outcome = "corrupt" if self._is_unchanged(record) else "missing"
                continue
            if len(value) != size or xxhash.xxh3_64_intdigest(value) != record.checksums[layer]:
                arrival.outcome = "corrupt"
                continue
            if not _is_ours(arena, arrival):
                arrival.outcome = "missing"
                continue
            reach("layer.before")
            key_view, value_view = arena.layer(arrival.slot, layer, record.tokens)
            raw = np.frombuffer(value, dtype=np.uint8)
            np.copyto(key_view, raw[: len(key_view)])
            np.copyto(value_view, raw[len(key_view) :])
            reach("layer.copied")
            arena.set_layer_ready(arrival.slot, layer, record.checksums[layer])
            reach("layer.after")

    def _is_unchanged(self, record: ChunkRecord) -> bool:
        """Whether the tables still have this very record. False: deleted or written anew since it was read."""
        with contextlib.suppress(PeerProtocolError):
            return self._tables.record(record.chunk_id) == record
        return True

    async def _forget(self, chunk_ids: list[bytes]) -> None:
        async with self._turns.turn(BACKGROUND):
            with contextlib.suppress(PeerError, CapacityError):  # found corrupt again when read again
                await self._in_thread(lambda: self._tables.delete_chunks(chunk_ids))

    @property
    def _limit_bytes(self) -> float:
        """What all files may take when a chunk has been written: the rewriting of a file needs the rest for a while."""
        headroom = 2 * (self._tables.file_bytes + self._largest_bytes)
        return self._capacity_bytes * _CHUNK_SHARE - headroom

    # -- writing ------------------------------------------------------------------------------------------

    async def _write(self, call: Call, request: SsdWrite) -> SsdWritten:
        arena = self._attached()
        slot = _checked_slot(arena, request.slot)
        while True:
            try:
                async with self._turns.turn(BACKGROUND):
                    written = await self._in_thread(lambda: self._copy_out(arena, slot, request.generation))
            except PeerError as error:
                self._note_failure(error)
                raise
            # Full: either what was deleted gives its space back soon, or there is nothing, and the front must choose.
            if written is not None and (written.outcome != "full" or self._is_full):
                self._write_failures = 0
                return written
            # RocksDB flushes behind its limit, or room is being made. Nobody waits for a write; reads go on meanwhile.
            if time.monotonic() + 1.0 > call.deadline_s:
                raise CapacityError("the disk is too slow for what is saved")
            await asyncio.sleep(0.1)

    def _copy_out(self, arena: Arena, slot: int, generation: int) -> SsdWritten | None:
        """Write the chunk in a slot. None: RocksDB cannot take it right now."""
        geometry = arena.geometry
        chunk_id, tokens = arena.chunk_id(slot), arena.tokens(slot)
        parent_id, namespace = arena.parent_id(slot), arena.namespace(slot)
        if not arena.is_current(slot, generation, chunk_id) or arena.state(slot) is not SlotState.READY:
            return SsdWritten(0, "stale")
        if not 0 < tokens <= geometry.chunk_tokens or not arena.is_sealed(slot):
            return SsdWritten(0, "corrupt")
        needed = tokens * geometry.token_bytes
        if shutil.disk_usage(self._tables.path).free < 2 * needed + _SPARE_DISK_BYTES:
            raise CapacityError(f"the disk of {self._tables.path} is full")
        self._largest_bytes = max(self._largest_bytes, needed)
        if needed > self._limit_bytes:
            raise CapacityError(
                f"an SSD tier of {self._capacity_bytes} bytes is too small for chunks of {needed} bytes"
            )
        if self._tables.used_bytes() + needed > self._limit_bytes:
            return SsdWritten(0, "full")
        self._is_full = False
        layers = [b"".join(view.data for view in arena.layer(slot, layer, tokens)) for layer in range(geometry.layers)]
        checksums = tuple(arena.checksum(slot, layer) for layer in range(geometry.layers))
        if not arena.is_current(slot, generation, chunk_id):
            return SsdWritten(0, "stale")
        if any(xxhash.xxh3_64_intdigest(value) != sum_ for value, sum_ in zip(layers, checksums, strict=True)):
            return SsdWritten(0, "corrupt")
        record = ChunkRecord(chunk_id, parent_id, namespace, geometry.digest(), tokens, needed, time.time(), checksums)
        try:
            self._tables.put_chunk(record, layers)
        except Stalled:
            # Ends here: through a future, the exception would keep this frame and its megabytes until the next gc.
            return None
        return SsdWritten(needed, "ok")

    def _note_failure(self, error: PeerError) -> None:
        """RocksDB stays in an error state once it is there; a fresh process gets out of it."""
        self._error = error.message
        self._write_failures += 1
        log.error("RocksDB refuses to write", reason=error.message, failures=self._write_failures)
        if isinstance(error, DamagedDatabase):
            (self._tables.path / DAMAGED_MARK).touch()
            self.failed.set()
        elif self._write_failures >= _WRITE_FAILURES:
            self.failed.set()

    async def _delete(self, call: Call, request: SsdDelete) -> Ack:
        await self._patiently(lambda: self._tables.delete_chunks(request.chunk_ids), call.deadline_s)
        self._is_full = False
        return Ack()

    # -- looking ------------------------------------------------------------------------------------------

    async def _list(self, call: Call, request: SsdList) -> SsdPage:
        if not 1 <= request.limit <= 65536:
            raise InvalidRequest("a page has 1 to 65536 records", param="limit")
        async with self._turns.turn(URGENT):
            found = await self._in_thread(lambda: list(self._tables.records(request.after, request.limit)))
        damaged = [item for item in found if isinstance(item, bytes)]
        if damaged:
            log.error("damaged chunk records on SSD", records=len(damaged))
            self._corrupt_records += len(damaged)
            await self._forget([chunk_id for chunk_id in damaged if chunk_id])
        page = tuple(
            SsdRecord(r.chunk_id, r.parent_id, r.namespace, r.tokens, r.size_bytes, r.written_s)
            for r in found
            if isinstance(r, ChunkRecord)
        )
        return SsdPage(page, more=len(found) == request.limit)

    async def _put_manifest(self, call: Call, request: SsdPutManifest) -> Ack:
        if shutil.disk_usage(self._tables.path).free < _SPARE_DISK_BYTES:
            raise CapacityError(f"the disk of {self._tables.path} is full")
        try:
            async with self._turns.turn(URGENT):
                await self._in_thread(lambda: self._tables.put_manifest(request.manifest))
        except PeerError as error:
            self._note_failure(error)
            raise
        return Ack()

    async def _get_manifest(self, call: Call, request: SsdGetManifest) -> ManifestReply:
        async with self._turns.turn(URGENT):
            try:
                manifest = await self._in_thread(lambda: self._tables.manifest(request.turn_key))
            except PeerProtocolError as error:
                log.error("corrupt manifest is deleted", reason=error.message)
                self._corrupt_records += 1
                with contextlib.suppress(PeerError, CapacityError):
                    await self._in_thread(lambda: self._tables.delete_manifest(request.turn_key))
                return ManifestReply(None, "corrupt")
        return ManifestReply(manifest, "" if manifest is not None else "manifest_lost")

    async def _find_turns(self, call: Call, request: FindTurns) -> FoundTurns:
        low, high = (bytes.fromhex(request.prefix.ljust(2 * ID_BYTES, digit)) for digit in "0f")
        async with self._turns.turn(URGENT):
            found = await self._in_thread(lambda: list(islice(self._tables.turn_keys(low, high), request.limit)))
        return FoundTurns(tuple(found))

    async def _list_manifests(self, call: Call, request: ListManifests) -> ManifestPage:
        async with self._turns.turn(BACKGROUND):
            entries, damaged, more = await self._in_thread(lambda: self._page(request.after, request.limit_bytes))
        await self._forget_manifests(damaged)
        return ManifestPage(tuple(entries), more)

    def _page(self, after: bytes, limit_bytes: int) -> tuple[list[ManifestEntry], list[bytes], bool]:
        """Entries, keys of damaged manifests between them, and whether there are more."""
        entries: list[ManifestEntry] = []
        damaged: list[bytes] = []
        size = 0
        for turn_key, saved_s, manifest in self._tables.manifests_after(after):
            if manifest is None:
                damaged.append(turn_key)
                continue
            if size > limit_bytes:
                return entries, damaged, True
            text_bytes = len(manifest.text.encode("utf-8", "surrogatepass"))
            entries.append(
                ManifestEntry(
                    *(turn_key, manifest.namespace, manifest.token_ids, manifest.kv_tokens, manifest.chunk_ids),
                    *(text_bytes, saved_s),
                )
            )
            # What was read counts, not only what is sent: a page is one piece of the database thread's time.
            size += len(manifest.token_ids) + ID_BYTES * len(manifest.chunk_ids) + text_bytes
        return entries, damaged, False

    async def _forget_manifests(self, turn_keys: list[bytes]) -> None:
        if not turn_keys:
            return
        log.error("damaged manifests are deleted", manifests=[turn_key.hex() for turn_key in turn_keys])
        self._corrupt_records += len(turn_keys)
        async with self._turns.turn(BACKGROUND):
            for turn_key in turn_keys:
                with contextlib.suppress(PeerError, CapacityError):
                    await self._in_thread(partial(self._tables.delete_manifest, turn_key))

    # -- scrubbing ----------------------------------------------------------------------------------------

    async def _scrub(self, call: Call, request: SsdScrub) -> SsdScrubbed:
        if request.what == "manifests":
            return await self._scrub_manifests(request)
        async with self._turns.turn(BACKGROUND):
            found = await self._in_thread(lambda: list(self._tables.records(request.after, _SCRUB_PAGE)))
        last = b""
        checked = size = 0
        damaged: list[bytes] = []
        for record in found:
            if size > request.limit_bytes and last:
                break
            checked += 1
            if isinstance(record, bytes):
                damaged.append(record or ROOT)
                last = record or last
                continue
            last = record.chunk_id
            size += record.size_bytes
            if not await self._is_intact(record):
                damaged.append(record.chunk_id)
        if damaged:
            log.error("damaged chunks on SSD are deleted", chunks=[chunk_id.hex() for chunk_id in damaged])
            await self._forget(damaged)
        is_end = checked == len(found) < _SCRUB_PAGE
        return SsdScrubbed(checked, size, tuple(damaged), b"" if is_end else last)

    async def _is_intact(self, record: ChunkRecord) -> bool:
        """Whether every layer has its checksum. Layer by layer: reads that somebody waits for go in between."""
        for layer in range(len(record.checksums)):
            async with self._turns.turn(BACKGROUND):
                if await self._in_thread(partial(self._has_checksum, record, layer)):
                    continue
                return not await self._in_thread(lambda: self._is_unchanged(record))
        return True

    def _has_checksum(self, record: ChunkRecord, layer: int) -> bool:
        try:
            value = self._tables.layer(record, layer)
        except PeerProtocolError:
            return False
        return value is not None and xxhash.xxh3_64_intdigest(value) == record.checksums[layer]

    async def _scrub_manifests(self, request: SsdScrub) -> SsdScrubbed:
        page = ListManifests(request.after, request.limit_bytes)
        async with self._turns.turn(BACKGROUND):
            entries, damaged, more = await self._in_thread(lambda: self._page(page.after, page.limit_bytes))
        await self._forget_manifests(damaged)
        last = entries[-1].turn_key if more else b""
        return SsdScrubbed(len(entries) + len(damaged), 0, tuple(key or ROOT for key in damaged), last)

    # -- erasing ------------------------------------------------------------------------------------------

    async def _erase(self, call: Call, request: SsdErase) -> SsdErased:
        """Delete, and rewrite the files of everything that was ever deleted: it may have been evicted before.

        Manifests last: while they are there, an erasure that broke off can be asked for again.
        """
        tables = self._tables
        deleted, unplaced = await self._delete_and_flush(
            lambda: tables.delete_chunks(request.chunk_ids), call.deadline_s
        )
        before = tables.physical_bytes()  # everything is in files now
        async with self._reclaiming:
            async with self._turns.turn(BACKGROUND):
                garbage = await self._in_thread(tables.garbage)
            for each in garbage:
                await self._reclaim(each, call.deadline_s)

        def delete_manifests() -> int:
            there = [turn_key for turn_key in request.turn_keys if tables.has_manifest(turn_key)]
            for turn_key in there:
                tables.delete_manifest(turn_key)
            return len(there)

        manifests = await self._delete_and_flush(delete_manifests, call.deadline_s)
        await self._compact(tables.compact_records)
        return SsdErased(
            tuple(record.chunk_id for record in deleted),
            tuple(unplaced),
            sum(record.size_bytes for record in deleted),
            manifests,
            before,
            tables.physical_bytes(),
        )

    async def _reclaim(self, garbage: Garbage, deadline_s: float) -> None:
        """Give the space of one file's garbage back. Raises CapacityError: the disk is full, or too slow; PeerError."""
        await self._patiently(partial(self._tables.bury, garbage), deadline_s)
        await self._compact(partial(self._tables.reclaim, garbage))
        await self._patiently(partial(self._tables.reclaimed, garbage), deadline_s)  # flushed when the next chunks are

    async def _delete_and_flush(self, delete: Callable[[], T], deadline_s: float) -> T:
        """Raises CapacityError: the disk is full, or too slow; PeerError."""

        def both() -> T:
            deleted = delete()
            self._tables.flush()
            return deleted

        return await self._patiently(both, deadline_s)

    async def _patiently(self, function: Callable[[], T], deadline_s: float) -> T:
        """Run on the database thread, again where RocksDB stalls. Raises CapacityError: for too long; PeerError."""
        while True:
            try:
                async with self._turns.turn(BACKGROUND):
                    return await self._in_thread(function)
            except Stalled as error:
                if time.monotonic() + 1.0 > deadline_s:
                    raise CapacityError("the disk is too slow for what is saved") from error
            await asyncio.sleep(0.1)

    async def _compact(self, function: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._compaction, function)

    async def _status(self, call: Call, request: SsdStatusRequest) -> SsdStatus:
        tables = self._tables
        return SsdStatus(
            tables.physical_bytes(),
            tables.manifests,
            self._error,
            self._moved_aside,
            self._corrupt_records,
            _written_bytes(),
        )

    # -- keeping house ------------------------------------------------------------------------------------

    async def _flush_often(self) -> None:
        """Chunks have no log: what was not flushed dies with the process, so flush while it is little."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            if not (self._tables.has_unflushed_chunks or self._error):
                continue
            try:
                async with self._turns.turn(BACKGROUND):
                    await self._in_thread(self._tables.flush)
                self._error = ""
            except CapacityError as error:
                self._note_failure(PeerError(error.message))  # a flush that failed is not taken up again by itself
            except PeerError as error:
                self._note_failure(error)

    async def _reclaim_often(self) -> None:
        """Give deleted chunks' space back where the tier nears its cap, from the files that hold most of it."""
        tables = self._tables
        while True:
            await asyncio.sleep(_RECLAIM_S)
            limit = self._limit_bytes - max(self._capacity_bytes * _RECLAIM_BELOW, 2 * self._largest_bytes)
            if tables.used_bytes() <= limit:
                continue
            try:
                async with self._reclaiming:
                    garbage = await self._delete_and_flush(tables.garbage, time.monotonic() + _RECLAIM_PATIENCE_S)
                    for each in garbage:
                        if tables.used_bytes() <= limit:
                            break
                        await self._reclaim(each, time.monotonic() + _RECLAIM_PATIENCE_S)
                    self._is_full = not garbage
            except (CapacityError, PeerError) as error:
                log.warning("space cannot be given back", reason=error.message)
                await asyncio.sleep(_FLUSH_S)

    async def _limit_manifests(self) -> None:
        """Keep manifests to their share."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            try:
                if self._tables.manifest_bytes > self._capacity_bytes * _MANIFEST_SHARE:
                    async with self._turns.turn(BACKGROUND):
                        dropped = await self._in_thread(lambda: self._tables.drop_oldest_manifests(0.25))
                    log.info("oldest manifests dropped", manifests=dropped)
            except (CapacityError, PeerError) as error:
                log.warning("manifests cannot be dropped", reason=error.message)


def _written_bytes() -> int:
    """What this process wrote by write(2) and its kin: nearly all of it for RocksDB. 0: the kernel keeps no count."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("wchar:")).split()[1])
    return 0


def _touch(arena: Arena) -> None:
    """Make this process's page tables for the arena now; the first read would pay for it otherwise."""
    for _ in arena.populate():
        pass


def _is_ours(arena: Arena, arrival: _Arrival) -> bool:
    current = arena.is_current(arrival.slot, arrival.generation, arrival.chunk_id)
    return current and arena.state(arrival.slot) is SlotState.LOADING


def _checked_slot(arena: Arena, slot: int) -> int:
    if slot >= arena.slots:
        raise InvalidRequest(f"there is no slot {slot}", param="slot")
    return slot


def open_tables(path: Path, capacity_bytes: int) -> tuple[Tables, str]:
    """The database, and where a damaged one was moved to ("" where it was sound). Raises as Tables."""
    moved_aside = ""
    if (path / DAMAGED_MARK).exists():
        moved_aside = _move_aside(path)
    try:
        tables = Tables(path, capacity_bytes)
    except (CapacityError, DatabaseInUse, Refused):
        raise
    except PeerError as error:
        log.error("RocksDB cannot be opened", reason=error.message)
        moved_aside = _move_aside(path)
        tables = Tables(path, capacity_bytes)
    unrecorded = tables.retire_unrecorded()
    if unrecorded:
        log.warning("layers without a record are deleted: an earlier worker died in a flush", chunks=unrecorded)
    return tables, moved_aside


def _move_aside(path: Path) -> str:
    """Keep a damaged database beside, in place of one that was kept before: copies must not fill the disk."""
    for older in path.parent.glob(f"{path.name}.damaged-*"):
        shutil.rmtree(older)
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns() // 1_000_000}")
    path.rename(aside)
    log.error("the SSD tier starts empty; the damaged database was kept", kept=str(aside))
    return str(aside)


def die_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before the kernel knew our wish
        sys.exit(0)


async def _serve(arguments: argparse.Namespace) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tables, moved_aside = open_tables(arguments.database, arguments.capacity_bytes)
    worker = SsdWorker(f"ipc://{arguments.run_dir}/ssd.sock", tables, arguments.capacity_bytes, moved_aside)
    await worker.start()
    waits: list[asyncio.Task[Any]] = [asyncio.ensure_future(event.wait()) for event in (stop, worker.failed)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    try:
        await worker.stop()
    except (CapacityError, PeerError) as error:
        log.error("the last chunks could not be flushed", reason=error.message)
        return 1
    return 1 if worker.failed.is_set() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="The SSD worker; started by kvdaemon.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--capacity-bytes", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text", choices=("text", "json"))
    arguments = parser.parse_args()
    logs.configure("kvdaemon-ssd", arguments.log_level, arguments.log_format)
    die_with_parent(arguments.parent)
    try:
        with exclusive(arguments.run_dir / "ssd.lock", "SSD worker"):
            return asyncio.run(_serve(arguments))
    except CachedAttentionError as error:
        log.error("the SSD worker cannot start", reason=error.message)
        return 1


if __name__ == "__main__":
    sys.exit(main())
