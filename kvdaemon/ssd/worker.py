"""The SSD worker: the process that owns the SSD tier's files and moves chunks between them and the arena.

rocksdict holds the interpreter lock inside get, put and write, so whoever calls it is deaf meanwhile: a process of its
own, that nobody waits for. Its event loop answers the front; one thread does all database work, a few move KV, each
one small piece at a time, and `Turns` decide whose piece is next.

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
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvdaemon.failpoints import reach
from kvdaemon.garbage import without_collections
from kvdaemon.ssd.chunk_files import CHUNK_FILES, ChunkFiles, Place
from kvdaemon.ssd.tables import ChunkRecord, DamagedDatabase, DatabaseInUse, Refused, Stalled, Tables
from kvdaemon.ssd.transfer import check_layers, read_layers, write_layers
from kvdaemon.ssd.turns import BACKGROUND, URGENT, Turns
from monitoring import logs
from protocol.arena import PAGE_BYTES, Arena, Geometry, SlotState, exclusive
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
_SYNC_S = 2.0
_LISTED_S = 60.0  # the sweep waits so long for the first listing to end
_MOVED_AT_ONCE = 4  # pieces; an SSD wants several, and one is verified while another is on its way
_WRITTEN_AT_ONCE = 2  # chunks
_PIECE_BYTES = 1024 * 1024  # layers that are smaller go together
_SPARE_DISK_BYTES = 32 * 1024 * 1024  # left free for RocksDB's flushes; running it into a full disk costs a restart
_WRITE_FAILURES = 5  # in a row, then a fresh process tries its luck
_SCRUB_PAGE = 512  # records; more than the 256 blocks that a listing can find unreadable, so that it gets on
_SWEEP_PAGE = 512  # records; small, for whoever lists them at the same time
_MANIFEST_SHARE = 0.02  # of the SSD tier's capacity
DAMAGED_MARK = "DAMAGED"  # a file in the database's directory: move it aside at the next start


@dataclass
class _Arrival:
    """One chunk of a read on its way. outcome: empty while it is."""

    chunk_id: bytes
    slot: int
    generation: int
    record: ChunkRecord | None = None
    outcome: str = ""
    ready: int = 0  # layers
    ahead: dict[int, int] = field(default_factory=dict)  # layers that are there before earlier ones: first -> end


class SsdWorker:
    """Answers the front. Handlers run on the event loop, `_in_thread` functions on the database thread."""

    def __init__(
        self, endpoint: str, tables: Tables, files: ChunkFiles, capacity_bytes: int, moved_aside: str = ""
    ) -> None:
        self.failed = asyncio.Event()  # RocksDB will not take writes any more: the process should end
        self._tables = tables
        self._capacity_bytes = capacity_bytes
        self._moved_aside = moved_aside
        self._arena: Arena | None = None
        self._files = files
        self._turns = Turns()
        self._disk = Turns(_MOVED_AT_ONCE)
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._movers = ThreadPoolExecutor(_MOVED_AT_ONCE, thread_name_prefix="mover")
        self._writers = asyncio.Semaphore(_WRITTEN_AT_ONCE)
        self._writing: dict[Place, int] = {}  # and bytes; taken, and without a record yet
        self._is_listed = asyncio.Event()
        self._is_swept = asyncio.Event()
        # Held from where a record goes until its place is free: a sweep would take it for lost, and free it twice.
        self._leaving = asyncio.Lock()
        self._needs_sweep = True
        self._write_failures = 0
        self._error = ""  # since the last sync
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
        loops = (self._sweep_often, self._sync_often, self._limit_manifests)
        self._background = [asyncio.ensure_future(work()) for work in loops]

    async def stop(self) -> None:
        """Answer nobody any more, finish the piece at hand, flush, close."""
        await self._server.stop()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        try:
            try:
                await self._in_thread(self._files.sync)
            finally:
                await self._in_thread(self._tables.close)
        finally:
            self._database.shutdown()
            self._movers.shutdown()
            self._files.close()

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Run on the database thread, to its end even where the caller is cancelled: pieces never overlap."""
        return await _to_its_end(asyncio.get_running_loop().run_in_executor(self._database, function))

    async def _moving(self, function: Callable[[], T]) -> T:
        """Run on a thread that may wait for the disk, to its end as well."""
        return await _to_its_end(asyncio.get_running_loop().run_in_executor(self._movers, function))

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
        order = self._disk.order()
        urgency = BACKGROUND if request.background else URGENT
        async with self._turns.turn(urgency):
            await self._in_thread(lambda: self._find(arena, arrivals))
        pieces = _pieces(arena, arrivals)

        async def bring() -> None:
            for arrival, layers in pieces:
                if not arrival.outcome:
                    async with self._disk.turn(urgency, order):
                        await self._bring(arena, arrival, layers)

        await asyncio.gather(*(bring() for _ in range(_MOVED_AT_ONCE)))
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

    async def _bring(self, arena: Arena, arrival: _Arrival, layers: range) -> None:
        """Read layers of a chunk into its slot, and verify them."""
        record = arrival.record
        assert record is not None
        is_intact = await self._moving(partial(read_layers, self._files, record, arena, arrival.slot, layers))
        if not _is_ours(arena, arrival):
            arrival.outcome = "missing"
        elif is_intact:
            _note_ready(arena, arrival, layers)
        elif not arrival.outcome:
            arrival.outcome = "corrupt" if await self._in_thread(lambda: self._is_unchanged(record)) else "missing"

    def _is_unchanged(self, record: ChunkRecord) -> bool:
        """Whether the tables still have this very record. False: deleted or written anew since it was read."""
        with contextlib.suppress(PeerProtocolError):
            return self._tables.record(record.chunk_id) == record
        return True

    async def _forget(self, chunk_ids: list[bytes]) -> None:
        with contextlib.suppress(PeerError, CapacityError):  # found corrupt again when read again
            await self._remove(chunk_ids)

    async def _remove(self, chunk_ids: Sequence[bytes]) -> list[ChunkRecord]:
        """Delete records and free their places. Returns those that were there. Raises Stalled, and as _free."""

        async def both() -> list[ChunkRecord]:
            async with self._turns.turn(BACKGROUND):
                deleted, damaged = await self._in_thread(lambda: self._tables.delete_chunks(chunk_ids))
            if damaged:  # which alone knew where their KV is
                self._needs_sweep = True
            await self._free([record.place for record in deleted])
            return deleted

        async with self._leaving:
            return await _to_its_end(both())  # a caller that is gone between them would leave places to nobody

    # -- places -------------------------------------------------------------------------------------------

    async def _free(self, places: Iterable[Place]) -> None:
        """Destroy what is at places that no record speaks of, and have them be free.

        Raises CapacityError: the disk is full; PeerError: it says no. The next sweep finds what is left.
        """
        for place in places:
            try:
                async with self._disk.turn(BACKGROUND):
                    await self._moving(partial(self._files.destroy, place))
            except (CapacityError, PeerError):
                self._needs_sweep = True
                raise
            self._files.give(place)

    async def _sweep(self) -> None:
        """Free the places that no record speaks of: a crash or damage took it. Raises as _free."""
        async with self._leaving:
            self._needs_sweep = False
            self._files.suspect()
            for place in self._writing:
                self._files.clear(place)
            after, more = b"", True
            while more:
                async with self._turns.turn(BACKGROUND):
                    page = await self._in_thread(partial(self._records, after, _SWEEP_PAGE))
                for item in page:
                    if isinstance(item, ChunkRecord):
                        self._files.clear(item.place)
                        after = item.chunk_id
                    else:
                        after = item or after
                more = len(page) == _SWEEP_PAGE
            await self._free(list(self._files.suspects()))
            self._is_swept.set()

    def _records(self, after: bytes, limit: int) -> list[ChunkRecord | bytes]:
        return list(self._tables.records(after, limit))

    async def _sweep_often(self) -> None:
        with contextlib.suppress(TimeoutError):  # a start waits for all records to be told; both read all of them
            await asyncio.wait_for(self._is_listed.wait(), _LISTED_S)
        while True:
            try:
                if self._needs_sweep:
                    await self._sweep()
            except (CapacityError, PeerError) as error:
                self._needs_sweep = True
                log.warning("places on SSD cannot be freed", reason=error.message)
            await asyncio.sleep(_SYNC_S)

    @property
    def _limit_bytes(self) -> float:
        """What chunks may take: manifests wait for nothing, and compaction takes the records twice for a while."""
        records = max(_MANIFEST_SHARE * self._capacity_bytes, self._tables.physical_bytes())
        return self._capacity_bytes - 2 * (records + self._tables.file_bytes)

    # -- writing ------------------------------------------------------------------------------------------

    async def _write(self, call: Call, request: SsdWrite) -> SsdWritten:
        arena = self._attached()
        slot = _checked_slot(arena, request.slot)
        while True:
            try:
                async with self._writers:  # whoever hears no answer: a record is put, or its place is free
                    written = await _to_its_end(self._copy_out(arena, slot, request.generation))
            except PeerError as error:
                self._note_failure(error)
                raise
            if written is not None:
                self._write_failures = 0
                return written
            # RocksDB flushes behind its limit, or a start is not at its end. Nobody waits for a write.
            if time.monotonic() + 1.0 > call.deadline_s:
                raise CapacityError("the disk is too slow for what is saved")
            await asyncio.sleep(0.1)

    async def _copy_out(self, arena: Arena, slot: int, generation: int) -> SsdWritten | None:
        """Write the chunk in a slot. None: not possible right now."""
        geometry = arena.geometry
        chunk_id, tokens = arena.chunk_id(slot), arena.tokens(slot)
        parent_id, namespace = arena.parent_id(slot), arena.namespace(slot)
        checksums = tuple(arena.checksum(slot, layer) for layer in range(geometry.layers))

        def is_current() -> bool:
            return arena.is_current(slot, generation, chunk_id) and arena.state(slot) is SlotState.READY

        if not is_current():
            return SsdWritten(0, "stale")
        if not 0 < tokens <= geometry.chunk_tokens or not arena.is_sealed(slot):
            return SsdWritten(0, "corrupt")
        needed = stored_bytes(geometry, tokens)
        if shutil.disk_usage(self._tables.path).free < needed + _SPARE_DISK_BYTES:
            raise CapacityError(f"the disk of {self._tables.path} is full")
        if needed > self._limit_bytes:
            raise CapacityError(
                f"an SSD tier of {self._capacity_bytes} bytes is too small for chunks of {needed} bytes"
            )
        if not self._is_swept.is_set():
            self._is_listed.set()  # or is not going to be
            return None
        used = self._files.physical_bytes() - self._files.spare_bytes() + sum(self._writing.values())
        if used + needed > self._limit_bytes:
            return SsdWritten(0, "full")
        size = tokens * geometry.token_bytes
        place = self._files.take(geometry.slot_bytes)
        record = ChunkRecord(
            *(chunk_id, parent_id, namespace, geometry.digest(), tokens, size, place, time.time(), checksums)
        )
        self._writing[place] = needed
        useless: Place | None = place
        try:
            pieces = deque(_runs(geometry))

            def write() -> Literal["ok", "stale", "corrupt"]:
                """Piece by piece, until somebody wants the turn: to change threads costs more than most pieces do."""
                while pieces:
                    intact = write_layers(self._files, record, arena, slot, pieces.popleft())
                    if not is_current():
                        return "stale"
                    if not intact:
                        return "corrupt"
                    if self._disk.is_wanted:
                        break
                return "ok"

            while pieces:
                async with self._disk.turn(BACKGROUND):
                    outcome = await self._moving(write)
                if outcome != "ok":
                    return SsdWritten(0, outcome)
            async with self._leaving:
                async with self._turns.turn(BACKGROUND):
                    older = await self._in_thread(lambda: self._tables.put_chunk(record))
                useless = None
                await self._free([older] if older is not None else [])
            return SsdWritten(size, "ok")
        except Stalled:
            return None
        finally:
            if useless is not None:
                with contextlib.suppress(CapacityError, PeerError):  # a sweep frees it
                    await self._free([useless])
            del self._writing[place]

    def _note_failure(self, error: PeerError) -> None:
        """RocksDB stays in an error state once it is in one; a fresh process gets out of it."""
        self._error = error.message
        self._write_failures += 1
        log.error("the SSD refuses to be written", reason=error.message, failures=self._write_failures)
        if isinstance(error, DamagedDatabase):
            (self._tables.path / DAMAGED_MARK).touch()
            self.failed.set()
        elif self._write_failures >= _WRITE_FAILURES:
            self.failed.set()

    async def _delete(self, call: Call, request: SsdDelete) -> Ack:
        await self._patiently(lambda: self._remove(request.chunk_ids), call.deadline_s)
        return Ack()

    # -- looking ------------------------------------------------------------------------------------------

    async def _list(self, call: Call, request: SsdList) -> SsdPage:
        if not 1 <= request.limit <= 65536:
            raise InvalidRequest("a page has 1 to 65536 records", param="limit")
        with without_collections():
            async with self._turns.turn(URGENT):
                found = await self._in_thread(partial(self._records, request.after, request.limit))
            page = [
                SsdRecord(r.chunk_id, r.parent_id, r.namespace, r.tokens, r.size_bytes, r.written_s)
                for r in found
                if isinstance(r, ChunkRecord)
            ]
        damaged = [item for item in found if isinstance(item, bytes)]
        if damaged:
            log.error("damaged chunk records on SSD", records=len(damaged))
            self._corrupt_records += len(damaged)
            await self._forget([chunk_id for chunk_id in damaged if chunk_id])
        more = len(found) == request.limit
        if not more:
            self._is_listed.set()
        return SsdPage(page, more)

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
                    truncations=manifest.truncations,
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
            found = await self._in_thread(partial(self._records, request.after, _SCRUB_PAGE))
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
        """Whether every layer has its checksum. In small pieces: reads that somebody waits for go in between."""
        for layers in _ranges(record.layers, record.layer_stride):
            async with self._disk.turn(BACKGROUND):
                intact = await self._moving(partial(check_layers, self._files, record, layers))
            if not intact:
                return not await self._in_thread(lambda: self._is_unchanged(record))
        return True

    async def _scrub_manifests(self, request: SsdScrub) -> SsdScrubbed:
        page = ListManifests(request.after, request.limit_bytes)
        async with self._turns.turn(BACKGROUND):
            entries, damaged, more = await self._in_thread(lambda: self._page(page.after, page.limit_bytes))
        await self._forget_manifests(damaged)
        last = entries[-1].turn_key if more else b""
        return SsdScrubbed(len(entries) + len(damaged), 0, tuple(key or ROOT for key in damaged), last)

    # -- erasing ------------------------------------------------------------------------------------------

    async def _erase(self, call: Call, request: SsdErase) -> SsdErased:
        """Delete, and rewrite what held the records. What was evicted before is gone already, and where it lay punched.

        Manifests last: while they are there, an erasure that broke off can be asked for again.
        """
        tables = self._tables
        before = self._physical_bytes()
        deleted = await self._patiently(lambda: self._remove(request.chunk_ids), call.deadline_s)
        if self._needs_sweep:
            await self._sweep()

        def delete_manifests() -> int:
            there = [turn_key for turn_key in request.turn_keys if tables.has_manifest(turn_key)]
            for turn_key in there:
                tables.delete_manifest(turn_key)
            tables.flush()
            return len(there)

        async def in_turn() -> int:
            async with self._turns.turn(BACKGROUND):
                return await self._in_thread(delete_manifests)

        manifests = await self._patiently(in_turn, call.deadline_s)
        await self._moving(tables.compact_records)
        return SsdErased(
            *(tuple(record.chunk_id for record in deleted), sum(record.size_bytes for record in deleted)),
            *(manifests, before, self._physical_bytes()),
        )

    async def _patiently(self, work: Callable[[], Awaitable[T]], deadline_s: float) -> T:
        """Again where RocksDB stalls. Raises CapacityError: for too long, or the disk is full; PeerError."""
        while True:
            try:
                return await work()
            except Stalled as error:
                if time.monotonic() + 1.0 > deadline_s:
                    raise CapacityError("the disk is too slow for what is saved") from error
            await asyncio.sleep(0.1)

    def _physical_bytes(self) -> int:
        return self._tables.physical_bytes() + self._files.physical_bytes()

    async def _status(self, call: Call, request: SsdStatusRequest) -> SsdStatus:
        tables = self._tables
        return SsdStatus(
            self._physical_bytes(),
            tables.manifests,
            self._error,
            self._moved_aside,
            self._corrupt_records,
            _written_bytes(),
        )

    # -- keeping house ------------------------------------------------------------------------------------

    async def _sync_often(self) -> None:
        """What is acknowledged survives this process; what was synced survives the machine."""
        while True:
            await asyncio.sleep(_SYNC_S)
            if not (self._tables.has_unsynced or self._error):
                continue
            self._tables.has_unsynced = False  # what is put from here on may need the next one
            try:
                async with self._disk.turn(BACKGROUND):
                    await self._moving(self._files.sync)
                async with self._turns.turn(BACKGROUND):
                    await self._in_thread(self._tables.sync)
                self._error = ""
            except (CapacityError, PeerError) as error:
                self._tables.has_unsynced = True
                self._note_failure(PeerError(error.message))  # RocksDB does not take up again a sync that failed

    async def _limit_manifests(self) -> None:
        """Keep manifests to their share."""
        while True:
            await asyncio.sleep(_SYNC_S)
            try:
                if self._tables.manifest_bytes > self._capacity_bytes * _MANIFEST_SHARE:
                    async with self._turns.turn(BACKGROUND):
                        dropped = await self._in_thread(lambda: self._tables.drop_oldest_manifests(0.25))
                    log.info("oldest manifests dropped", manifests=dropped)
            except (CapacityError, PeerError) as error:
                log.warning("manifests cannot be dropped", reason=error.message)


