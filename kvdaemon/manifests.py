"""Manifests: the saved contexts by turn key, in memory the latest, on SSD all of them.

A manifest is on its way to the SSD from the moment it is saved. Where the worker is away or the disk full, it waits
in memory and is tried again; what waits is bounded like the rest, and the oldest goes first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator

from kvdaemon.ssd.client import SsdLink
from monitoring.logs import get_logger
from protocol.errors import CapacityError, PeerError
from protocol.messages import Manifest, ManifestReply

log = get_logger(__name__)

MEMORY_BYTES = 16 * 1024 * 1024
_WAITING_BYTES = 8 * 1024 * 1024
_LOOKUP_S = 0.5
_RETRY_S = 1.0
_ENTRY_BYTES = 500  # Python's own cost of one


class _Shelf:
    """Manifests in the order of their last use, bounded by bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._items: OrderedDict[bytes, Manifest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, turn_key: bytes) -> Manifest | None:
        manifest = self._items.get(turn_key)
        if manifest is not None:
            self._items.move_to_end(turn_key)
        return manifest

    def __contains__(self, turn_key: bytes) -> bool:
        return turn_key in self._items

    def __iter__(self) -> Iterator[Manifest]:
        return iter(self._items.values())

    def oldest(self) -> Manifest | None:
        return next(iter(self._items.values()), None)

    def put(self, manifest: Manifest) -> int:
        """Returns how many manifests had to go for it."""
        self.pop(manifest.turn_key)
        self._items[manifest.turn_key] = manifest
        self._bytes += _size(manifest)
        dropped = 0
        while self._bytes > self._limit_bytes and len(self._items) > 1:
            _, old = self._items.popitem(last=False)
            self._bytes -= _size(old)
            dropped += 1
        return dropped

    def pop(self, turn_key: bytes) -> None:
        manifest = self._items.pop(turn_key, None)
        if manifest is not None:
            self._bytes -= _size(manifest)


def _size(manifest: Manifest) -> int:
    return _ENTRY_BYTES + len(manifest.token_ids) + 4 * len(manifest.text) + 50 * len(manifest.chunk_ids)


class ManifestStore:
    """One event loop owns it. `ssd` is None where there is no SSD tier: manifests then live as long as the daemon."""

    def __init__(self, ssd: SsdLink | None) -> None:
        self._ssd = ssd
        self._memory = _Shelf(MEMORY_BYTES)
        self._waiting = _Shelf(_WAITING_BYTES)
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._putting = asyncio.Lock()  # held while one is on its way to the SSD
        self._withheld: frozenset[bytes] = frozenset()  # turn keys being erased
        self._watchers: list[list[Manifest]] = []
        self._awaited: defaultdict[bytes, list[asyncio.Event]] = defaultdict(list)

    def __len__(self) -> int:
        """In memory."""
        return len(self._memory)

    @property
    def waiting(self) -> int:
        """Not on SSD yet."""
        return len(self._waiting)

    async def get(self, turn_key: bytes, wait_s: float = 0.0) -> ManifestReply:
        """Never fails and never takes long: a manifest that cannot be had now is a miss.

        wait_s: how long to wait for one that nobody has saved yet.
        """
        reply = await self._find(turn_key)
        if reply.manifest is None and wait_s > 0.0:
            await self._wait_for(turn_key, wait_s)
            reply = await self._find(turn_key)
        return reply

    async def _wait_for(self, turn_key: bytes, timeout_s: float) -> None:
        """Until a manifest is saved under this key, or until timeout_s have passed."""
        if turn_key in self._memory:
            return
        saved = asyncio.Event()
        self._awaited[turn_key].append(saved)
        try:
            async with asyncio.timeout(timeout_s):
                await saved.wait()
        except TimeoutError:
            pass
        finally:
            self._awaited[turn_key].remove(saved)
            if not self._awaited[turn_key]:
                del self._awaited[turn_key]

    async def _find(self, turn_key: bytes) -> ManifestReply:
        if turn_key in self._withheld:
            return ManifestReply(None, "manifest_lost")
        manifest = self._memory.get(turn_key) or self._waiting.get(turn_key)
        if manifest is not None:
            return ManifestReply(manifest)
        if self._ssd is None:
            return ManifestReply(None, "manifest_lost")
        try:
            reply = await self._ssd.get_manifest(turn_key, _LOOKUP_S)
        except PeerError:
            return ManifestReply(None, "manifest_lost")
        if turn_key in self._withheld:  # since we asked
            return ManifestReply(None, "manifest_lost")
        if reply.manifest is not None:
            self._memory.put(reply.manifest)
        return reply

    async def save(self, manifest: Manifest, wait_s: float) -> None:
        """Keep a manifest; wait a little for it to reach the SSD."""
        self._memory.put(manifest)
        for saved in self._watchers:
            saved.append(manifest)
        for awaited in self._awaited.get(manifest.turn_key, ()):
            awaited.set()
        if self._ssd is None:
            return
        dropped = self._waiting.put(manifest)
        if dropped:
            log.error("manifests lost: too many wait for the SSD", manifests=dropped)
        self._idle.clear()
        self._wake.set()
        await self.wait_saved(wait_s)

    async def wait_saved(self, timeout_s: float) -> None:
        """Wait until none waits for the SSD, but no longer than timeout_s."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def write_behind(self) -> None:
        """Bring waiting manifests to the SSD, for ever."""
        assert self._ssd is not None
        while True:
            if self._waiting.oldest() is None:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                async with self._putting:
                    manifest = self._waiting.oldest()
                    if manifest is None:
                        continue
                    await self._ssd.put_manifest(manifest)
            except (PeerError, CapacityError):
                await asyncio.sleep(_RETRY_S)
                continue
            if self._waiting.get(manifest.turn_key) is manifest:  # and not a newer one of the same turn
                self._waiting.pop(manifest.turn_key)

    # -- for listing and erasing ----------------------------------------------------------------------------

    def in_memory(self) -> dict[bytes, Manifest]:
        """By turn key: all that are in memory, whether on SSD too or not."""
        return {manifest.turn_key: manifest for shelf in (self._memory, self._waiting) for manifest in shelf}

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[Manifest]]:
        """A list to which every manifest is added that is saved meanwhile."""
        saved: list[Manifest] = []
        self._watchers.append(saved)
        try:
            yield saved
        finally:
            self._watchers.remove(saved)

    @contextlib.contextmanager
    def withholding(self, turn_keys: Collection[bytes]) -> Iterator[None]:
        """Turns that are being erased: nobody gets their manifests meanwhile, nor does a lookup under way keep one."""
        self._withheld |= frozenset(turn_keys)
        try:
            yield
        finally:
            self._withheld -= frozenset(turn_keys)

    async def forget(self, turn_keys: Collection[bytes]) -> None:
        """Drop manifests from memory, and wait until none of them is on its way to the SSD any more."""
        for turn_key in turn_keys:
            self._memory.pop(turn_key)
            self._waiting.pop(turn_key)
        async with self._putting:
            pass
