"""RocksDB as we use it: four column families, and what is a key and a value in each.

    layers     time + chunk id + layer                 ->  keys, then values, of the chunk's tokens
    chunks     chunk id                                ->  seal (8 bytes), then the ChunkRecord, MessagePack
    retired    time + chunk id                         ->  layers and bytes of a deleted chunk that still takes space
    manifests  turn key                                ->  seal, seconds since 1970 (8 bytes), the message's frame

A chunk is written in one atomic batch without the write-ahead log: it is in DRAM too, and losing the last seconds of
them costs recomputing. Manifests are small and precious and go through the log.

The time of writing leads the key of a layer (microseconds, 8 bytes; the layer is 2 bytes, all big-endian; the record
knows it), so that tables never overlap and compaction moves files instead of rewriting them. Chunk ids alone are
hashes: with them in front, 2.4 GB of chunks cost 4.8 times as much writing, and the live memory of compactions.

Measured here (80 chunks of 6 MiB, 512 KiB a value): plain tables read 5.4 to 6.7 GB/s from the page cache against 3.5
to 4.2 of separated blobs, equal from the disk (0.7); direct I/O reads 0.5 to 0.7 always. So: plain tables, buffered.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import msgpack
import rocksdict
import xxhash

from kvdaemon.failpoints import reach
from kvdaemon.ssd.garbage import Garbage, Retired, TableFile, by_file
from protocol.codec import Frame, decode, encode
from protocol.errors import CachedAttentionError, CapacityError, PeerError, PeerProtocolError
from protocol.ids import ID_BYTES
from protocol.messages import Manifest

_MIB = 1024 * 1024
_GIB = 1024 * _MIB
# Sizes of files and of what lies in memory before: a small share of the tier, so that rewriting one needs little space.
_FILE_SHARE = 1 / 64
_FILE_BYTES = (256 * 1024, 64 * _MIB)
_MEMTABLE_BYTES = 8 * _MIB  # at most, and four per column family, of which only `layers` ever fills one
_BLOCK_CACHE_BYTES = 4 * _MIB  # index and filter blocks and records; layers are read once and copied to the arena
_OPEN_FILES = 256
_PLACE = struct.Struct(f">Q{ID_BYTES}s")
_LAYER = struct.Struct(">H")
_RETIRED = struct.Struct(">HQ")
_LOOK_AGAIN_S = 0.1  # at the files' sizes
_SAVED_AT = struct.Struct(">d")
_SEAL = struct.Struct(">Q")
_REFUSALS = tuple(map(os.strerror, (errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENOMEM)))
_FAMILIES = ("layers", "chunks", "retired", "manifests")


class DamagedDatabase(PeerError):
    """RocksDB reports corruption of the database itself, not of one record of ours."""


class Refused(PeerError):
    """The operating system refuses, by a right or a limit; nothing says that the database is damaged."""


class DatabaseInUse(PeerError):
    """Another process has it open."""


class Stalled(PeerError):
    """RocksDB cannot take a write right now; later it will."""


@dataclass(frozen=True)
class ChunkRecord:
    """What the SSD tier knows of a chunk. checksums: xxh3-64 of each layer's keys, then values."""

    chunk_id: bytes
    parent_id: bytes
    namespace: bytes
    geometry: bytes
    tokens: int
    size_bytes: int
    written_s: float
    checksums: tuple[int, ...]

    def pack(self) -> bytes:
        return _sealed(self.chunk_id, bytes(msgpack.packb(astuple(self)[1:])))

    @classmethod
    def unpack(cls, chunk_id: bytes, raw: bytes) -> ChunkRecord:
        """Raises PeerProtocolError: not a record, or another chunk's."""
        try:
            body = _unsealed(chunk_id, raw)
            parent, namespace, geometry, tokens, size, written_s, checksums = msgpack.unpackb(body, use_list=False)
            record = cls(chunk_id, parent, namespace, geometry, int(tokens), int(size), float(written_s), checksums)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise PeerProtocolError(f"damaged record of chunk {chunk_id.hex()}") from error
        ids = (record.chunk_id, parent, namespace, geometry)
        if any(not isinstance(i, bytes) or len(i) != ID_BYTES for i in ids) or not isinstance(checksums, tuple):
            raise PeerProtocolError(f"damaged record of chunk {chunk_id.hex()}")
        return record


