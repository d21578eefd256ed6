"""The command line as a client of a running kvdaemon: asks, and moves KV between its arena and this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from cli.settings import Settings
from kvdaemon.archive import Contents, Layers
from protocol.arena import Arena, ClientLock, Geometry, layer_checksum
from protocol.errors import CachedAttentionError, CapacityError, InvalidRequest, PeerError, PeerUnavailable
from protocol.ids import new_id
from protocol.messages import (
    Ack,
    Acquire,
    Acquired,
    ChunkPlace,
    ChunkPlaces,
    Commit,
    Committed,
    CommittedChunk,
    FindTurns,
    FoundTurns,
    GetManifest,
    ListManifests,
    LocateChunks,
    Manifest,
    ManifestEntry,
    ManifestPage,
    ManifestReply,
    OpenStore,
    Quarantine,
    Release,
    Reserve,
    Reserved,
    SaveManifest,
    SlotRef,
    StoreOpened,
)
from protocol.rpc import RpcClient

M = TypeVar("M")

_CONNECT_S = 5.0
_REQUEST_S = 60.0
_OPEN_S = 120.0  # the daemon may have to make and touch a large arena
_MOVE_S = 60.0  # for a slot to become free, or a layer to arrive from SSD
_POLL_S = 0.01
_CHUNKS_AT_ONCE = 8


class StoreClient:
    """`async with StoreClient(settings) as store`. Raises PeerUnavailable there: no daemon answers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rpc = RpcClient(settings.kvdaemon_endpoint, "cli", curve=settings.curve())
        self._stack = AsyncExitStack()
        self._slots = 0
        self._arena: Arena | None = None
        self.problem = ""  # of the SSD tier, as the last page told it

    async def __aenter__(self) -> Self:
        await self._rpc.start()
        self._stack.push_async_callback(self._rpc.stop)
        try:
            await self._rpc.wait_connected(_CONNECT_S)
        except PeerUnavailable as error:
            await self._stack.aclose()
            endpoint = self._settings.kvdaemon_endpoint
            reason = self._rpc.last_error.replace(f"{endpoint}: ", "")
            raise PeerUnavailable(
                f"no kvdaemon answers at {endpoint} {reason}; start it, or name its --data-dir, --run-dir or"
                " --kvdaemon-endpoint"
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def ask(self, message: Any, expect: type[M], timeout_s: float = _REQUEST_S) -> M:
        return await self._rpc.request(message, expect, timeout_s)

    def stream(self, message: Any, timeout_s: float, idle_timeout_s: float) -> AsyncIterator[Any]:
        return self._rpc.stream(message, timeout_s, idle_timeout_s)

    # -- what is saved --------------------------------------------------------------------------------------

    async def resolve(self, prefix: str) -> bytes:
        """The turn key that begins with these digits. Raises InvalidRequest: none or several do."""
        found = await self.ask(FindTurns(prefix), FoundTurns)
        if len(found.turn_keys) == 1:
            return found.turn_keys[0]
        if found.turn_keys:
            several = ", ".join(turn_key.hex() for turn_key in found.turn_keys)
            raise InvalidRequest(f"{prefix} is ambiguous: {several}")
        unless = f" in memory; the SSD tier is away: {found.problem}" if found.problem else ""
        raise InvalidRequest(f"no saved turn's key begins with {prefix}{unless}")

    async def manifest(self, prefix: str) -> Manifest:
        """The context saved under the turn key that begins with these digits. Raises as resolve; PeerUnavailable."""
        turn_key = await self.resolve(prefix)
        reply = await self.ask(GetManifest(turn_key), ManifestReply)
        if reply.manifest is None:
            raise PeerUnavailable(f"the context of {turn_key.hex()} cannot be read: {reply.reason}")
        return reply.manifest

    async def entries(self) -> AsyncIterator[ManifestEntry]:
        """All saved contexts, in the order of their keys."""
        after, more = b"", True
        while more:
            page = await self.ask(ListManifests(after), ManifestPage)
            self.problem = page.problem
            for entry in page.entries:
                yield entry
            more = page.more and bool(page.entries)
            after = page.entries[-1].turn_key if page.entries else b""

    async def locate(self, chunk_ids: tuple[bytes, ...]) -> tuple[ChunkPlace, ...]:
        return (await self.ask(LocateChunks(chunk_ids), ChunkPlaces)).places

    # -- KV -------------------------------------------------------------------------------------------------

    async def open(self, geometry: Geometry) -> None:
        """Map the daemon's arena. Raises InvalidRequest: it is not on this machine; CapacityError: see OpenStore."""
        self._stack.callback(ClientLock(self._settings.run_dir, self._rpc.client_id).close)
        opened = await self.ask(OpenStore(geometry.to_message(), bytes(16)), StoreOpened, _OPEN_S)
        try:
            self._arena = Arena.open(Path(opened.arena_path))
        except FileNotFoundError as error:
            raise InvalidRequest(f"{opened.arena_path} is not on this machine; run this beside the kvdaemon") from error
        self._stack.callback(self._arena.close)
        self._slots = opened.slots

    async def load(self, contents: Contents) -> AsyncGenerator[Layers, None]:
        """Every chunk's KV, oldest first, verified. Raises InvalidRequest: a chunk is not there any more."""
        chunk_ids = contents.manifest.chunk_ids
        for index, place in enumerate(await self.locate(chunk_ids)):
            # The SSD tier keeps KV of earlier models; read into an arena of another shape, it would count as damaged.
            if place.ssd_bytes not in (0, contents.chunk_tokens(index) * contents.geometry.token_bytes):
                raise InvalidRequest("the conversation is of another model than the one that the store is open for")
        at_once = max(1, min(_CHUNKS_AT_ONCE, self._slots // 4))
        done = 0
        deadline_s = time.monotonic() + _MOVE_S
        while done < len(chunk_ids):
            wanted = chunk_ids[done : done + at_once]
            async with self._lease(contents.manifest.namespace, wanted) as acquired:
                for ref in acquired.chunks:
                    yield await self._read(ref)
                    done += 1
                    deadline_s = time.monotonic() + _MOVE_S
            if not acquired.chunks:
                if acquired.miss_reason != "no_capacity":
                    raise InvalidRequest(
                        f"chunk {done + 1} of {len(chunk_ids)} is not in the store ({acquired.miss_reason})"
                    )
                if time.monotonic() > deadline_s:
                    raise CapacityError("DRAM has no room to bring the conversation from SSD")
                await asyncio.sleep(_POLL_S)

    async def save(self, contents: Contents, index: int, layers: Layers) -> None:
        """Bring one chunk into the store. Raises CapacityError: no slot becomes free; PeerError."""
        assert self._arena is not None
        deadline_s = time.monotonic() + _MOVE_S
        while not (reserved := await self.ask(Reserve(1), Reserved)).slots:
            if time.monotonic() > deadline_s:
                raise CapacityError("the store has no room: DRAM is in use, or waits for the SSD")
            await asyncio.sleep(_POLL_S)
        (slot,) = reserved.slots
        tokens = contents.chunk_tokens(index)
        await asyncio.to_thread(_fill, self._arena, slot.slot, tokens, layers)
        manifest = contents.manifest
        chunk = CommittedChunk(
            slot.slot,
            slot.generation,
            manifest.chunk_ids[index],
            contents.parent_id(index),
            manifest.namespace,
            tokens,
        )
        if (await self.ask(Commit((chunk,)), Committed)).accepted != (True,):
            raise PeerError("the store refused a chunk")

    async def save_manifest(self, contents: Contents) -> None:
        await self.ask(SaveManifest(contents.manifest), Ack)

    @asynccontextmanager
    async def _lease(self, namespace: bytes, chunk_ids: tuple[bytes, ...]) -> AsyncIterator[Acquired]:
        acquired = await self.ask(Acquire(new_id(), namespace, chunk_ids, lease_ms=120_000), Acquired)
        try:
            yield acquired
        finally:
            with suppress(CachedAttentionError):  # it ends by itself, by time or with this process
                await self.ask(Release(acquired.lease_id), Ack)

    async def _read(self, ref: SlotRef) -> Layers:
        arena = self._arena
        assert arena is not None
        layers: Layers = []
        deadline_s = time.monotonic() + _MOVE_S
        for layer in range(arena.geometry.layers):
            while arena.ready_layers(ref.slot) <= layer and arena.is_current(ref.slot, ref.generation, ref.chunk_id):
                if time.monotonic() > deadline_s:
                    raise PeerUnavailable("a chunk does not arrive from SSD")
                await asyncio.sleep(_POLL_S)
            keys, values = (view.tobytes() for view in arena.layer(ref.slot, layer, ref.tokens))
            checksum = arena.checksum(ref.slot, layer)
            if not arena.is_current(ref.slot, ref.generation, ref.chunk_id):
                raise PeerUnavailable("a chunk was taken away while it was read; try again")
            if layer_checksum(np.frombuffer(keys, np.uint8), np.frombuffer(values, np.uint8)) != checksum:
                await self.ask(Quarantine(ref.slot, ref.generation, ref.chunk_id), Ack)
                raise InvalidRequest(f"chunk {ref.chunk_id.hex()} is corrupt in DRAM")
            layers.append((keys, values))
        return layers


def _fill(arena: Arena, slot: int, tokens: int, layers: Layers) -> None:
    for layer, parts in enumerate(layers):
        views = arena.layer(slot, layer, tokens)
        for view, part in zip(views, parts, strict=True):
            view[:] = np.frombuffer(part, np.uint8)
        arena.set_layer_ready(slot, layer, layer_checksum(*views))
