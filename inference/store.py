"""This process's side of the KV store: the connection to the kvdaemon, the arena, and who may write where.

Everything here may fail at any time, as the daemon may: a lookup then answers with a miss and its reason, a
save waits or gives up. No turn fails because of the store.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from monitoring.logs import get_logger
from protocol.arena import Arena, ClientLock, Geometry
from protocol.errors import CachedAttentionError, PeerError
from protocol.messages import (
    Ack,
    Acquire,
    Acquired,
    Commit,
    Committed,
    CommittedChunk,
    GetManifest,
    Manifest,
    ManifestReply,
    OpenStore,
    Quarantine,
    Release,
    Reserve,
    Reserved,
    ReservedSlot,
    SlotRef,
    StoreOpened,
    Unreserve,
    Welcome,
)
from protocol.rpc import Ask, Curve, RpcClient

log = get_logger(__name__)

# A turn waits this long for the daemon before it computes what it could have loaded.
_LOOKUP_S = 1.0
_SAVE_S = 5.0
_OPEN_S = 120.0  # the daemon may have to format and touch a large arena
UNAVAILABLE = "daemon_unavailable"
_RELEASE_S = 0.25  # an ended lease waits so long for a request that takes it along


@dataclass(frozen=True)
class Reservation:
    """An empty slot that this process may fill, as long as the session lasts."""

    slot: int
    generation: int
    session: int


@dataclass(frozen=True)
class Lease:
    lease_id: bytes
    chunks: Sequence[SlotRef]
    arena: Arena
    miss_reason: str


class Store:
    """One per process. Coroutines belong to the event loop; `arena`, `session` and `writing` are for any thread."""

    def __init__(
        self,
        endpoint: str,
        run_dir: Path,
        geometry: Geometry,
        model_namespace: bytes,
        curve: Curve | None = None,
        on_mapped: Callable[[Arena], object] = lambda arena: None,
    ) -> None:
        """on_mapped: called from some thread with an arena that is to be read and written from now on."""
        self.geometry = geometry
        self.arena: Arena | None = None
        # Counts how often the daemon may have forgotten us: reservations of an earlier session are void.
        self.session = 0
        self._namespace = model_namespace
        self._on_mapped = on_mapped
        self._ended: list[bytes] = []  # leases that the daemon was not told of
        self._lock = threading.Lock()
        self._client = RpcClient(
            endpoint, "inference", curve=curve, on_connected=self._open, on_disconnected=self._disconnected
        )
        self._alive = ClientLock(run_dir, self._client.client_id)

    @property
    def is_connected(self) -> bool:
        return self._client.is_connected

    @property
    def last_error(self) -> str:
        return self._client.last_error

    async def start(self, wait_s: float) -> None:
        """Connect. Comes back without a connection after wait_s: the daemon may come later."""
        await self._client.start()
        try:
            await self._client.wait_connected(wait_s)
        except PeerError as error:
            log.warning("no KV store yet; history is recomputed", reason=error.message)

    async def stop(self) -> None:
        await self._client.stop()
        self._alive.close()

    async def _open(self, welcome: Welcome, ask: Ask) -> None:
        # Nobody of ours may write into the arena any more when the daemon is told that we forgot our slots.
        await asyncio.to_thread(self._begin_session)
        opened = await ask(OpenStore(self.geometry.to_message(), self._namespace), StoreOpened, _OPEN_S)
        if self.arena is None or self.arena.arena_id != opened.arena_id:
            self.arena = await asyncio.to_thread(self._map, Path(opened.arena_path))
        log.info("KV store open", slots=opened.slots, arena=opened.arena_path)

    def _begin_session(self) -> None:
        with self._lock:
            self.session += 1

    def _map(self, path: Path) -> Arena:
        arena = Arena.open(path)
        for _ in arena.populate():
            pass
        self._on_mapped(arena)
        return arena

    def _disconnected(self) -> None:
        log.warning("KV store lost; history is recomputed until it is back")

    # -- reading ------------------------------------------------------------------------------------------

    async def get_manifest(self, turn_key: bytes, wait_ms: int = 0, trace: str = "") -> tuple[Manifest | None, str]:
        """The saved context of a turn, or None and the reason. wait_ms: for one that another worker is saving."""
        try:
            request = GetManifest(turn_key, wait_ms, trace)
            reply = await self._client.request(request, ManifestReply, _LOOKUP_S + wait_ms / 1e3)
        except PeerError:
            return None, UNAVAILABLE
        return reply.manifest, reply.reason

    async def acquire(self, request: Acquire) -> tuple[Lease | None, str, str]:
        """A lease on the longest available prefix (None where it is empty), and why it is no longer than that: the
        reason, and more about it in words."""
        request = replace(request, released=self._take_ended())
        try:
            reply = await self._client.request(request, Acquired, _LOOKUP_S)
        except PeerError:
            return None, UNAVAILABLE, ""
        if not reply.chunks or self.arena is None:
            self._ended.append(reply.lease_id)  # of nothing
            return None, reply.miss_reason, reply.miss_explained
        lease = Lease(reply.lease_id, reply.chunks, self.arena, reply.miss_reason)
        return lease, reply.miss_reason, reply.miss_explained

    async def release(self, lease_id: bytes) -> None:
        """Give a lease back: with the next request, if one comes in a moment."""
        self._ended.append(lease_id)
        await asyncio.sleep(_RELEASE_S)
        for ended in self._take_ended():
            await self._tell(Release(ended))

    def _take_ended(self) -> tuple[bytes, ...]:
        """Leases for a request to give back. Where it fails, they end by time."""
        ended, self._ended = tuple(self._ended), []
        return ended

    async def quarantine(self, ref: SlotRef) -> None:
        """Report a chunk whose bytes are not what was saved."""
        log.error("corrupt chunk in DRAM", slot=ref.slot, chunk=ref.chunk_id.hex())
        await self._tell(Quarantine(ref.slot, ref.generation, ref.chunk_id))

    async def _tell(self, message: Release | Quarantine | Unreserve) -> None:
        try:
            await self._client.request(message, Ack, _SAVE_S)
        except CachedAttentionError as error:  # the daemon finds out by itself, by time or by our death
            log.debug("the daemon missed a message", message=type(message).__name__, error=error.message)

    # -- writing ------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, reservation: Reservation) -> Iterator[Arena | None]:
        """Hold the right to write into a reserved slot; None where it is void. Keep it short: reopening waits."""
        with self._lock:
            yield self.arena if reservation.session == self.session else None

    async def reserve(self, count: int) -> list[Reservation]:
        """Up to `count` empty slots. Raises PeerError."""
        session = self.session
        reply = await self._client.request(Reserve(count), Reserved, _SAVE_S)
        return [Reservation(slot.slot, slot.generation, session) for slot in reply.slots]

    async def unreserve(self, reservations: list[Reservation]) -> None:
        """Give unused slots back."""
        slots = tuple(ReservedSlot(r.slot, r.generation) for r in reservations if r.session == self.session)
        if slots:
            await self._tell(Unreserve(slots))

    async def commit(
        self, chunks: list[CommittedChunk], manifest: Manifest | None, reserve: int, trace: str = ""
    ) -> tuple[tuple[bool, ...], list[Reservation]]:
        """Hand filled slots over, and the context that they complete; it is saved where all of them are accepted.

        Returns which were, and up to `reserve` empty slots. Raises PeerError.
        """
        session = self.session
        request = Commit(tuple(chunks), trace, manifest, reserve, self._take_ended())
        reply = await self._client.request(request, Committed, _SAVE_S)
        return reply.accepted, [Reservation(slot.slot, slot.generation, session) for slot in reply.slots]
