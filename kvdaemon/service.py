"""The front process: one event loop that owns all state and answers inference, gateway and command line."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal

from kvdaemon import adoption
from kvdaemon.catalog import Catalog
from kvdaemon.config import KvDaemonConfig
from kvdaemon.dram import DramTier
from kvdaemon.erasure import Eraser
from kvdaemon.fetch import Fetcher
from kvdaemon.index import Listing
from kvdaemon.manifests import ManifestStore
from kvdaemon.placement.policies import POLICIES
from kvdaemon.prefetch import Prefetcher
from kvdaemon.scrub import Scrubber
from kvdaemon.ssd.client import SsdLink
from kvdaemon.store import MAX_LEASE_MS, Store, intact
from kvdaemon.write_behind import WriteBehind
from monitoring import traces
from monitoring.kvdaemon_metrics import KvDaemonMetrics
from monitoring.logs import get_logger
from monitoring.registry import new_registry
from monitoring.status_server import Readiness, StatusServer
from protocol.arena import Geometry, client_is_alive, exclusive
from protocol.errors import CapacityError, ConfigError, InvalidRequest, PeerProtocolError, PeerUnavailable
from protocol.messages import (
    Ack,
    Acquire,
    Acquired,
    Anticipate,
    ChunkPlaces,
    Commit,
    Committed,
    DescribeStore,
    DescribeTurns,
    Erase,
    ErasureReceipt,
    FindTurns,
    FoundTurns,
    GetManifest,
    GetStatus,
    ListManifests,
    LocateChunks,
    Manifest,
    ManifestPage,
    ManifestReply,
    MeasureNamespaces,
    NamespacesMeasured,
    OpenStore,
    Quarantine,
    QueueOrder,
    Release,
    Reserve,
    Reserved,
    ReservedSlot,
    SaveManifest,
    ScrubReport,
    ScrubStore,
    StoreDescription,
    StoreOpened,
    StoreStatus,
    TierStatus,
    TurnsDescribed,
    Unreserve,
    tag_of,
)
from protocol.rpc import Call, Peer, RpcServer

log = get_logger(__name__)

_SWEEP_S = 0.5  # leases and clients are looked at this often
_SSD_START_S = 10.0  # a start waits this long for the SSD tier, then serves from DRAM
_MANIFEST_WAIT_S = 0.05  # a save waits this long for the disk
_LONGEST_MANIFEST_WAIT_MS = 10_000  # for one that somebody else is saving
_STOP_DRAIN_S = 5.0
_FORMAT_AGAIN_S = 3.0  # after an arena could not be made, clients that ask again are told so without another try


class KvDaemon:
    """The storage daemon. Start and stop it on one event loop. clock: seconds of any origin, for what is kept where."""

    def __init__(self, config: KvDaemonConfig, clock: Callable[[], float] = time.monotonic) -> None:
        registry = new_registry()
        self.metrics = KvDaemonMetrics(registry)
        self._config = config
        self._registry = registry
        self._locks = contextlib.ExitStack()
        self._clients: set[bytes] = set()  # that opened the store
        self._opening = asyncio.Lock()  # the arena is being replaced, or must not be
        self._tasks: set[asyncio.Task[Any]] = set()
        self._phase: Literal["starting", "serving", "stopping"] = "starting"
        self._arena_problem = ""
        self._arena_failed_s = float("-inf")
        self.ssd: SsdLink | None = None
        if config.ssd_bytes:
            self.ssd = SsdLink(
                config.run_dir,
                config.data_dir / "ssd",
                config.ssd_bytes,
                new_listing=lambda: self.store.index.new_listing(),
                on_listed=self._ssd_listed,
            )
        self.store = Store(POLICIES[config.policy](), self, self.metrics, config.verify, config.ssd_bytes, clock)
        self.manifests = ManifestStore(self.ssd)
        self.fetcher = Fetcher(self.store, self.ssd, self.metrics)
        self.prefetcher = Prefetcher(self.store, self.manifests, self.fetcher)
        self.write_behind = (
            WriteBehind(
                *(self.store, self.ssd, config.ssd_bytes, self.metrics, config.ssd_write_budget_bytes),
                on_written=self.prefetcher.look,
            )
            if self.ssd is not None
            else None
        )
        self.catalog = Catalog(self.store, self.manifests, self.ssd)
        self.scrubber = Scrubber(self.store, self.ssd, self.metrics, self._opening, config.scrub_bytes_per_s)
        self.eraser = Eraser(
            *(self.store, self.manifests, self.catalog, self.ssd, self._opening),
            put_aside=lambda: config.data_dir.glob("ssd.damaged-*"),
        )
        self._status_server: StatusServer | None = None
        self._server = RpcServer(
            config.endpoint,
            "kvdaemon",
            {
                OpenStore: self._open_store,
                GetManifest: self._get_manifest,
                SaveManifest: self._save_manifest,
                Acquire: self._acquire,
                Release: self._release,
                Quarantine: self._quarantine,
                Reserve: self._reserve,
                Unreserve: self._unreserve,
                Commit: self._commit,
                QueueOrder: self._queue_order,
                Anticipate: self._anticipate,
                GetStatus: self._get_status,
                MeasureNamespaces: self._measure_namespaces,
                DescribeTurns: self._describe_turns,
                DescribeStore: self._describe_store,
                FindTurns: self._find_turns,
                ListManifests: self._list_manifests,
                LocateChunks: self._locate_chunks,
                ScrubStore: self._scrub_store,
                Erase: self._erase,
            },
            curve=config.curve,
            on_peer_lost=self._peer_lost,
            observe=self._answered,
        )
        self._watch()

    # -- the SSD tier's state, as the store asks for it ------------------------------------------------------

    @property
    def can_read(self) -> bool:
        return self.ssd is not None and self.ssd.can_move_chunks

    @property
    def can_write(self) -> bool:
        return self.can_read and self.write_behind is not None and self.write_behind.can_write

    # -- start and stop -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Adopt what an earlier daemon left, then serve.

        Raises ConfigError: another daemon uses one of the directories, or a port or socket is taken.
        """
        config = self._config
        try:
            config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {error.filename}: {error.strerror}", param="data_dir") from error
        try:
            self._locks.enter_context(exclusive(config.data_dir / "kvdaemon.lock", "kvdaemon"))
            self._locks.enter_context(exclusive(config.run_dir / "kvdaemon.lock", "kvdaemon"))
            self._status_server = StatusServer(
                config.metrics_host, config.metrics_port, self._registry, self._readiness
            )
            await self._start_ssd()
            await self._adopt()
            if self.ssd is not None and not await self.ssd.wait_up(_SSD_START_S):
                log.warning("serving without the SSD tier for now", reason=self.ssd.problem)
            await self._server.start()
        except BaseException:
            await self.stop()
            raise
        self._keep(self._sweep)
        self._keep(self.prefetcher.run)
        self._keep(self.scrubber.run)
        self._keep(self.eraser.run)
        if self.write_behind is not None:
            self._keep(self.write_behind.run)
            self._keep(self.write_behind.keep_cap)
            self._keep(self.manifests.write_behind)
        self._phase = "serving"
        log.info("kvdaemon serves", endpoint=config.endpoint, dram_bytes=config.dram_bytes, ssd_bytes=config.ssd_bytes)

    async def stop(self) -> None:
        """Refuse new work, bring what is dirty to SSD within a limit, end the worker. The arena stays as it is."""
        was_serving, self._phase = self._phase == "serving", "stopping"
        await self._server.stop()
        if was_serving and self.write_behind is not None:
            await self.manifests.wait_saved(_STOP_DRAIN_S)
            await self.write_behind.drain(_STOP_DRAIN_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.ssd is not None:
            await self.ssd.stop()
        await self.fetcher.drain()
        if self.store.dram is not None:
            self.store.dram.arena.close()
        if self._status_server is not None:
            await asyncio.to_thread(self._status_server.close)
        self._locks.close()

    @property
    def metrics_port(self) -> int:
        assert self._status_server is not None
        return self._status_server.port

    async def _start_ssd(self) -> None:
        if self.ssd is None:
            return
        try:
            await self.ssd.start()
        except PeerUnavailable as error:
            raise ConfigError(error.message, param="run_dir") from error

    async def _adopt(self) -> None:
        """Take over the arena of an earlier daemon. One that cannot be trusted is deleted."""
        path = self._config.run_dir / "arena"
        try:
            arena = await asyncio.to_thread(adoption.open_left_behind, path, self._config.dram_bytes)
        except PeerProtocolError as error:
            log.error("the arena left behind is damaged; starting with an empty one", reason=error.message)
            self.metrics.corrupt("arena")
            path.unlink()
            return
        if arena is None:
            return
        findings = await asyncio.to_thread(adoption.survey, arena)
        if findings.damaged:
            log.error("damaged slots in the arena are freed", slots=findings.damaged)
            self.metrics.corrupt("adoption", findings.damaged)
        chunks = self.store.bind(DramTier(arena, findings.occupied), findings.ready)
        log.info("arena adopted", chunks=chunks, slots=arena.slots)
        if self.ssd is not None:
            await self.ssd.attach(arena)

    def _keep(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an endless loop beside the requests; a bug in it is logged, and the loop goes on."""

        async def guarded() -> None:
            while True:
                try:
                    await work()
                except Exception:
                    log.exception("a background loop failed and starts again")
                    await asyncio.sleep(1.0)

        self._track(asyncio.ensure_future(guarded()))

    def _track(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- opening the store --------------------------------------------------------------------------------

    async def _open_store(self, call: Call, request: OpenStore) -> StoreOpened:
        geometry = Geometry.from_message(request.geometry)
        client = call.peer.client_id
        if not client_is_alive(self._config.run_dir, client):
            raise InvalidRequest("take a ClientLock in the daemon's run_dir before opening the store")
        # Making an arena outlives the request that asked for it: its client asks again and finds it made.
        task = asyncio.ensure_future(self._open(client, geometry))
        self._track(task)
        await asyncio.shield(task)
        assert self.store.dram is not None
        arena = self.store.dram.arena
        return StoreOpened(str(arena.path.resolve()), arena.arena_id, arena.slots, MAX_LEASE_MS)

    async def _open(self, client: bytes, geometry: Geometry) -> None:
        async with self._opening:
            dram = self.store.dram
            if dram is None or dram.arena.geometry != geometry:
                in_use = (self._clients | dram.owners()) if dram is not None else frozenset()
                if any(client_is_alive(self._config.run_dir, other) for other in in_use - {client}):
                    raise CapacityError("the store is in use by a model with another KV geometry")
                await self._format(geometry)
            # It says with this that none of its threads writes into its old slots any more.
            freed = self.store.forget_reservations(client)
            self._clients.add(client)
            log.info("store opened", client=client.hex(), slots_given_back=freed)

    async def _format(self, geometry: Geometry) -> None:
        """Make the arena anew. Raises CapacityError, and there is no arena then."""
        if time.monotonic() - self._arena_failed_s < _FORMAT_AGAIN_S:
            raise CapacityError(self._arena_problem)
        if self.store.dram is not None:
            log.warning("the arena is formatted anew: another KV geometry", chunks=self.store.index.dram_chunks)
            if self.write_behind is not None:
                await self.write_behind.drain(_STOP_DRAIN_S)
            if self.ssd is not None:
                await self.ssd.attach(None)
            await self.fetcher.drain()
            old = self.store.dram.arena
            self.store.unbind()
            old.close()
        path = self._config.run_dir / "arena"
        try:
            arena = await asyncio.to_thread(adoption.make, path, geometry, self._config.dram_bytes)
        except CapacityError as error:
            self._arena_problem, self._arena_failed_s = error.message, time.monotonic()
            log.error("no arena", reason=error.message)
            raise
        self._arena_problem = ""
        self.store.bind(DramTier(arena))
        if self.ssd is not None:
            await self.ssd.attach(arena)
            # The worker starts again after it let go of an old arena; the client's first requests shall find it.
            await self.ssd.wait_up(_SSD_START_S)
        log.info("arena made", slots=arena.slots, bytes=arena.size_bytes)

    def _opened_by(self, call: Call) -> bytes:
        if call.peer.client_id not in self._clients:
            raise InvalidRequest("open the store first")
        return call.peer.client_id

    # -- requests -------------------------------------------------------------------------------------------

    def _acquire(self, call: Call, request: Acquire) -> Acquired:
        is_turn = call.peer.role != "cli"  # an export is none
        self.store.release_all(self._opened_by(call), request.released)
        if is_turn:
            partial = () if request.partial_id is None else (request.partial_id,)
            self.prefetcher.started((*request.chunk_ids, *partial))
        reply, reads = self.store.acquire(self._opened_by(call), request, time.monotonic(), is_turn=is_turn)
        if reads:
            self.fetcher.start(reads)
        if is_turn:
            self.catalog.hits.note(reply)
            self.prefetcher.look()
        return reply

    def _release(self, call: Call, request: Release) -> Ack:
        self.store.release(self._opened_by(call), request.lease_id)
        self.prefetcher.look()
        return Ack()

    def _reserve(self, call: Call, request: Reserve) -> Reserved:
        return Reserved(self._give_slots(self._opened_by(call), request.count))

    def _give_slots(self, client: bytes, count: int) -> tuple[ReservedSlot, ...]:
        slots = self.store.reserve(client, count)
        if len(slots) < count and self.write_behind is not None:
            self.write_behind.hurry()
        return tuple(slots)

    def _unreserve(self, call: Call, request: Unreserve) -> Ack:
        self.store.unreserve(self._opened_by(call), request.slots)
        return Ack()

    def _commit(self, call: Call, request: Commit) -> Committed | Awaitable[Committed]:
        client = self._opened_by(call)
        accepted = self.store.commit(client, request.chunks)
        if self.write_behind is not None:
            self.write_behind.look()
        if request.released:
            self.store.release_all(client, request.released)
            self.prefetcher.look()
        if request.manifest is not None and all(accepted):
            return self._complete(client, request, request.manifest)
        return self._committed(client, request, accepted)

    async def _complete(self, client: bytes, request: Commit, manifest: Manifest) -> Committed:
        """All chunks of the context are here."""
        started_s = time.monotonic()
        await self._keep_context(manifest)
        self._trace(SaveManifest, request.trace, started_s)
        return self._committed(client, request, (True,) * len(request.chunks))

    def _committed(self, client: bytes, request: Commit, accepted: tuple[bool, ...]) -> Committed:
        return Committed(accepted, self._give_slots(client, request.reserve) if request.reserve else ())

    async def _quarantine(self, call: Call, request: Quarantine) -> Ack:
        """A reader's word is checked: it may itself have copied wrongly, and chunks are shared."""
        self._opened_by(call)
        async with self._opening:
            chunk = self.store.resident(request.slot, request.generation, request.chunk_id)
            if chunk is None or self.store.dram is None:
                return Ack()  # gone already
            if await asyncio.to_thread(intact, self.store.dram.arena, request.slot):
                return Ack()
            if self.store.resident(request.slot, request.generation, request.chunk_id) is chunk:
                log.error("a chunk in DRAM is corrupt", chunk=request.chunk_id.hex())
                self.store.quarantine(chunk)
        return Ack()

    async def _get_manifest(self, call: Call, request: GetManifest) -> ManifestReply:
        return await self.manifests.get(request.turn_key, min(request.wait_ms, _LONGEST_MANIFEST_WAIT_MS) / 1e3)

    async def _save_manifest(self, call: Call, request: SaveManifest) -> Ack:
        await self._keep_context(request.manifest)
        return Ack()

    async def _keep_context(self, manifest: Manifest) -> None:
        self.store.turn_ended(manifest)
        await self.manifests.save(manifest, _MANIFEST_WAIT_S)

    def _queue_order(self, call: Call, request: QueueOrder) -> Ack:
        self.prefetcher.follow(request.turn_keys)
        return Ack()

    async def _anticipate(self, call: Call, request: Anticipate) -> Ack:
        reply = await self.manifests.get(request.turn_key)
        if reply.manifest is not None:
            self.store.expected(reply.manifest, request.in_s)
            if request.fetch:
                self.prefetcher.anticipate(request.turn_key, reply.manifest.chunk_ids, request.in_s)
        return Ack()

    async def _measure_namespaces(self, call: Call, request: MeasureNamespaces) -> NamespacesMeasured:
        return await self.catalog.measure(request.namespaces)

    async def _describe_turns(self, call: Call, request: DescribeTurns) -> TurnsDescribed:
        return await self.catalog.describe_turns(request.turn_keys)

    def _get_status(self, call: Call, request: GetStatus) -> StoreStatus:
        problem = self._problem()
        return StoreStatus(
            "degraded" if problem else "ok",
            problem,
            TierStatus(self._dram_capacity(), self._dram_bytes(), self.store.index.dram_chunks),
            TierStatus(self._config.ssd_bytes, self.store.index.ssd_bytes, self.store.index.ssd_chunks),
            leases=len(self.store.leases),
            reserved_slots=self._reserved_slots(),
            manifests=len(self.manifests),
            prefetch_window=self.store.placement.prefetch_window,
            eviction_window=self.store.placement.eviction_window,
        )

    # -- requests of the command line -------------------------------------------------------------------------

    async def _describe_store(self, call: Call, request: DescribeStore) -> StoreDescription:
        return await self.catalog.describe()

    async def _find_turns(self, call: Call, request: FindTurns) -> FoundTurns:
        return await self.catalog.find(request.prefix, request.limit)

    async def _list_manifests(self, call: Call, request: ListManifests) -> ManifestPage:
        return await self.catalog.page(request.after, request.limit_bytes)

    def _locate_chunks(self, call: Call, request: LocateChunks) -> ChunkPlaces:
        return ChunkPlaces(tuple(self.catalog.locate(chunk_id) for chunk_id in request.chunk_ids))

    async def _scrub_store(self, call: Call, request: ScrubStore) -> ScrubReport:
        return await self.scrubber.everything(call.send)

    async def _erase(self, call: Call, request: Erase) -> ErasureReceipt:
        # To its end, whether or not anybody waits for the receipt; it is in the log too.
        task = asyncio.ensure_future(self.eraser.erase(request.turn_key, request.keep))
        self._track(task)
        return await asyncio.shield(task)

    # -- clients, time, health --------------------------------------------------------------------------------

    def _peer_lost(self, peer: Peer) -> None:
        self._bury_if_dead(peer.client_id)

    async def _sweep(self) -> None:
        while True:
            self.store.expire(time.monotonic())
            owners = self.store.dram.owners() if self.store.dram is not None else frozenset()
            for client in self._clients | owners:
                self._bury_if_dead(client)
            await asyncio.sleep(_SWEEP_S)

    def _bury_if_dead(self, client: bytes) -> None:
        """Silence alone proves nothing: a stopped process may go on writing. The kernel's lock does."""
        if not client_is_alive(self._config.run_dir, client):
            self.store.client_died(client)
            self._clients.discard(client)

    async def _ssd_listed(self, listing: Listing) -> None:
        for _ in self.store.merge_listing(listing):
            await asyncio.sleep(0)  # whoever hears nothing for long believes that we died
        self.metrics.worker_started()

    def _problem(self) -> str:
        """Why the store is degraded; empty where it is not. From any thread."""
        if self._arena_problem:
            return self._arena_problem
        if self.ssd is None or self.write_behind is None:
            return ""
        return self.ssd.problem or self.write_behind.problem

    def _readiness(self) -> Readiness:
        if self._phase != "serving":
            return Readiness(False, "starting" if self._phase == "starting" else "stopping")
        problem = self._problem()
        return Readiness(True, "degraded" if problem else "ok", problem)

    # -- metrics and traces --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        index, metrics = self.store.index, self.metrics
        metrics.watch_tier("dram", lambda: index.dram_chunks, self._dram_bytes, self._dram_capacity)
        metrics.watch_tier(
            "ssd", lambda: index.ssd_chunks, lambda: index.ssd_bytes, lambda: float(self._config.ssd_bytes)
        )
        metrics.watch("leases", "Open leases", lambda: len(self.store.leases))
        metrics.watch("reserved_slots", "Slots being filled by inference", self._reserved_slots)
        metrics.watch("manifests", "Saved contexts in memory", lambda: len(self.manifests))
        # Without an SSD tier nothing waits for one.
        metrics.watch(
            "write_behind_queue",
            "Chunks in DRAM that are not on SSD yet",
            lambda: index.dirty_chunks if self.write_behind is not None else 0,
        )
        metrics.watch("manifest_queue", "Saved contexts not on SSD yet", lambda: self.manifests.waiting)
        metrics.watch(
            "ssd_physical_bytes",
            "What the SSD tier takes on the disk",
            lambda: self.write_behind.physical_bytes if self.write_behind is not None else 0,
        )
        metrics.watch(
            "ssd_write_budget_bytes",
            "What may be written to the SSD now; below 0: overdrawn",
            lambda: self.write_behind.budget_bytes if self.write_behind is not None else 0,
        )
        metrics.watch("degraded", "1 while a tier is missing", lambda: float(bool(self._problem())))

    def _answered(self, request: object, seconds: float) -> None:
        self.metrics.answered(type(request).__name__, seconds)
        self._trace(type(request), getattr(request, "trace", ""), time.monotonic() - seconds)

    @staticmethod
    def _trace(request: type, trace: str, began_s: float) -> None:
        if trace:
            traces.begin(tag_of(request), trace, began_s).end()

    def _dram_capacity(self) -> int:
        dram = self.store.dram
        return dram.slots * dram.arena.geometry.slot_bytes if dram is not None else self._config.dram_bytes

    def _dram_bytes(self) -> int:
        dram = self.store.dram
        return (dram.slots - dram.free_slots) * dram.arena.geometry.slot_bytes if dram is not None else 0

    def _reserved_slots(self) -> int:
        return self.store.dram.reserved_slots if self.store.dram is not None else 0


def run(config: KvDaemonConfig) -> int:
    """Serve until SIGTERM or SIGINT, stop in order, return 0. Raises ConfigError before serving."""
    return asyncio.run(_serve(config))


async def _serve(config: KvDaemonConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    daemon = KvDaemon(config)
    starting = asyncio.ensure_future(daemon.start())
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # a signal during a long adoption
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        stopped.cancel()
        return 0
    if starting.exception() is not None:
        stopped.cancel()
    starting.result()
    await stopped
    await daemon.stop()
    return 0
