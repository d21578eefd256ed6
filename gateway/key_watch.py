"""The file of API keys is read again when it changes: a key that is taken out opens nothing a second later."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.api_keys import load_api_keys
from gateway.tenants import Tenants
from monitoring.logs import get_logger
from protocol.errors import ConfigError

log = get_logger(__name__)

_LOOK_S = 1.0


class KeyWatch:
    """Owned by one loop. A file that cannot be read changes nothing, and is told of."""

    def __init__(self, tenants: Tenants, path: Path, hashes: str) -> None:
        """hashes: more keys; see load_api_keys."""
        self._tenants = tenants
        self._path = path
        self._hashes = hashes
        self._seen: tuple[int, ...] | None = ()  # at first it is always read: it may have changed since the start
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Read the file if it is another than last time."""
        if (found := _identity(self._path)) == self._seen:
            return
        self._seen = found
        try:
            keys = load_api_keys(self._path, self._hashes)
        except ConfigError as error:
            log.error("the API keys stay as they were", error=error.message)
            return
        if self._tenants.use(keys):
            log.info("API keys changed", keys=len(keys.keys))


def _identity(path: Path) -> tuple[int, ...] | None:
    """None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
