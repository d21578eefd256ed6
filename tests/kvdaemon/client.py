"""A client of the store for tests: plays an inference process, with random bytes for KV."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from protocol.arena import Arena, ClientLock, Geometry, layer_checksum
from protocol.errors import CachedAttentionError
from protocol.ids import ROOT, chunk_id, new_id, pack_tokens
from protocol.messages import (
    Ack,
    Acquire,
    Acquired,
    Commit,
    Committed,
    CommittedChunk,
    GetManifest,
    GetStatus,
    Manifest,
    ManifestReply,
    OpenStore,
    Quarantine,
    Release,
    Reserve,
    Reserved,
    ReservedSlot,
    SaveManifest,
    SlotRef,
    StoreOpened,
    StoreStatus,
    Welcome,
)
from protocol.rpc import Ask, RpcClient

SMALL = Geometry(layers=3, key_bytes=64, value_bytes=96, chunk_tokens=32)
NAMESPACE = bytes(range(16))


@dataclass(frozen=True)
class Kv:
    """The KV of one chunk. layers: per layer (keys, values), each uint8."""

    chunk_id: bytes
    parent_id: bytes
    tokens: int
    layers: tuple[tuple[np.ndarray, np.ndarray], ...] = field(repr=False)


def make_chain(
    geometry: Geometry, length: int, seed: int, *, partial_tokens: int = 0, namespace: bytes = NAMESPACE
) -> list[Kv]:
    """A context of `length` full chunks, and one partial where asked for, with random KV. Equal seeds, equal bytes."""
    rng = np.random.default_rng(seed)
    chain: list[Kv] = []
    parent = ROOT
    counts = [geometry.chunk_tokens] * length + ([partial_tokens] if partial_tokens else [])
    for tokens in counts:
        this = chunk_id(namespace, parent, rng.integers(0, 50_000, tokens).astype(np.uint32))
        layers = tuple(
            (
                rng.integers(0, 256, tokens * geometry.key_bytes, dtype=np.uint8),
                rng.integers(0, 256, tokens * geometry.value_bytes, dtype=np.uint8),
            )
            for _ in range(geometry.layers)
        )
        chain.append(Kv(this, parent, tokens, layers))
        parent = this
    return chain


async def written_behind(daemon: DaemonProcess, timeout_s: float = 20.0) -> None:
    """Wait until every chunk in DRAM is on SSD too."""
    await eventually(
        lambda: "cachedattention_write_behind_queue 0.0" in daemon.metrics(), "all chunks on SSD", timeout_s
    )


def stored_files(data_dir: Path) -> list[Path]:
    """All files of the SSD tier: the database's, and those of chunks."""
    return sorted(path for path in (data_dir / "ssd").rglob("*") if path.is_file())


