"""The front's link to its SSD worker: starts it, watches it, starts it again, and talks to it.

    down ──spawn──▶ starting ──hello, arena attached, chunks listed──▶ up ──died, silent or wrong──▶ down (backoff)

Whenever a request to the worker fails for want of an answer, the worker is killed and reaped *before* the failure is
reported: whoever hears of it may free the slots that the worker was filling.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvdaemon.failpoints import reach
from kvdaemon.garbage import without_collections
from kvdaemon.index import Listing
from monitoring.logs import get_logger
from protocol.arena import Arena
from protocol.errors import CachedAttentionError, PeerError, PeerProtocolError, PeerTimeout, PeerUnavailable
from protocol.messages import (
    Ack,
    AttachArena,
    FindTurns,
    FoundTurns,
    ListManifests,
    Manifest,
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
    SsdReadChunk,
    SsdReadDone,
    SsdScrub,
    SsdScrubbed,
    SsdStatus,
    SsdStatusRequest,
    SsdWrite,
    SsdWritten,
)
from protocol.rpc import RpcClient

M = TypeVar("M")
log = get_logger(__name__)

_START_S = 120.0  # opening a large database after a crash: its log is read
_STOP_S = 10.0  # the last flush
_READ_S = 60.0
_WRITE_S = 60.0
_CONTROL_S = 10.0
_SCRUB_S = 300.0  # a page of it, behind everything that somebody waits for
_ERASE_S = 3600.0  # compaction rewrites what held records and manifests
_BACKOFF_S = (0.2, 10.0)  # first, longest
_STEADY_S = 30.0  # a worker that lived this long was no failed start
_PAGE_RECORDS = 4096


class SsdLink:
    """One per daemon, where there is an SSD tier. One event loop owns it.

    new_listing, on_listed: after each start of a worker and before it is used, every record of the database goes into a
    new listing, and that to on_listed.
    """

    def __init__(
        self,
        run_dir: Path,
        database: Path,
        capacity_bytes: int,
        *,
        new_listing: Callable[[], Listing],
        on_listed: Callable[[Listing], Awaitable[None]],
    ) -> None:
        self.problem = "the SSD worker is starting"  # why it is not up; empty while it is
        self.starts = 0
        self.pid: int | None = None
        self._run_dir = run_dir
        self._database = database
        self._capacity_bytes = capacity_bytes
        self._new_listing = new_listing
        self._on_listed = on_listed
        self._arena: Arena | None = None
        self._attached_id = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._client: RpcClient | None = None
        self._exited = asyncio.Event()
        self._lost = asyncio.Event()  # the worker exited or is deaf: it must go
        self._up = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    @property
    def can_move_chunks(self) -> bool:
        """Whether reads and writes are possible now: the worker is up and maps the arena."""
        return self.is_up and self._arena is not None and self._attached_id == self._arena.arena_id

    async def start(self) -> None:
        """Begin to keep a worker running. Raises PeerUnavailable: an earlier daemon's worker does not go away."""
        await _wait_unlocked(self._run_dir / "ssd.lock")
        self._supervisor = asyncio.ensure_future(self._supervise())

    async def wait_up(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._up.wait(), timeout_s)
        return self.is_up

    async def stop(self) -> None:
        """Have the worker flush and end; kill it where it does not."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._end(signal.SIGTERM)

    # -- what the worker does for us -----------------------------------------------------------------------

    async def attach(self, arena: Arena | None) -> None:
        """Have this worker, and every later one, map `arena`. None: wait until no worker maps any."""
        self._arena = arena
        if arena is None:
            if self._attached_id:
                await self._end(signal.SIGTERM)
            return
        if self.is_up:
            with contextlib.suppress(PeerError):  # the next worker gets it at its start
                await self._attach_now(arena)

    async def read(self, chunks: Sequence[SsdReadChunk], *, background: bool) -> tuple[str, ...]:
        """Bring chunks into their slots. Returns one outcome per chunk. Raises PeerError: no worker touches them."""
        reply = await self._ask(SsdRead(tuple(chunks), background), SsdReadDone, _READ_S)
        if len(reply.outcomes) != len(chunks):
            raise PeerProtocolError("the SSD worker answered for other chunks than asked")
        return reply.outcomes

    async def write(self, slot: int, generation: int) -> SsdWritten:
        """Raises CapacityError: the disk is full or too slow; PeerError."""
        reach("write_behind.before")
        written = await self._ask(SsdWrite(slot, generation), SsdWritten, _WRITE_S)
        reach("write_behind.after")
        return written

    async def delete(self, chunk_ids: Sequence[bytes]) -> None:
        reach("ssd_evict.before")
        await self._ask(SsdDelete(tuple(chunk_ids)), Ack, _WRITE_S)
        reach("ssd_evict.after")

    async def put_manifest(self, manifest: Manifest) -> None:
        """Raises CapacityError: the disk is full; PeerError."""
        reach("write_manifest.before")
        await self._ask(SsdPutManifest(manifest), Ack, _CONTROL_S)
        reach("write_manifest.after")

    async def get_manifest(self, turn_key: bytes, timeout_s: float) -> ManifestReply:
        """Raises PeerTimeout: the worker is busy, and lives on; PeerError."""
        return await self._ask_patiently(SsdGetManifest(turn_key), ManifestReply, timeout_s)

    async def status(self) -> SsdStatus:
        return await self._ask(SsdStatusRequest(), SsdStatus, _CONTROL_S)

    async def find_turns(self, prefix: str, limit: int) -> FoundTurns:
        """Keys of the saved turns that begin with these hexadecimal digits. Raises as get_manifest."""
        return await self._ask_patiently(FindTurns(prefix, limit), FoundTurns, _CONTROL_S)

    async def list_manifests(self, after: bytes, limit_bytes: int) -> ManifestPage:
        """Raises as get_manifest."""
        return await self._ask_patiently(ListManifests(after, limit_bytes), ManifestPage, _READ_S)

    async def scrub(self, what: Literal["chunks", "manifests"], after: bytes) -> SsdScrubbed:
        """Verify a page of records. Raises as get_manifest."""
        return await self._ask_patiently(SsdScrub(what, after), SsdScrubbed, _SCRUB_S)

    async def erase(self, chunk_ids: Sequence[bytes], turn_keys: Sequence[bytes]) -> SsdErased:
        """Delete, and compact what held it. Raises CapacityError: the disk is full, or too slow; as get_manifest."""
        reach("ssd_erase.before")
        erased = await self._ask_patiently(SsdErase(tuple(chunk_ids), tuple(turn_keys)), SsdErased, _ERASE_S)
        reach("ssd_erase.after")
        return erased

    async def _ask_patiently(self, message: Any, expect: type[M], timeout_s: float) -> M:
        """Ask for something that may take long. The worker is not ended where it takes longer; heartbeats watch it."""
        if self._client is None or not self.is_up:
            raise PeerUnavailable(self.problem)
        return await self._client.request(message, expect, timeout_s)

    async def _ask(self, message: Any, expect: type[M], timeout_s: float) -> M:
        if self._client is None or not self.is_up:
            raise PeerUnavailable(self.problem)
        process = self._process
        try:
            return await self._client.request(message, expect, timeout_s)
        except (PeerUnavailable, PeerTimeout) as error:
            if process is not None and process is self._process:
                log.warning("the SSD worker does not answer", reason=error.message)
                # One that broke the connection may be ending in order; one that is deaf will not.
                await self._end(signal.SIGTERM if isinstance(error, PeerUnavailable) else signal.SIGKILL)
            raise

    # -- keeping it alive ----------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        pause_s = _BACKOFF_S[0]
        while True:
            started = time.monotonic()
            self._spawn()
            try:
                await self._greet()
                self.problem = ""
                self._up.set()
                log.info("SSD tier up", pid=self.pid)
                await self._lost.wait()
                self.problem = "the SSD worker died"
            except CachedAttentionError as error:
                self.problem = f"the SSD worker does not start: {error.message}"
            await self._end(signal.SIGTERM)
            log.warning("SSD tier down", reason=self.problem)
            if time.monotonic() - started > _STEADY_S:
                pause_s = _BACKOFF_S[0]
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _BACKOFF_S[1])

    def _spawn(self) -> None:
        """Start a worker. From the loop's own thread: the worker dies with the thread that started it."""
        self._exited, self._lost = asyncio.Event(), asyncio.Event()
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvdaemon.ssd.worker"),
                *("--run-dir", str(self._run_dir), "--database", str(self._database)),
                *("--capacity-bytes", str(self._capacity_bytes), "--parent", str(os.getpid()), "--log-level", level),
            ],
            stdin=subprocess.DEVNULL,
            # Ctrl-C in a terminal goes to the whole group; the worker ends when the front has nothing left for it.
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.starts += 1
        pidfd = os.pidfd_open(self._process.pid)
        exited, lost = self._exited, self._lost

        def on_exit() -> None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
            exited.set()
            lost.set()

        asyncio.get_running_loop().add_reader(pidfd, on_exit)

    async def _greet(self) -> None:
        """Connect, attach, list. Raises CachedAttentionError: the worker died or does not answer."""
        # A worker that lost its connection may still write into slots: it must be gone before they are freed.
        client = RpcClient(f"ipc://{self._run_dir}/ssd.sock", "kvdaemon", on_disconnected=self._lost.set)
        self._client = client
        await client.start()
        connected = asyncio.ensure_future(client.wait_connected(_START_S))
        exited = asyncio.ensure_future(self._exited.wait())
        await asyncio.wait((connected, exited), return_when=asyncio.FIRST_COMPLETED)
        exited.cancel()
        if not connected.done():
            connected.cancel()
            raise PeerUnavailable("it ended")
        connected.result()
        with without_collections():
            await self._on_listed(await self._list(client))
        while self._arena is not None and self._attached_id != self._arena.arena_id:
            await self._attach_now(self._arena)

    async def _list(self, client: RpcClient) -> Listing:
        """All records. The worker reads a page while the one before it is taken in."""

        def ask(after: bytes) -> asyncio.Future[SsdPage]:
            return asyncio.ensure_future(client.request(SsdList(after, _PAGE_RECORDS), SsdPage, _READ_S))

        listing = self._new_listing()
        coming: asyncio.Future[SsdPage] | None = ask(b"")
        while coming is not None:
            page = await coming
            coming = ask(page.records[-1].chunk_id) if page.more and page.records else None
            await asyncio.sleep(0)  # it is sent
            listing.add(page.records)
        return listing

    async def _attach_now(self, arena: Arena) -> None:
        assert self._client is not None
        await self._client.request(AttachArena(str(arena.path), arena.arena_id), Ack, _CONTROL_S)
        self._attached_id = arena.arena_id

    async def _end(self, number: signal.Signals) -> None:
        """End the worker, if any, and reap it. Comes back when it is gone."""
        process, client = self._process, self._client
        self._up.clear()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            try:
                await asyncio.wait_for(self._exited.wait(), _STOP_S)
            except TimeoutError:
                process.kill()
                await self._exited.wait()
            process.wait()
        if client is not None:
            await client.stop()
        if process is self._process:
            self._process = self._client = self.pid = None
            self._attached_id = b""


async def _wait_unlocked(path: Path) -> None:
    """Wait for the worker of a daemon that died: it ends by itself, but may be busy with its last flush."""
    deadline_s = time.monotonic() + _STOP_S
    while _is_locked(path):
        if time.monotonic() > deadline_s:
            raise PeerUnavailable(f"an earlier SSD worker still holds {path}")
        await asyncio.sleep(0.05)


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