async def _to_its_end(work: Awaitable[T]) -> T:
    """Await work that goes on to its end where the caller is cancelled, who is so only then."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


def _written_bytes() -> int:
    """What this process wrote by write(2) and its kin. 0: the kernel keeps no count."""
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


def _note_ready(arena: Arena, arrival: _Arrival, layers: range) -> None:
    """Have the reader see layers in their order, in whichever they came."""
    assert arrival.record is not None
    arrival.ahead[layers.start] = layers.stop
    while end := arrival.ahead.pop(arrival.ready, 0):
        for layer in range(arrival.ready, end):
            arena.set_layer_ready(arrival.slot, layer, arrival.record.checksums[layer])
        arrival.ready = end
        reach("layer.after")


def _pieces(arena: Arena, arrivals: Sequence[_Arrival]) -> Iterator[tuple[_Arrival, range]]:
    """The order in which layers are wanted: the first ones of all chunks first."""
    coming = [arrival for arrival in arrivals if not arrival.outcome]
    return ((arrival, layers) for layers in _runs(arena.geometry) for arrival in coming)


def _runs(geometry: Geometry) -> Iterator[range]:
    return _ranges(geometry.layers, geometry.layer_bytes)


def _ranges(layers: int, layer_bytes: int) -> Iterator[range]:
    """All layers, as many at a time as are moved in one piece."""
    at_once = max(1, _PIECE_BYTES // layer_bytes)
    return (range(first, min(first + at_once, layers)) for first in range(0, layers, at_once))


def stored_bytes(geometry: Geometry, tokens: int) -> int:
    """What a chunk takes in the chunk files."""
    layer_bytes = tokens * (geometry.key_bytes + geometry.value_bytes)
    return geometry.layers * -(-layer_bytes // PAGE_BYTES) * PAGE_BYTES


def _checked_slot(arena: Arena, slot: int) -> int:
    if slot >= arena.slots:
        raise InvalidRequest(f"there is no slot {slot}", param="slot")
    return slot


def open_tier(path: Path, capacity_bytes: int) -> tuple[Tables, ChunkFiles, str]:
    """The database, its chunk files, and where a damaged database was moved to ("" where it was sound).

    Raises as Tables and ChunkFiles.
    """
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
    try:
        return tables, ChunkFiles(path / CHUNK_FILES), moved_aside
    except BaseException:
        tables.close()
        raise


def _move_aside(path: Path) -> str:
    """Keep a damaged database beside, in place of one that was kept before: copies must not fill the disk.

    Not its chunk files: what is nobody's KV is of no use.
    """
    for older in path.parent.glob(f"{path.name}.damaged-*"):
        shutil.rmtree(older)
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns() // 1_000_000}")
    path.rename(aside)
    shutil.rmtree(aside / CHUNK_FILES, ignore_errors=True)
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
    tables, files, moved_aside = open_tier(arguments.database, arguments.capacity_bytes)
    endpoint = f"ipc://{arguments.run_dir}/ssd.sock"
    worker = SsdWorker(endpoint, tables, files, arguments.capacity_bytes, moved_aside)
    await worker.start()
    waits: list[asyncio.Task[Any]] = [asyncio.ensure_future(event.wait()) for event in (stop, worker.failed)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    try:
        await worker.stop()
    except (CapacityError, PeerError) as error:
        log.error("the last chunks could not be synced", reason=error.message)
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