class StoreClient:
    """One inference process, as the daemon sees it. `await start()`, then use; `await stop()` at the end."""

    def __init__(
        self, run_dir: Path, geometry: Geometry = SMALL, *, endpoint: str = "", namespace: bytes = NAMESPACE
    ) -> None:
        self.run_dir = run_dir
        self.geometry = geometry
        self.namespace = namespace
        self.arena: Arena | None = None
        self.opened = 0
        self.rpc = RpcClient(endpoint or f"ipc://{run_dir}/kvdaemon.sock", "inference", on_connected=self._open)
        self.lock = ClientLock(run_dir, self.rpc.client_id)

    async def start(self, timeout_s: float = 30.0) -> StoreClient:
        await self.rpc.start()
        await self.rpc.wait_connected(timeout_s)
        return self

    async def stop(self) -> None:
        await self.rpc.stop()
        self.lock.close()
        if self.arena is not None:
            self.arena.close()

    async def _open(self, welcome: Welcome, ask: Ask) -> None:
        opened = await ask(OpenStore(self.geometry.to_message(), new_id()), StoreOpened, 30.0)
        if self.arena is None or self.arena.arena_id != opened.arena_id:
            self.arena = Arena.open(Path(opened.arena_path))
        self.opened += 1

    # -- saving -------------------------------------------------------------------------------------------

    async def reserve(self, count: int) -> list[ReservedSlot]:
        return list((await self.rpc.request(Reserve(count), Reserved, 5.0)).slots)

    def fill(self, slot: int, kv: Kv) -> None:
        assert self.arena is not None
        for layer, (keys, values) in enumerate(kv.layers):
            key_view, value_view = self.arena.layer(slot, layer, kv.tokens)
            key_view[:] = keys
            value_view[:] = values
            self.arena.set_layer_ready(slot, layer, layer_checksum(keys, values))

    def committed(self, slot: ReservedSlot, kv: Kv) -> CommittedChunk:
        return CommittedChunk(slot.slot, slot.generation, kv.chunk_id, kv.parent_id, self.namespace, kv.tokens)

    async def save(self, chain: Sequence[Kv], timeout_s: float = 20.0) -> None:
        """Reserve, write and commit every chunk, waiting for slots as an inference process does."""
        deadline_s = time.monotonic() + timeout_s
        for kv in chain:
            while not (slots := await self.reserve(1)):
                assert time.monotonic() < deadline_s, "no slot became free"
                await asyncio.sleep(0.02)
            self.fill(slots[0].slot, kv)
            reply = await self.rpc.request(Commit((self.committed(slots[0], kv),)), Committed, 5.0)
            assert reply.accepted == (True,)

    # -- loading ------------------------------------------------------------------------------------------

    async def acquire(self, chunk_ids: Sequence[bytes], **fields: Any) -> Acquired:
        return await self.rpc.request(Acquire(new_id(), self.namespace, tuple(chunk_ids), **fields), Acquired, 5.0)

    async def release(self, lease_id: bytes) -> None:
        await self.rpc.request(Release(lease_id), Ack, 5.0)

    async def read(self, ref: SlotRef, timeout_s: float = 10.0) -> Kv | None:
        """Copy a leased chunk layer by layer as its layers become ready, verified. None: the slot moved on."""
        assert self.arena is not None
        layers = []
        deadline_s = time.monotonic() + timeout_s
        for layer in range(self.geometry.layers):
            while self.arena.ready_layers(ref.slot) <= layer:
                if not self.arena.is_current(ref.slot, ref.generation, ref.chunk_id):
                    return None
                assert time.monotonic() < deadline_s, "a layer never became ready"
                await asyncio.sleep(0.002)
            keys, values = (view.copy() for view in self.arena.layer(ref.slot, layer, ref.tokens))
            checksum = self.arena.checksum(ref.slot, layer)
            if not self.arena.is_current(ref.slot, ref.generation, ref.chunk_id):
                return None
            if layer_checksum(keys, values) != checksum:
                await self.rpc.request(Quarantine(ref.slot, ref.generation, ref.chunk_id), Ack, 5.0)
                return None
            layers.append((keys, values))
        return Kv(ref.chunk_id, ROOT, ref.tokens, tuple(layers))

    async def load(self, chain: Sequence[Kv], **fields: Any) -> list[str]:
        """Acquire and read a context, and compare every byte. Returns the tier of each chunk that was a hit."""
        acquired = await self.acquire([kv.chunk_id for kv in chain], **fields)
        tiers = []
        for kv, ref in zip(chain, acquired.chunks, strict=False):
            copy = await self.read(ref)
            if copy is None:
                break
            assert_equal(kv, copy)
            tiers.append(ref.tier)
        await self.release(acquired.lease_id)
        return tiers

    # -- the rest -----------------------------------------------------------------------------------------

    async def save_manifest(self, turn_key: bytes, chain: Sequence[Kv]) -> Manifest:
        manifest = Manifest(
            turn_key,
            self.namespace,
            pack_tokens([1, 2, 3]),
            "text of the turn",
            tuple(kv.chunk_id for kv in chain),
            sum(kv.tokens for kv in chain),
        )
        await self.rpc.request(SaveManifest(manifest), Ack, 5.0)
        return manifest

    async def get_manifest(self, turn_key: bytes) -> ManifestReply:
        return await self.rpc.request(GetManifest(turn_key), ManifestReply, 5.0)

    async def status(self) -> StoreStatus:
        return await self.rpc.request(GetStatus(), StoreStatus, 5.0)


