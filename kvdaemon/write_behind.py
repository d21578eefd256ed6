"""Write-behind: committed chunks go to SSD, oldest first, and the SSD tier stays within its cap.

Beside a model that has all cores a write costs the computing, mostly by waking up two processes and several threads.
So chunks wait for others to be written with, and for the prompt that they are part of to be computed: until none has
come for a moment, unless there are many, or some have waited long, or we stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from kvdaemon.index import Chunk
from kvdaemon.placement.admission import WriteBudget
from kvdaemon.ssd.client import SsdLink
from kvdaemon.store import Store
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.logs import get_logger
from protocol.errors import CachedAttentionError, CapacityError, PeerError

log = get_logger(__name__)

_IN_FLIGHT = 4
_QUIET_S = 0.2  # chunks wait until no other has come for so long
_GATHER_S = 2.0  # and the first one no longer than that
_GATHER_SHARE = 1 / 8  # of the slots: so many chunks wait no longer, for what is not on SSD holds its slot
_REST_S = 1.0  # chunks that nobody told us of are looked for this often
_IDLE_S = 0.05
_SLOW_S = 5.0  # a write that takes longer: the disk is too slow, and DRAM goes on without it
_BACKOFF_S = (0.5, 10.0)
_CAP_CHECK_S = 0.1
_STATUS_S = 1.0
# Of the cap, for chunks. The worker says "full" before that where records and manifests take more than usual.
_HIGH, _LOW = 0.94, 0.93
_DELETE_AT_ONCE = 64


class WriteBehind:
    """Two loops beside the service. One event loop owns it."""

    def __init__(
        self,
        store: Store,
        ssd: SsdLink,
        capacity_bytes: int,
        metrics: KvDaemonMetrics,
        budget_bytes_per_day: int | None = None,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        """on_written: called when chunks were written, and may leave DRAM from then on."""
        self.physical_bytes = 0
        self._problem = ""  # of the latest write
        self._worker_error = ""  # since RocksDB's last sync
        self._is_full = False  # says the worker: chunks must go before another can come
        self._committed = asyncio.Event()  # chunks, since we looked
        self._written = asyncio.Event()  # to the tier, since its cap was looked at
        self._is_draining = False
        self._is_short = False  # somebody was refused a slot
        self._under_way: dict[bytes, float] = {}  # chunk id -> when its write began
        self._evicted: tuple[bytes, ...] = ()  # from the books of the SSD tier, and not yet deleted there
        self._evicted_in = 0  # the worker's start of this number
        self._store = store
        self._ssd = ssd
        self._capacity_bytes = capacity_bytes
        self._metrics = metrics
        self._on_written = on_written
        self._budget = WriteBudget(budget_bytes_per_day, time.monotonic()) if budget_bytes_per_day else None
        self.disk_written_bytes = 0  # by all workers of this daemon
        # Of the worker's start of this number, as last heard.
        self._corrupt_seen = (0, 0)
        self._written_seen = (0, 0)

    @property
    def problem(self) -> str:
        """Why nothing can be written; empty while it can. From any thread."""
        began = tuple(self._under_way.values())
        if began and time.monotonic() - min(began) > _SLOW_S:
            return f"the disk is too slow: a write takes longer than {_SLOW_S:.0f} s"
        return self._problem or self._worker_error

    @property
    def can_write(self) -> bool:
        """Whether dirty chunks get to SSD before long."""
        return not self.problem and self._has_room()

    async def run(self) -> None:
        """Write dirty chunks, a few at a time, for ever."""
        pause_s = _BACKOFF_S[0]
        async with asyncio.TaskGroup() as group:
            writes: set[asyncio.Task[None]] = set()
            while True:
                if not writes:
                    await self._gather()
                can_write = self._ssd.can_move_chunks and self._has_room() and not (writes and self.problem)
                chunks = self._store.next_dirty(_IN_FLIGHT - len(writes)) if can_write else []
                writes |= {group.create_task(self._write(chunk)) for chunk in chunks if self._admit(chunk)}
                if not writes:
                    await self._wait_for_chunks(0 if chunks else _IDLE_S)
                    continue
                done, writes = await asyncio.wait(writes, timeout=_IDLE_S, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    continue
                self._on_written()
                if not self.problem:
                    pause_s = _BACKOFF_S[0]
                elif not writes:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _BACKOFF_S[1])

    def look(self) -> None:
        """Chunks were committed."""
        self._committed.set()

    def hurry(self) -> None:
        """There are no slots to give, or too few: what holds some until it is on SSD is to be written now."""
        self._is_short = True
        self._committed.set()

    async def _gather(self) -> None:
        """Wait for chunks to write, and for more to come."""
        index = self._store.index
        while not index.dirty_chunks:
            await self._wait_for_chunks(_REST_S)
        until_s, dirty = time.monotonic() + _GATHER_S, 0
        while not self._is_pressed and dirty != index.dirty_chunks and (left_s := until_s - time.monotonic()) > 0:
            dirty = index.dirty_chunks
            await self._wait_for_chunks(min(left_s, _QUIET_S))
        self._is_short = False

    @property
    def _is_pressed(self) -> bool:
        """Whether what is dirty should be written at once."""
        dram = self._store.dram
        are_many = dram is None or self._store.index.dirty_chunks >= dram.slots * _GATHER_SHARE
        return are_many or self._is_short or self._is_draining

    async def _wait_for_chunks(self, timeout_s: float) -> None:
        self._committed.clear()
        await _wait(self._committed, timeout_s)

    def _admit(self, chunk: Chunk) -> bool:
        """Whether the budget allows to write this chunk now."""
        if self._budget is None or self._store.dram is None:
            return True
        size = chunk.tokens * self._store.dram.arena.geometry.token_bytes
        if self._budget.admits(size, reused=chunk.reused, now_s=time.monotonic()):
            return True
        self._store.decline(chunk)
        return False

    @property
    def budget_bytes(self) -> float:
        """What the budget allows to write now; infinite without one."""
        return self._budget.level_bytes(time.monotonic()) if self._budget is not None else float("inf")

    async def drain(self, timeout_s: float) -> bool:
        """Wait until every dirty chunk is on SSD. False: it was not possible in time."""
        deadline_s = time.monotonic() + timeout_s
        self._is_draining = True
        self.look()
        try:
            while self._store.index.dirty_chunks:
                if time.monotonic() > deadline_s or self.problem or not self._ssd.can_move_chunks:
                    return False
                await asyncio.sleep(_IDLE_S)
            return True
        finally:
            self._is_draining = False

    async def _write(self, chunk: Chunk) -> None:
        generation = chunk.generation
        started = time.monotonic()
        self._store.index.begin_write(chunk)
        self._under_way[chunk.chunk_id] = started
        try:
            written = await self._ssd.write(chunk.slot, generation)
        except CapacityError as error:
            self._report(error.message)
            return
        except PeerError as error:
            if self._ssd.is_up:  # else the link says so itself
                self._report(f"the SSD tier refuses to write: {error.message}")
            return
        except CachedAttentionError as error:
            self._report(error.message)
            return
        finally:
            self._store.index.end_write(chunk)
            del self._under_way[chunk.chunk_id]
        if written.outcome == "ok":
            if self._problem:
                log.info("writing to SSD again")
                self._problem = ""
            seconds = time.monotonic() - started
            if seconds > _SLOW_S:
                log.warning("the disk was too slow", seconds=round(seconds, 1), queue=self._store.index.dirty_chunks)
            self._metrics.saved_to_ssd(seconds)
            self._store.written_behind(chunk, written.bytes)
            self._written.set()
        elif written.outcome == "full":
            self._is_full = True
            self._written.set()
            await asyncio.sleep(_CAP_CHECK_S)
        elif chunk.generation == generation and self._store.index.get(chunk.chunk_id) is chunk:
            # The slot is still this chunk's, as far as we know, but it does not hold what was committed.
            log.error("a chunk in DRAM is corrupt", chunk=chunk.chunk_id.hex(), outcome=written.outcome)
            self._store.quarantine(chunk)

    def _report(self, problem: str) -> None:
        if not self._problem:
            log.error("SSD tier cannot be written; DRAM goes on", reason=problem)
        self._problem = problem

    def _has_room(self) -> bool:
        """Whether the next chunks fit under the cap."""
        return max(self.physical_bytes, self._store.index.ssd_bytes) < self._capacity_bytes

    # -- the cap ------------------------------------------------------------------------------------------

    async def keep_cap(self) -> None:
        """Look at the tier's size as it grows, and evict where it nears the cap, for ever."""
        asked_s = float("-inf")
        while True:
            await _wait(self._written, _STATUS_S)
            await asyncio.sleep(_CAP_CHECK_S)
            self._written.clear()
            if not self._ssd.is_up:
                continue
            try:
                await self._keep_cap_once()
                if time.monotonic() - asked_s > _STATUS_S:
                    asked_s = time.monotonic()
                    await self._ask_status()
            except CachedAttentionError as error:
                log.warning("the SSD tier cannot be kept under its cap", reason=error.message)

    async def _ask_status(self) -> None:
        status = await self._ssd.status()
        self.physical_bytes = status.physical_bytes
        self._worker_error = status.error
        start, before = self._corrupt_seen
        if start != self._ssd.starts:
            before = 0
            if status.moved_aside:
                self._metrics.corrupt("ssd_database")
        self._metrics.corrupt("ssd_record", max(0, status.corrupt_records - before))
        self._corrupt_seen = (self._ssd.starts, status.corrupt_records)
        start, before = self._written_seen
        written = status.written_bytes - (before if start == self._ssd.starts else 0)
        self._written_seen = (self._ssd.starts, status.written_bytes)
        self.disk_written_bytes += written
        self._metrics.written_to_disk(written)
        if self._budget is not None:
            self._budget.wrote(self.disk_written_bytes, time.monotonic())

    async def _keep_cap_once(self) -> None:
        await self._delete(())  # what could not be deleted before
        index = self._store.index
        high = self._capacity_bytes * _HIGH
        if self._is_full:  # what records and partly used pages add to the chunks is more than we thought
            high = min(high, float(index.ssd_bytes))
        elif index.ssd_bytes <= high:
            return
        self._is_full = False
        low = high * _LOW / _HIGH
        while index.ssd_bytes > low:
            victims = self._store.evict_from_ssd(int(index.ssd_bytes - low), limit=_DELETE_AT_ONCE)
            if not victims:
                return
            await self._delete(victims)

    async def _delete(self, victims: Sequence[bytes]) -> None:
        """Delete chunks that the books have let go of. Those that a full disk keeps are deleted with the next ones."""
        if self._evicted_in != self._ssd.starts:  # the worker is a new one, and the books say what it has
            self._evicted, self._evicted_in = (), self._ssd.starts
        self._evicted += tuple(victims)
        if self._evicted:
            await self._ssd.delete(self._evicted)
            self._evicted = ()


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that arrives together with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
