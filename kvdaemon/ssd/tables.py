"""RocksDB as we use it: two column families, and what is a key and a value in each.

    chunks     chunk id  ->  seal (8 bytes), then the ChunkRecord, MessagePack
    manifests  turn key  ->  seal, seconds since 1970 (8 bytes), the message's frame

The KV itself lies in chunk files beside (chunk_files.py), and a record says where. It is put when the KV is there, and
deleted before its place is given to another: a record speaks of what is at its place, or a crash of the whole machine
came between, and the checksums tell. All of it goes through the log, so what is acknowledged survives this process.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgpack
import rocksdict
import xxhash

from kvdaemon.failpoints import reach
from kvdaemon.ssd.chunk_files import Place
from protocol.codec import Frame, decode, encode
from protocol.errors import CachedAttentionError, CapacityError, PeerError, PeerProtocolError
from protocol.ids import ID_BYTES
from protocol.messages import Manifest

_MIB = 1024 * 1024
_GIB = 1024 * _MIB
# Sizes of files and of what lies in memory before: a small share of the tier, which compaction takes twice.
_FILE_SHARE = 1 / 256
_FILE_BYTES = (256 * 1024, 16 * _MIB)
_BLOCK_CACHE_BYTES = 8 * _MIB
_OPEN_FILES = 256
_LOOK_AGAIN_S = 0.1  # at the files' sizes
_SAVED_AT = struct.Struct(">d")
_SEAL = struct.Struct(">Q")
_REFUSALS = tuple(map(os.strerror, (errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENOMEM)))
_FAMILIES = ("chunks", "manifests")


class DamagedDatabase(PeerError):
    """RocksDB reports corruption of the database itself, not of one record of ours."""


class Refused(PeerError):
    """The operating system refuses, by a right or a limit; nothing says that the database is damaged."""


class DatabaseInUse(PeerError):
    """Another process has it open."""


class Stalled(PeerError):
    """RocksDB cannot take a write right now; later it will."""


class ChunkRecord(NamedTuple):
    """What the SSD tier knows of a chunk.

    size_bytes: of its KV. place: of it in the chunk files. checksums: xxh3-64 of each layer's keys, then values.
    """

    chunk_id: bytes
    parent_id: bytes
    namespace: bytes
    geometry: bytes
    tokens: int
    size_bytes: int
    place: Place
    written_s: float
    checksums: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.checksums)

    @property
    def layer_bytes(self) -> int:
        """Keys and values of one layer."""
        return self.size_bytes // self.layers

    @property
    def layer_stride(self) -> int:
        """From one layer to the next, at its place."""
        return self.place.slot_bytes // self.layers

    def pack(self) -> bytes:
        return _sealed(self.chunk_id, bytes(msgpack.packb(self[1:])))

    @classmethod
    def unpack(cls, chunk_id: bytes, raw: bytes) -> ChunkRecord:
        """Raises PeerProtocolError: not a record, or another chunk's."""
        try:
            body = _unsealed(chunk_id, raw)
            parent, namespace, geometry, tokens, size, (slot_bytes, slot), written_s, checksums = msgpack.unpackb(
                body, use_list=False
            )
            layers = len(checksums)
            # Sums and comparisons raise for what is no number. One line of checks: a start reads millions of records.
            if (
                len(chunk_id) + len(parent) + len(namespace) + len(geometry) != 4 * ID_BYTES
                or not (tokens > 0 < size and slot >= 0 < layers and written_s + slot_bytes >= 0)
                or size // layers > slot_bytes // layers
            ):
                raise ValueError("its numbers cannot be")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise PeerProtocolError(f"damaged record of chunk {chunk_id.hex()}") from error
        place = Place(slot_bytes, slot)
        return cls(chunk_id, parent, namespace, geometry, tokens, size, place, written_s, checksums)