class Tables:
    """An open database. One thread at a time; every call may take as long as the disk does."""

    def __init__(self, path: Path, capacity_bytes: int = 8 * _GIB) -> None:
        """Opens or makes the database. Raises DamagedDatabase, CapacityError, Refused, PeerError: the disk says no.

        capacity_bytes: what it shall take on the disk; it gives files their size, `file_bytes` and no more than a chunk
        beside. The caller asks for `used_bytes`.
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self.file_bytes = min(max(int(capacity_bytes * _FILE_SHARE), _FILE_BYTES[0]), _FILE_BYTES[1])
        options = _options(self.file_bytes)
        with _translated():
            self._db = rocksdict.Rdict(str(path), options=options, column_families=dict.fromkeys(_FAMILIES, options))
        self._layers, self._chunks, self._retired, self._manifests = map(self._db.get_column_family, _FAMILIES)
        self._handles = {name: self._db.get_column_family_handle(name) for name in _FAMILIES}
        self._unlogged = rocksdict.WriteOptions()
        self._unlogged.disable_wal = True  # type: ignore[method-assign,assignment]  # a property; the stub says method
        # A stalled write would hold the interpreter lock, and the heartbeat with it; a refused one is tried again.
        self._unlogged.no_slowdown = True
        self.has_unflushed_chunks = False
        self._looked_s = float("-inf")
        self._used_then = 0  # when we looked
        self._put_since = 0

    # -- chunks -------------------------------------------------------------------------------------------

    def put_chunk(self, record: ChunkRecord, layers: Sequence[bytes]) -> None:
        """Write a chunk atomically. Raises CapacityError: the disk is full; Stalled; DamagedDatabase; PeerError."""
        batch = rocksdict.WriteBatch(raw_mode=True)
        with contextlib.suppress(PeerProtocolError):
            self._retire(batch, record.chunk_id)  # an older copy, which lies under another time
        for layer, value in enumerate(layers):
            batch.put(_layer_key(record, layer), value, self._handles["layers"])
        batch.put(record.chunk_id, record.pack(), self._handles["chunks"])
        with _translated():
            reach("put.before")
            self._db.write(batch, self._unlogged)
            reach("put.after")
        self.has_unflushed_chunks = True
        self._put_since += record.size_bytes

    def record(self, chunk_id: bytes) -> ChunkRecord | None:
        """The chunk's record, or None. Raises PeerProtocolError: damaged."""
        raw = _value(self._chunks, chunk_id)
        return None if raw is None else ChunkRecord.unpack(chunk_id, raw)

    def layer(self, record: ChunkRecord, layer: int) -> bytes | None:
        """A layer's keys, then values, unverified; or None. Raises PeerProtocolError: RocksDB finds it damaged."""
        return _value(self._layers, _layer_key(record, layer))

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
        """Forget chunks; ids that are not there do no harm. Their space returns when their garbage is reclaimed.

        Returns the records of those that were there, and the ids of damaged records, which alone knew where layers lie.
        """
        batch = rocksdict.WriteBatch(raw_mode=True)
        deleted: list[ChunkRecord] = []
        damaged: list[bytes] = []
        for chunk_id in chunk_ids:
            try:
                record = self._retire(batch, chunk_id)
            except PeerProtocolError:
                damaged.append(chunk_id)
            else:
                if record is None:
                    continue
                deleted.append(record)
            batch.delete(chunk_id, self._handles["chunks"])
        with _translated():
            reach("delete.before")
            self._db.write(batch, self._unlogged)
            reach("delete.after")
        self.has_unflushed_chunks = True
        return deleted, damaged

    # -- garbage ------------------------------------------------------------------------------------------

    def _retire(self, batch: rocksdict.WriteBatch, chunk_id: bytes) -> ChunkRecord | None:
        """Add to the batch that a chunk's layers are garbage. Returns its record. Raises PeerProtocolError: damaged."""
        record = self.record(chunk_id)
        if record is not None:
            value = _RETIRED.pack(len(record.checksums), record.size_bytes)
            batch.put(_place(record), value, self._handles["retired"])
        return record

    def retire_unrecorded(self) -> int:
        """Make garbage of layers that no record speaks of, which nobody would ever find. Returns of how many chunks.

        For the start: a crash between the flushes of two families leaves such layers, and they are the newest.
        """
        found: dict[bytes, tuple[int, int]] = {}  # place -> layers, bytes
        cursor = self._layers.iter()
        cursor.seek_to_last()
        while cursor.valid():
            key = bytes(cursor.key())
            place = key[: _PLACE.size]
            if place not in found and (self._is_recorded(place) or _value(self._retired, place) is not None):
                break
            layers, size = found.get(place, (0, 0))
            found[place] = layers + 1, size + len(cursor.value())
            cursor.prev()
        for place, (layers, size) in found.items():
            with _translated():
                self._retired.put(place, _RETIRED.pack(layers, size), self._unlogged)
            self.has_unflushed_chunks = True
        return len(found)

    def _is_recorded(self, place: bytes) -> bool:
        """Whether there is a record that speaks of the layers at this place."""
        with contextlib.suppress(PeerProtocolError):
            record = self.record(_PLACE.unpack(place)[1])
            return record is not None and _place(record) == place
        return False

    def garbage(self) -> list[Garbage]:
        """What deleted chunks still take, by file, the file with the largest share of it first."""
        retired = [Retired(place, *_RETIRED.unpack(value)) for place, value in _walk(self._retired, b"") if place]
        files = [TableFile(file["start_key"], file["size"]) for file in self._layer_files()]
        return by_file(retired, files)

    def bury(self, garbage: Garbage) -> None:
        """Write and flush tombstones for the garbage of one file. Raises as put_chunk."""
        batch = rocksdict.WriteBatch(raw_mode=True)
        for chunk in garbage.chunks:
            if not self._is_recorded(chunk.place):  # else a crash undid its deletion, but not this note of it
                for layer in range(chunk.layers):
                    batch.delete(chunk.place + _LAYER.pack(layer), self._handles["layers"])
        with _translated():
            # Flushed before too: a table with new layers and with tombstones of old ones spans all between.
            self._layers.flush()
            self._db.write(batch, self._unlogged)
            self._layers.flush()

    def reclaim(self, garbage: Garbage) -> None:
        """Rewrite the file without what was buried. Releases the interpreter lock; from a thread of its own."""
        with _translated():
            reach("compact.before")
            first = garbage.chunks[0].place + _LAYER.pack(0)
            last = garbage.chunks[-1].place + _LAYER.pack(0xFFFF)
            self._layers.compact_range(first, last, _rewriting())
            reach("compact.after")
        self._looked_s = float("-inf")

    def reclaimed(self, garbage: Garbage) -> None:
        """Forget garbage that takes no space any more."""
        batch = rocksdict.WriteBatch(raw_mode=True)
        for chunk in garbage.chunks:
            batch.delete(chunk.place, self._handles["retired"])
        with _translated():
            self._db.write(batch, self._unlogged)
        self.has_unflushed_chunks = True

    # -- manifests ----------------------------------------------------------------------------------------

    def put_manifest(self, manifest: Manifest) -> None:
        value = _sealed(manifest.turn_key, _SAVED_AT.pack(time.time()) + encode(Frame("part", 0, manifest)))
        with _translated():
            reach("put_manifest.before")
            self._manifests.put(manifest.turn_key, value)
            reach("put_manifest.after")

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

    def flush(self) -> None:
        """Make everything written so far survive this process. Raises as put_chunk."""
        with _translated():
            # Rdict.flush means one family. Layers before the records that speak of them: a crash in between leaves
            # layers without a record, see retire_unrecorded. The note of a deleted chunk's space before its deletion:
            # a crash in between leaves a note of a chunk that lives, see bury.
            reach("flush.before")
            self._layers.flush()
            reach("flush.layers")
            self._retired.flush()
            self._chunks.flush()
            self._manifests.flush()
            reach("flush.after")
        self.has_unflushed_chunks = False

    def compact_records(self) -> None:
        """Rewrite the files of records and manifests in which something was deleted and flushed.

        Their keys do not tell one from the other. Releases the interpreter lock; from a thread of its own.
        """
        files = [file for file in self._db.live_files() if len(file["start_key"]) == ID_BYTES]
        ranges: list[tuple[bytes, bytes]] = []
        for first, last in sorted((f["start_key"], f["end_key"]) for f in files if f["num_deletions"]):
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(last, ranges[-1][1])
            else:
                ranges.append((first, last))
        for family, (first, last) in itertools.product((self._chunks, self._manifests), ranges):
            with _translated():
                family.compact_range(first, last, _rewriting())

    def _layer_files(self) -> list[dict[str, Any]]:
        """RocksDB's description of its table files, of the layers' family: their keys alone have this length."""
        size = _PLACE.size + _LAYER.size
        return [file for file in self._db.live_files() if len(file["start_key"]) == size]

    def physical_bytes(self) -> int:
        """What the database takes on the disk, garbage not yet compacted included."""
        total = 0
        for entry in os.scandir(self.path):
            with contextlib.suppress(FileNotFoundError):  # RocksDB deletes files as we look
                total += entry.stat().st_blocks * 512
        return total

    def used_bytes(self) -> int:
        """As physical_bytes, with what waits in memory for its flush. Never too little, and often asked: cheap."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _LOOK_AGAIN_S:
            self._looked_s, self._put_since = now_s, 0
            waiting = int(self._layers.property_int_value("rocksdb.cur-size-all-mem-tables") or 0)
            self._used_then = waiting + self.physical_bytes()
        return self._used_then + self._put_since

    def close(self) -> None:
        """Flush and close. Raises as put_chunk; closed all the same."""
        try:
            self.flush()
        finally:
            # Cuts a compaction short. Rdict.close would flush once more and fail for it; the last reference closes too.
            self._db.cancel_all_background(True)
            del self._layers, self._chunks, self._retired, self._manifests, self._handles, self._db


def _options(file_bytes: int) -> rocksdict.Options:
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    # KV is noise to a compressor.
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_write_buffer_size(min(file_bytes, _MEMTABLE_BYTES))
    options.set_max_write_buffer_number(4)
    options.set_target_file_size_base(file_bytes)
    options.set_max_open_files(_OPEN_FILES)
    options.set_max_background_jobs(2)
    # Without the log, a crash between the flushes of two families would leave a record without its layers.
    options.set_atomic_flush(True)
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


def _place(record: ChunkRecord) -> bytes:
    return _PLACE.pack(int(record.written_s * 1e6), record.chunk_id)


def _layer_key(record: ChunkRecord, layer: int) -> bytes:
    return _place(record) + _LAYER.pack(layer)


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
    while True:
        if cursor.valid():
            position = bytes(cursor.key())
            yield position, bytes(cursor.value())
            cursor.next()
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
