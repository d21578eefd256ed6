"""The arena: the shared-memory file of the DRAM tier, and the only way KV bytes pass between processes.

    page 0          header: magic, version, geometry, arena id, epoch
    table           one entry per slot: who, what, how much of it is ready
    data            slots, each [layer][key | value][token, kv_head, head_dim], every layer page-aligned

One chunk lies in one slot. Slots describe themselves, so a daemon that starts again adopts what it finds.

Who writes what: the kvdaemon's front owns `state`, `generation` and `owner`; whoever fills a slot (an
inference process that reserved it, or the SSD worker) writes data, checksums, `tokens` and `ready_layers`,
in this order, and identity last of all through the front, which seals it: a digest binds the ids to the checksums, so
that no slot passes for another's. A reader holds (slot, generation) from a lease,
checks `generation` and `chunk_id` before and after it copies, and throws the copy away where they moved: the
front raises the generation *before* a slot is given to anybody else, so a stale reader can never keep foreign
bytes. Single fields are aligned 8-byte stores, which x86-64 and arm64 never tear; the data-then-flag order
across processes is what x86-64 guarantees by itself.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from protocol.errors import CapacityError, ConfigError, PeerProtocolError
from protocol.ids import ID_BYTES, digest, new_id
from protocol.messages import GeometryFields

MAGIC = b"CAttnKV\x00"
LAYOUT_VERSION = 2
PAGE_BYTES = mmap.PAGESIZE
_HEADER = struct.Struct("<8sIIQQQQQQQ16s16s")
_PAGE_FAULTS_AT_ONCE = 64 * 1024 * 1024
# Copied, then hashed while it is in the CPU's second-level cache (1 MiB and up). Measured: docs/experiments.md.
_BLOCK_BYTES = 256 * 1024

Bytes = npt.NDArray[np.uint8]


class SlotState(IntEnum):
    FREE = 0
    RESERVED = 1  # an inference process (`owner`) is filling it
    LOADING = 2  # the SSD worker is filling it; layers below ready_layers may be read
    READY = 3  # a whole chunk
    WIPING = 4  # the daemon overwrites what was in it


@dataclass(frozen=True)
class Geometry:
    """The shape of a chunk in bytes.

    key_bytes and value_bytes are per token and layer: kv_heads * head_dim * itemsize.
    """

    layers: int
    key_bytes: int
    value_bytes: int
    chunk_tokens: int

    def __post_init__(self) -> None:
        if min(astuple(self)) < 1:
            raise PeerProtocolError(f"geometry has a zero: {self}")

    @property
    def layer_bytes(self) -> int:
        """Room for one layer of a slot, a whole number of pages."""
        raw = self.chunk_tokens * (self.key_bytes + self.value_bytes)
        return -(-raw // PAGE_BYTES) * PAGE_BYTES

    @property
    def slot_bytes(self) -> int:
        return self.layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """KV of one token over all layers."""
        return self.layers * (self.key_bytes + self.value_bytes)

    @property
    def entry_bytes(self) -> int:
        """One slot's place in the table, a whole number of cache lines so that writers do not share one."""
        raw = _FIXED_BYTES + 8 * self.layers
        return -(-raw // 64) * 64

    def digest(self) -> bytes:
        return digest("geometry", struct.pack("<QQQQ", *astuple(self)))

    def to_message(self) -> GeometryFields:
        return GeometryFields(**asdict(self))

    @classmethod
    def from_message(cls, fields: GeometryFields) -> Geometry:
        """Raises PeerProtocolError: not a possible geometry."""
        return cls(fields.layers, fields.key_bytes, fields.value_bytes, fields.chunk_tokens)


_FIXED_FIELDS = (
    # Eight-byte fields first: everything is aligned to its size. Ids are raw bytes: "S16" would lose trailing zeros.
    ("generation", "<u8", 0),
    ("state", "<u4", 8),
    ("ready_layers", "<u4", 12),
    ("tokens", "<u4", 16),
    ("seal", "<u8", 24),  # digest of the ids, `tokens` and checksums of what the slot holds
    ("owner", "V16", 32),  # client id of the process that reserved the slot
    ("chunk_id", "V16", 48),
    ("parent_id", "V16", 64),
    ("namespace", "V16", 80),
)
_FIXED_BYTES = 96
_ID_FIELDS = ("owner", "chunk_id", "parent_id", "namespace")
_VIEWS = (
    *("_table", "_data", "keys", "values", "_words", "_generation", "_state", "_ready", "_tokens", "_seal"),
    *("_checksums", "_ids", "_sealed"),
)
_IDENTITY_WORDS = (0, 6, 7)  # an entry as 8-byte words: generation and chunk id
_SEALED_FROM = 48  # all ids but the owner's, and the checksums behind them


def _entry_dtype(geometry: Geometry) -> np.dtype[np.void]:
    names, formats, offsets = zip(*_FIXED_FIELDS, ("checksums", ("<u8", (geometry.layers,)), _FIXED_BYTES), strict=True)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": geometry.entry_bytes})


class Arena:
    """A mapping of the arena file. Plain views, no locks: the module's docstring says who may write what.

    Safe from several threads as long as each slot has one writer. Views die with `close`.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, geometry: Geometry, slots: int, arena_id: bytes) -> None:
        self.path = path
        self.geometry = geometry
        self.slots = slots
        self.arena_id = arena_id
        self._mmap = mapped
        entry = _entry_dtype(geometry)
        self._table = np.frombuffer(mapped, dtype=entry, count=slots, offset=PAGE_BYTES)
        self._data = np.frombuffer(mapped, dtype=np.uint8, offset=_data_offset(geometry, slots))
        layers = self._data.reshape(slots, geometry.layers, geometry.layer_bytes)
        key_bytes = geometry.chunk_tokens * geometry.key_bytes
        # The data as it is read and written  # each [slots, layers, chunk_tokens * key_bytes | value_bytes] uint8
        self.keys: Bytes = layers[:, :, :key_bytes]
        self.values: Bytes = layers[:, :, key_bytes : key_bytes + geometry.chunk_tokens * geometry.value_bytes]
        self._words = np.frombuffer(mapped, "<u8", count=slots * geometry.entry_bytes // 8, offset=PAGE_BYTES)
        self._generation = self._table["generation"]
        self._state = self._table["state"]
        self._ready = self._table["ready_layers"]
        self._tokens = self._table["tokens"]
        self._seal = self._table["seal"]
        self._checksums = self._table["checksums"]
        self._ids = {name: self._table[name] for name in _ID_FIELDS}
        entries = np.frombuffer(mapped, dtype=np.uint8, count=slots * geometry.entry_bytes, offset=PAGE_BYTES)
        self._sealed = entries.reshape(slots, -1)[:, _SEALED_FROM : _FIXED_BYTES + 8 * geometry.layers]

    # -- making and mapping -------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, geometry: Geometry, capacity_bytes: int) -> Arena:
        """Make the arena file anew and take all of its memory, so that a full tmpfs is an error now, no SIGBUS later.

        An old file goes first, for there may be no room for two; processes that still map it keep their (orphaned)
        copy. Raises CapacityError: not one slot fits into capacity_bytes, or the tmpfs has no room.
        """
        per_slot = geometry.slot_bytes + geometry.entry_bytes
        slots = max(0, capacity_bytes - 2 * PAGE_BYTES) // per_slot
        if slots < 1:
            raise CapacityError(
                f"{capacity_bytes} bytes of DRAM hold no chunk of {geometry.slot_bytes} bytes; raise --dram"
            )
        size = _data_offset(geometry, slots) + slots * geometry.slot_bytes
        arena_id = new_id()
        path.unlink(missing_ok=True)
        # Always the same name: what a process killed on the way left behind is taken over, not added to.
        temporary = path.with_name(f".{path.name}.new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            header = _HEADER.pack(
                MAGIC, LAYOUT_VERSION, 0, *astuple(geometry), slots, size, 0, geometry.digest(), arena_id
            )
            os.pwrite(fd, header, 0)
            os.rename(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
                raise CapacityError(
                    f"{path.parent} has no room for an arena of {size} bytes; lower --dram or enlarge the tmpfs"
                ) from error
            raise
        finally:
            os.close(fd)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Arena:
        """Map an existing arena.

        Raises PeerProtocolError: not an arena, of another version, or damaged; FileNotFoundError.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            raw = os.pread(fd, _HEADER.size, 0)
            geometry, slots, size, arena_id = _parse_header(raw, path)
            if os.fstat(fd).st_size != size:
                raise PeerProtocolError(f"{path} is truncated: {os.fstat(fd).st_size} of {size} bytes")
            mapped = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        return cls(path, mapped, geometry, slots, arena_id)

    def populate(self) -> Iterator[int]:
        """Make this process's page tables for the mapping now, piece by piece, yielding the bytes done.

        The first access to a page from a process costs about a hundred times a later one; a start pays it here
        instead of the first turns. The caller may do other things between pieces.
        """
        touched = 0
        view = np.frombuffer(self._mmap, dtype=np.uint8)
        for start in range(0, len(view), _PAGE_FAULTS_AT_ONCE):
            # One byte a page. MAP_POPULATE costs the same and cannot be interrupted.
            touched += int(view[start : start + _PAGE_FAULTS_AT_ONCE : PAGE_BYTES].max())
            yield min(start + _PAGE_FAULTS_AT_ONCE, len(view))

    def close(self) -> None:
        """Unmap, if no view made by this object is alive; otherwise the mapping goes with the last view."""
        for name in _VIEWS:
            if hasattr(self, name):
                delattr(self, name)
        try:
            self._mmap.close()
        except BufferError:  # a view is still held; freed with it
            pass

    @property
    def size_bytes(self) -> int:
        return len(self._mmap)

    @property
    def memory(self) -> tuple[int, int]:
        """Address and bytes of the mapping in this process."""
        return np.frombuffer(self._mmap, dtype=np.uint8).ctypes.data, self.size_bytes

    # -- table ----------------------------------------------------------------------------------------------

    def generation(self, slot: int) -> int:
        return int(self._generation[slot])

    def state(self, slot: int) -> SlotState:
        """Raises PeerProtocolError: the entry is damaged."""
        try:
            return SlotState(int(self._state[slot]))
        except ValueError as error:
            raise PeerProtocolError(f"slot {slot} has no known state") from error

    def ready_layers(self, slot: int) -> int:
        return int(self._ready[slot])

    def tokens(self, slot: int) -> int:
        return int(self._tokens[slot])

    def chunk_id(self, slot: int) -> bytes:
        return self._id("chunk_id", slot)

    def parent_id(self, slot: int) -> bytes:
        return self._id("parent_id", slot)

    def namespace(self, slot: int) -> bytes:
        return self._id("namespace", slot)

    def owner(self, slot: int) -> bytes:
        return self._id("owner", slot)

    def checksum(self, slot: int, layer: int) -> int:
        return int(self._checksums[slot, layer])

    def is_current(self, slot: int, generation: int, chunk_id: bytes) -> bool:
        """Whether the slot still holds what a lease said. Ask before *and* after copying."""
        return int(self._generation[slot]) == generation and self._id("chunk_id", slot) == chunk_id

    def set_state(self, slot: int, state: SlotState) -> None:
        """Front only."""
        self._state[slot] = int(state)

    def take(self, slot: int, state: SlotState, owner: bytes) -> int:
        """Front only: hand a free slot to a new writer. Returns its generation."""
        generation = int(self._generation[slot]) + 1
        self._generation[slot] = generation
        self._ready[slot] = 0
        self._tokens[slot] = 0
        self._set_id("owner", slot, owner)
        self._set_id("chunk_id", slot, bytes(ID_BYTES))
        self._state[slot] = int(state)
        return generation

    def set_identity(self, slot: int, chunk_id: bytes, parent_id: bytes, namespace: bytes, tokens: int) -> None:
        """Front only: say what a slot holds (or is about to hold, for LOADING)."""
        self._set_id("parent_id", slot, parent_id)
        self._set_id("namespace", slot, namespace)
        self._tokens[slot] = tokens
        self._set_id("chunk_id", slot, chunk_id)

    def seal(self, slot: int) -> None:
        """Front only, before the slot is READY: what changes in ids, count or checksums from here on is damage."""
        self._seal[slot] = self._digest(slot)

    def is_sealed(self, slot: int) -> bool:
        """Whether ids, token count and checksums are those that the front sealed. Only a READY slot can be."""
        return self._digest(slot) == int(self._seal[slot])

    def _digest(self, slot: int) -> int:
        return int(xxhash.xxh3_64_intdigest(self._sealed[slot].data, seed=self.tokens(slot)))

    def free(self, slot: int) -> None:
        """Front only: make the slot FREE; every reader of the old generation notices from here on."""
        self._generation[slot] = int(self._generation[slot]) + 1
        self._state[slot] = int(SlotState.FREE)
        self._ready[slot] = 0
        self._set_id("chunk_id", slot, bytes(ID_BYTES))

    def set_layer_ready(self, slot: int, layer: int, checksum: int) -> None:
        """Writer only: layer `layer` is whole. Layers become ready in order, and data is written before this."""
        self._checksums[slot, layer] = checksum
        self._ready[slot] = layer + 1

    # -- data ---------------------------------------------------------------------------------------------

    def layer(self, slot: int, layer: int, tokens: int) -> tuple[Bytes, Bytes]:
        """Views of the first `tokens` tokens' keys and values of one layer. # each [tokens * key_bytes] uint8"""
        geometry = self.geometry
        return (
            self.keys[slot, layer, : tokens * geometry.key_bytes],
            self.values[slot, layer, : tokens * geometry.value_bytes],
        )

    def layers(self, slot: int, layers: range) -> Bytes:
        """A view of all the room of some layers, in one piece. # [len(layers) * layer_bytes] uint8"""
        start = slot * self.geometry.slot_bytes
        return self._data[
            start + layers.start * self.geometry.layer_bytes : start + layers.stop * self.geometry.layer_bytes
        ]

    def write_layer(self, slot: int, layer: int, key: Bytes, value: Bytes) -> None:
        """Writer only: copy a layer's keys and values in and make it ready, in one pass over memory.

        The checksum is of what there was to copy, so that a copy that went wrong is found like any other damage.
        """
        checksum = xxhash.xxh3_64()
        for target, source in ((self.keys[slot, layer], key), (self.values[slot, layer], value)):
            for start in range(0, len(source), _BLOCK_BYTES):
                block = source[start : start + _BLOCK_BYTES]
                target[start : start + len(block)] = block
                checksum.update(block.data)
        self.set_layer_ready(slot, layer, checksum.intdigest())

    def wipe(self, slot: int) -> None:
        """Front only, for a slot that nobody else reads or writes: overwrite all of it with zeros, checksums too."""
        start = slot * self.geometry.slot_bytes
        self._data[start : start + self.geometry.slot_bytes] = 0
        self._checksums[slot] = 0
        self._seal[slot] = 0
        self._tokens[slot] = 0
        for name in _ID_FIELDS:
            self._set_id(name, slot, bytes(ID_BYTES))

    def wipe_unused(self, slot: int, layer: int, tokens: int) -> int:
        """Front only: overwrite what earlier chunks left behind a layer's `tokens` tokens. Returns how many bytes."""
        unused = self.geometry.chunk_tokens - tokens
        key, value = self.layer(slot, layer, self.geometry.chunk_tokens)
        key[tokens * self.geometry.key_bytes :] = 0
        value[tokens * self.geometry.value_bytes :] = 0
        return unused * (self.geometry.key_bytes + self.geometry.value_bytes)

    def verify_layer(self, slot: int, layer: int, tokens: int) -> bool:
        """Whether the bytes of a layer have the checksum that their writer noted, and the checksum is this chunk's.

        While a slot is being filled there is no seal yet: its checksums are as good as their writer.
        """
        if int(self._state[slot]) == SlotState.READY and not self.is_sealed(slot):
            return False
        return layer_checksum(*self.layer(slot, layer, tokens)) == self.checksum(slot, layer)

    def _id(self, name: str, slot: int) -> bytes:
        return bytes(self._ids[name][slot].tobytes())

    def _set_id(self, name: str, slot: int, value: bytes) -> None:
        self._ids[name][slot] = np.void(value)


class HeldSlots:
    """Slots as a lease said they are, looked at all at once. Safe from any thread."""

    def __init__(self, arena: Arena, held: Sequence[tuple[int, int, bytes]]) -> None:
        """held: slot, generation, chunk id."""
        words_per_entry = arena.geometry.entry_bytes // 8
        self._words = arena._words
        self._ready = arena._ready
        self._layers = arena.geometry.layers
        self._slots = np.array([slot for slot, _, _ in held], dtype=np.intp)
        self._places = np.add.outer(self._slots * words_per_entry, _IDENTITY_WORDS)
        self._identity = b"".join(generation.to_bytes(8, "little") + chunk_id for _, generation, chunk_id in held)

    def are_current(self) -> bool:
        """Whether every slot still holds what the lease said. Ask before *and* after copying."""
        return self._words.take(self._places).tobytes() == self._identity

    def ready_layers(self) -> int:
        """How many layers are there of each. Counts once `are_current` was asked after it."""
        return int(self._ready[self._slots].min(initial=self._layers))


def layer_checksum(key: Bytes, value: Bytes) -> int:
    """xxh3-64 over a layer's keys, then values."""
    state = xxhash.xxh3_64(key.data)
    state.update(value.data)
    return state.intdigest()


def _data_offset(geometry: Geometry, slots: int) -> int:
    table_end = PAGE_BYTES + slots * geometry.entry_bytes
    return -(-table_end // PAGE_BYTES) * PAGE_BYTES


def _parse_header(raw: bytes, path: Path) -> tuple[Geometry, int, int, bytes]:
    if len(raw) < _HEADER.size or raw[: len(MAGIC)] != MAGIC:
        raise PeerProtocolError(f"{path} is not an arena")
    _, version, _, layers, key, value, chunk_tokens, slots, size, _, geometry_digest, arena_id = _HEADER.unpack(raw)
    if version != LAYOUT_VERSION:
        raise PeerProtocolError(f"{path} has layout version {version}, this program reads {LAYOUT_VERSION}")
    geometry = Geometry(layers, key, value, chunk_tokens)
    if (
        slots < 1
        or geometry.digest() != geometry_digest
        or size != _data_offset(geometry, slots) + slots * geometry.slot_bytes
    ):
        raise PeerProtocolError(f"{path} has a damaged header")
    return geometry, slots, size, arena_id


# -- who is alive -------------------------------------------------------------------------------------------


class ClientLock:
    """Proof of life of one process: a locked file beside the arena.

    The kernel drops the lock when the process dies, however it dies, and this holds between containers that
    share the directory, where process ids mean nothing. The daemon gives a dead client's slots back by it.
    """

    def __init__(self, directory: Path, client_id: bytes) -> None:
        """Raises ConfigError: the directory cannot be written."""
        self.path = _client_path(directory, client_id)
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"cannot lock {self.path}: {error.strerror}", param="run_dir") from error

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


def client_is_alive(directory: Path, client_id: bytes) -> bool:
    """Whether the process that took ClientLock(directory, client_id) lives. Sweeps away the file of a dead one."""
    path = _client_path(directory, client_id)
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
    path.unlink(missing_ok=True)
    return False


def _client_path(directory: Path, client_id: bytes) -> Path:
    return directory / "clients" / client_id.hex()


@contextmanager
def exclusive(path: Path, what: str, param: str = "data_dir") -> Iterator[None]:
    """Hold `path` locked for this process, and leave no file behind.

    Raises ConfigError: another process holds it (names `what`), or the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock_file(path)
    except BlockingIOError as error:
        raise ConfigError(f"another {what} is using {path.parent}", param=param) from error
    except OSError as error:
        raise ConfigError(f"cannot lock {path}: {error.strerror}", param=param) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _lock_file(path: Path) -> int:
    """An open, locked file that is the one at `path`. Raises BlockingIOError: locked by another process."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder unlinks the file before it lets go: between our open and our lock it may have.
            if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