def assert_equal(expected: Kv, actual: Kv) -> None:
    assert (expected.chunk_id, expected.tokens) == (actual.chunk_id, actual.tokens)
    for (keys, values), (other_keys, other_values) in zip(expected.layers, actual.layers, strict=True):
        np.testing.assert_array_equal(keys, other_keys)
        np.testing.assert_array_equal(values, other_values)


async def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """Wait until `condition()` (may be a coroutine function) is true. Returns its value."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
        except CachedAttentionError:
            pass  # asked while something was being restarted
        assert time.monotonic() < deadline_s, f"never: {what}"
        await asyncio.sleep(0.05)


_PROGRAM = """
import json, sys
from pathlib import Path
from kvdaemon.config import KvDaemonConfig
from kvdaemon.service import run
from monitoring.logs import configure
from protocol.errors import CachedAttentionError
configure("kvdaemon")
fields = json.loads(sys.argv[1])
try:
    sys.exit(run(KvDaemonConfig(Path(fields.pop("run_dir")), Path(fields.pop("data_dir")), **fields)))
except CachedAttentionError as error:
    print(f"{error.code}: {error}", file=sys.stderr)
    sys.exit(2)
"""


class DaemonProcess:
    """A real kvdaemon, with its real worker, as a child process. Restartable; its log goes to a file."""

    def __init__(self, run_dir: Path, data_dir: Path, **fields: Any) -> None:
        self.run_dir, self.data_dir = run_dir, data_dir
        self.fields: dict[str, Any] = {
            "run_dir": str(run_dir),
            "data_dir": str(data_dir),
            "endpoint": f"ipc://{run_dir}/kvdaemon.sock",
            "dram_bytes": 2 * 1024 * 1024,
            "ssd_bytes": 1024 * 1024 * 1024,
            "metrics_port": 0,
            **fields,
        }
        self.environment: dict[str, str] = {}
        self.log_path = data_dir.parent / "kvdaemon.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> DaemonProcess:
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(self.fields)],
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
            )
        return self

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def worker_pid(self) -> int | None:
        """The pid of the SSD worker, a child of the daemon."""
        for line in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has died since
                if b"kvdaemon.ssd.worker" in Path(f"/proc/{line}/cmdline").read_bytes():
                    return int(line)
        return None

    def metrics_port(self) -> int:
        """The daemon took any free port; the kernel knows which."""
        inodes = {
            match[1]
            for fd in Path(f"/proc/{self.pid}/fd").iterdir()
            if (match := re.match(r"socket:\[(\d+)\]", _link(fd)))
        }
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] == "0A":
                return int(fields[1].split(":")[1], 16)
        raise AssertionError("the daemon listens on no port")

    def metrics(self) -> str:
        return scrape(self.metrics_port())

    def health(self) -> str:
        return scrape(self.metrics_port(), "health")

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.terminate()


@contextmanager
def running_daemon(base: Path, **fields: Any) -> Iterator[DaemonProcess]:
    """A daemon with a run directory in shared memory and its data below `base`. Prints its log at the end.

    Its placement is the paper's unless `fields` say otherwise: a test can then tell who leaves DRAM next, by LRU.
    """
    fields.setdefault("policy", "scheduler-aware")
    run_dir = Path("/dev/shm") / f"kvd-{os.getpid()}-{new_id().hex()[:8]}"
    run_dir.mkdir(mode=0o700)
    data_dir = base / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    daemon = DaemonProcess(run_dir, data_dir, **fields)
    try:
        yield daemon.start()
    finally:
        daemon.close()
        print(daemon.log_text())  # pytest shows it where the test failed
        for path in sorted(run_dir.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        run_dir.rmdir()


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # closed since it was listed
        return ""


def scrape(port: int, path: str = "metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as reply:
        return str(reply.read().decode())


def metric(text: str, name: str) -> float:
    """The sum of a metric's samples whose line starts with `name` (labels may be part of it)."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))