class Tables:
    """An open database. One thread at a time; every call may take as long as the disk does."""

    def __init__(self, path: Path, capacity_bytes: int = 8 * _GIB) -> None:
        """Opens or makes the database. Raises DamagedDatabase, CapacityError, Refused, PeerError: the disk says no.

        capacity_bytes: of the tier; gives files their size, `file_bytes`.
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self.file_bytes = min(max(int(capacity_bytes * _FILE_SHARE), _FILE_BYTES[0]), _FILE_BYTES[1])
        options = _options(self.file_bytes)
        with _translated():
            self._db = rocksdict.Rdict(str(path), options=options, column_families=dict.fromkeys(_FAMILIES, options))
        self._chunks, self._manifests = map(self._db.get_column_family, _FAMILIES)
        self._chunks_handle = self._db.get_column_family_handle("chunks")
        self._prompt = rocksdict.WriteOptions()
        # A stalled write would hold the interpreter lock, and the heartbeat with it; a refused one is tried again.
        self._prompt.no_slowdown = True
        self.has_unsynced = False  # puts and deletes say so; who syncs takes it back
        self._looked_s = float("-inf")
        self._size_then = 0  # when we looked

    # -- chunks -------------------------------------------------------------------------------------------

    def put_chunk(self, record: ChunkRecord) -> Place | None:
        """Put the record of a chunk whose KV is at its place. Returns where an older copy lies, if there is one.

        Raises CapacityError: the disk is full; Stalled; DamagedDatabase; PeerError.
        """
        older: ChunkRecord | None = None
        with contextlib.suppress(PeerProtocolError):
            older = self.record(record.chunk_id)
        with _translated():
            reach("put.before")
            self._chunks.put(record.chunk_id, record.pack(), self._prompt)
            reach("put.after")
        self.has_unsynced = True
        return older.place if older is not None else None

    def record(self, chunk_id: bytes) -> ChunkRecord | None:
        """The chunk's record, or None. Raises PeerProtocolError: damaged."""
        raw = _value(self._chunks, chunk_id)
        return None if raw is None else ChunkRecord.unpack(chunk_id, raw)

    def records(self, after: bytes, limit: int) -> Iterator[ChunkRecord | bytes]:
        """Up to `limit` records in key order after `after`; of a damaged one its bare id.

        Where RocksDB finds a whole block of records damaged, b"" stands for it, and the listing goes on with the next
        first byte of a chunk id: at most 1/256 of the sound records are passed over.
        """
        for key, value in itertools.islice(_walk(self._chunks, after), limit):
            try:
                yield ChunkRecord.unpack(key, value) if key else b""
            except PeerProtocolError:
                yield key

    def delete_chunks(self, chunk_ids: Sequence[bytes]) -> tuple[list[ChunkRecord], list[bytes]]:
        """Forget chunks; ids that are not there do no harm. Raises as put_chunk.

        Returns the records of those that were there, and the ids of damaged records, which alone knew where the KV is.
        """
        batch = rocksdict.WriteBatch(raw_mode=True)
        deleted: list[ChunkRecord] = []
        damaged: list[bytes] = []
        for chunk_id in chunk_ids:
            try:
                record = self.record(chunk_id)
            except PeerProtocolError:
                damaged.append(chunk_id)
            else:
                if record is None:
                    continue
                deleted.append(record)
            batch.delete(chunk_id, self._chunks_handle)
        with _translated():
            reach("delete.before")
            self._db.write(batch, self._prompt)
            reach("delete.after")
        self.has_unsynced = True
        return deleted, damaged

    # -- manifests ----------------------------------------------------------------------------------------

    def put_manifest(self, manifest: Manifest) -> None:
        value = _sealed(manifest.turn_key, _SAVED_AT.pack(time.time()) + encode(Frame("part", 0, manifest)))
        with _translated():
            reach("put_manifest.before")
            self._manifests.put(manifest.turn_key, value)
            reach("put_manifest.after")
        self.has_unsynced = True

    def manifest(self, turn_key: bytes) -> Manifest | None:
        """Raises PeerProtocolError: damaged."""
        raw = _value(self._manifests, turn_key)
        return None if raw is None else _unpack_manifest(turn_key, raw)[1]

    def manifests_after(self, after: bytes) -> Iterator[tuple[bytes, float, Manifest | None]]:
        """Turn keys in order after `after`, when each was saved (seconds since 1970), and the manifest.

        None: a damaged one. b"" stands for a damaged block of them, as in `records`.
        """
        for turn_key, value in _walk(self._manifests, after):
            try:
                yield turn_key, *_unpack_manifest(turn_key, value)
            except PeerProtocolError:
                yield turn_key, 0.0, None

    def turn_keys(self, low: bytes, high: bytes) -> Iterator[bytes]:
        """The keys of manifests from `low` to `high`, both included, ascending."""
        cursor = self._manifests.iter()
        cursor.seek(low)
        while cursor.valid() and bytes(cursor.key()) <= high:
            yield bytes(cursor.key())
            cursor.next()

    def has_manifest(self, turn_key: bytes) -> bool:
        return _value(self._manifests, turn_key) is not None

    def delete_manifest(self, turn_key: bytes) -> None:
        with _translated():
            reach("delete_manifest.before")
            self._manifests.delete(turn_key)
            reach("delete_manifest.after")
        self.has_unsynced = True

    def drop_oldest_manifests(self, share: float) -> int:
        """Delete this share of the manifests, the oldest by when they were saved. Returns how many."""
        saved: list[tuple[bytes, bytes]] = []
        for turn_key, value in self._manifests.items():
            assert isinstance(turn_key, bytes)  # raw mode
            saved.append((value[_SEAL.size : _SEAL.size + _SAVED_AT.size], turn_key))
        saved.sort()
        victims = saved[: int(len(saved) * share)]
        for _, turn_key in victims:
            self.delete_manifest(turn_key)
        return len(victims)

    @property
    def manifests(self) -> int:
        """About how many manifests there are."""
        return int(self._manifests.property_int_value("rocksdb.estimate-num-keys") or 0)

    @property
    def manifest_bytes(self) -> int:
        """About how much they take."""
        live = int(self._manifests.property_int_value("rocksdb.estimate-live-data-size") or 0)
        return live + int(self._manifests.property_int_value("rocksdb.cur-size-all-mem-tables") or 0)

    # -- the database -------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Have everything put so far survive the machine. Raises as put_chunk."""
        with _translated():
            reach("flush.before")
            self._db.flush_wal(True)
            reach("flush.after")

    def flush(self) -> None:
        """Write what is in memory to tables; its log goes. Raises as put_chunk."""
        with _translated():
            self._chunks.flush()
            self._manifests.flush()

    def compact_records(self) -> None:
        """Rewrite the files of records and manifests in which something was deleted and flushed.

        Their keys do not tell one from the other. Releases the interpreter lock; beside other calls.
        """
        ranges: list[tuple[bytes, bytes]] = []
        for first, last in sorted((f["start_key"], f["end_key"]) for f in self._db.live_files() if f["num_deletions"]):
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(last, ranges[-1][1])
            else:
                ranges.append((first, last))
        for family, (first, last) in itertools.product((self._chunks, self._manifests), ranges):
            with _translated():
                reach("compact.before")
                family.compact_range(first, last, _rewriting())
                reach("compact.after")
        self._looked_s = float("-inf")

    def physical_bytes(self) -> int:
        """What the database takes on the disk. A moment old at most, and often asked: cheap."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _LOOK_AGAIN_S:
            self._looked_s, self._size_then = now_s, 0
            for entry in os.scandir(self.path):
                with contextlib.suppress(FileNotFoundError):  # RocksDB deletes files as we look
                    self._size_then += entry.stat().st_blocks * 512 if entry.is_file() else 0
        return self._size_then

    def close(self) -> None:
        """Flush and close. Raises as put_chunk; closed all the same."""
        try:
            self.flush()
        finally:
            # Cuts a compaction short. Rdict.close would flush once more and fail for it; the last reference closes too.
            self._db.cancel_all_background(True)
            del self._chunks, self._manifests, self._chunks_handle, self._db


def _options(file_bytes: int) -> rocksdict.Options:
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    # Ids and checksums are noise to a compressor, and manifests small.
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_write_buffer_size(file_bytes)
    options.set_max_write_buffer_number(4)
    options.set_target_file_size_base(file_bytes)
    options.set_max_open_files(_OPEN_FILES)
    options.set_max_background_jobs(2)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(min(file_bytes, 4 * _MIB))
    options.set_manifest_preallocation_size(64 * 1024)
    options.set_max_total_wal_size(2 * file_bytes)
    table = rocksdict.BlockBasedOptions()
    table.set_block_cache(rocksdict.Cache(_BLOCK_CACHE_BYTES))
    table.set_bloom_filter(10, False)
    options.set_block_based_table_factory(table)
    return options


def _rewriting() -> rocksdict.CompactOptions:
    """Compaction that rewrites files of the bottom level too.

    A table of one deleted key, and one that begins with that key, do not overlap for RocksDB: by default it moves both
    to the bottom as they are, and the deleted value stays in its file for good.
    """
    options = rocksdict.CompactOptions()
    options.set_bottommost_level_compaction(rocksdict.BottommostLevelCompaction.force_optimized())
    return options


def _unpack_manifest(turn_key: bytes, raw: bytes) -> tuple[float, Manifest]:
    """When it was saved, and the manifest. Raises PeerProtocolError: damaged."""
    value = _unsealed(turn_key, raw)
    body = decode(value[_SAVED_AT.size :]).body
    if not isinstance(body, Manifest) or body.turn_key != turn_key:
        raise PeerProtocolError(f"damaged manifest {turn_key.hex()}")
    (saved_s,) = _SAVED_AT.unpack_from(value)
    return float(saved_s), body


def _sealed(key: bytes, value: bytes) -> bytes:
    """The value behind a digest that binds it to its key: RocksDB's own checksums know nothing of which is whose."""
    return _SEAL.pack(xxhash.xxh3_64_intdigest(key + value)) + value


def _unsealed(key: bytes, raw: bytes) -> bytes:
    """Raises PeerProtocolError: not what was put under this key."""
    value = raw[_SEAL.size :]
    if len(raw) < _SEAL.size or _SEAL.unpack_from(raw) != (xxhash.xxh3_64_intdigest(key + value),):
        raise PeerProtocolError(f"damaged value of {key.hex()}")
    return value


def _walk(family: rocksdict.Rdict, after: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a family in key order after `after`.

    Where RocksDB finds a whole block damaged, (b"", b"") stands for it, and the walk goes on with the next first byte.
    Raises PeerError: the disk cannot be read.
    """
    cursor = family.iter()
    position = after
    if after:
        cursor.seek(after)
        if cursor.valid() and cursor.key() == after:
            cursor.next()
    else:
        cursor.seek_to_first()
    valid, key, value, advance = cursor.valid, cursor.key, cursor.value, cursor.next
    while True:
        if valid():
            position = key()
            yield position, value()
            advance()
        elif _is_broken(cursor):
            yield b"", b""
            following = (position[0] if position else 0) + 1
            if following > 0xFF:
                return
            position = bytes([following])
            cursor.seek(position)
        else:
            return


def _is_broken(cursor: rocksdict.RdictIter) -> bool:
    """Whether an iterator that came to an end came to a damaged block. Raises PeerError: the disk cannot be read."""
    try:
        with _translated():
            cursor.status()
    except DamagedDatabase:
        return True
    return False


def _value(family: rocksdict.Rdict, key: bytes) -> bytes | None:
    """Raises PeerProtocolError: RocksDB finds the block damaged; PeerError: the disk cannot be read."""
    try:
        with _translated():
            value = family.get(key)
    except DamagedDatabase as error:
        raise PeerProtocolError(error.message) from error
    return None if value is None else bytes(value)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """rocksdict raises bare Exceptions with RocksDB's status as text; make errors of ours of them."""
    try:
        yield
    except CachedAttentionError:
        raise
    except Exception as error:
        text = str(error)
        if "No space" in text or "Quota" in text or "NoSpace" in text:
            raise CapacityError(f"the disk is full: {text}") from error
        if "/LOCK:" in text or "lock hold by" in text:
            raise DatabaseInUse(text) from error
        if any(reason in text for reason in _REFUSALS):
            raise Refused(text) from error
        if "Corruption" in text:
            raise DamagedDatabase(text) from error
        if "Incomplete" in text or "incomplete" in text:
            raise Stalled(text) from error
        raise PeerError(text) from error
