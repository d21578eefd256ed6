"""RocksDB as we use it: three column families, and what is a key and a value in each.

    layers     time + chunk id + layer                 ->  keys, then values, of the chunk's tokens
    chunks     chunk id                                ->  ChunkRecord, MessagePack
    manifests  turn key                                ->  seconds since 1970 (8 bytes), then the message's frame

A chunk is written in one atomic batch without the write-ahead log: it is in DRAM too, and losing the last seconds of
them costs recomputing. Manifests are small and precious and go through the log.

The time of writing leads the key of a layer (microseconds, 8 bytes; the layer is 2 bytes, all big-endian; the record
knows it), so that tables never overlap and compaction moves files instead of rewriting them. Chunk ids alone are
hashes: with them in front, 2.4 GB of chunks cost 4.8 times as much writing, and the live memory of compactions.

Measured here (80 chunks of 6 MiB, 512 KiB a value): plain tables read 5.4 to 6.7 GB/s from the page cache against 3.5
to 4.2 of separated blobs, equal from the disk (0.7); direct I/O reads 0.5 to 0.7 always. So: plain tables, buffered.
"""

from __future__ import annotations

import bisect
import contextlib
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

from kvdaemon.failpoints import reach
from protocol.codec import Frame, decode, encode
from protocol.errors import CachedAttentionError, CapacityError, PeerError, PeerProtocolError
from protocol.ids import ID_BYTES
from protocol.messages import Manifest

_MIB = 1024 * 1024
_MEMTABLE_BYTES = 8 * _MIB  # at most four per column family, of which only `layers` ever fills one
_BLOCK_CACHE_BYTES = 4 * _MIB  # index and filter blocks and records; layers are read once and copied to the arena
_OPEN_FILES = 256
_PLACE = struct.Struct(f">Q{ID_BYTES}sH")
_SAVED_AT = struct.Struct(">d")
_FAMILIES = ("layers", "chunks", "manifests")


class DamagedDatabase(PeerError):
    """RocksDB reports corruption of the database itself, not of one record of ours."""


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
        return bytes(msgpack.packb(astuple(self)[1:]))

    @classmethod
    def unpack(cls, chunk_id: bytes, raw: bytes) -> ChunkRecord:
        """Raises PeerProtocolError: not a record."""
        try:
            parent, namespace, geometry, tokens, size, written_s, checksums = msgpack.unpackb(raw, use_list=False)
            record = cls(chunk_id, parent, namespace, geometry, int(tokens), int(size), float(written_s), checksums)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise PeerProtocolError(f"damaged record of chunk {chunk_id.hex()}") from error
        ids = (record.chunk_id, parent, namespace, geometry)
        if any(not isinstance(i, bytes) or len(i) != ID_BYTES for i in ids) or not isinstance(checksums, tuple):
            raise PeerProtocolError(f"damaged record of chunk {chunk_id.hex()}")
        return record


class Tables:
    """An open database. One thread at a time; every call may take as long as the disk does."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the database. Raises DamagedDatabase, CapacityError, PeerError: the disk says no."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        with _translated():
            self._db = rocksdict.Rdict(
                str(path), options=_options(), column_families={name: _options() for name in _FAMILIES}
            )
        self._layers, self._chunks, self._manifests = (self._db.get_column_family(name) for name in _FAMILIES)
        self._handles = {name: self._db.get_column_family_handle(name) for name in _FAMILIES}
        self._unlogged = rocksdict.WriteOptions()
        self._unlogged.disable_wal = True  # type: ignore[method-assign,assignment]  # a property; the stub says method
        # A stalled write would hold the interpreter lock, and the heartbeat with it; a refused one is tried again.
        self._unlogged.no_slowdown = True
        self.has_unflushed_chunks = False

    # -- chunks -------------------------------------------------------------------------------------------

    def put_chunk(self, record: ChunkRecord, layers: Sequence[bytes]) -> None:
        """Write a chunk atomically. Raises CapacityError: the disk is full; Stalled; DamagedDatabase; PeerError."""
        batch = rocksdict.WriteBatch(raw_mode=True)
        self._delete_layers(batch, record.chunk_id)  # of an older copy, which lies under another time
        for layer, value in enumerate(layers):
            batch.put(_layer_key(record, layer), value, self._handles["layers"])
        batch.put(record.chunk_id, record.pack(), self._handles["chunks"])
        with _translated():
            reach("put.before")
            self._db.write(batch, self._unlogged)
            reach("put.after")
        self.has_unflushed_chunks = True

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

    def delete_chunks(self, chunk_ids: Sequence[bytes]) -> None:
        """Forget chunks; ids that are not there do no harm. The space returns with compaction."""
        batch = rocksdict.WriteBatch(raw_mode=True)
        for chunk_id in chunk_ids:
            self._delete_layers(batch, chunk_id)
            batch.delete(chunk_id, self._handles["chunks"])
        with _translated():
            reach("delete.before")
            self._db.write(batch, self._unlogged)
            reach("delete.after")
        self.has_unflushed_chunks = True

    def _delete_layers(self, batch: rocksdict.WriteBatch, chunk_id: bytes) -> None:
        """Add to the batch what deletes a chunk's layers. Those of a damaged record cannot be found any more."""
        with contextlib.suppress(PeerProtocolError):
            record = self.record(chunk_id)
            if record is not None:
                for layer in range(len(record.checksums)):
                    batch.delete(_layer_key(record, layer), self._handles["layers"])

    def drop_unrecorded(self) -> int:
        """Delete layers that no record speaks of, which nobody would ever find. Returns of how many chunks.

        For the start: a crash between the flushes of two families leaves such layers, and they are the newest.
        """
        batch = rocksdict.WriteBatch(raw_mode=True)
        found: set[bytes] = set()
        cursor = self._layers.iter()
        cursor.seek_to_last()
        while cursor.valid():
            key = bytes(cursor.key())
            chunk_id = _PLACE.unpack(key)[1]
            if chunk_id not in found and self._is_recorded(key, chunk_id):
                break
            found.add(chunk_id)
            batch.delete(key, self._handles["layers"])
            cursor.prev()
        if found:
            with _translated():
                self._db.write(batch, self._unlogged)
            self.has_unflushed_chunks = True
        return len(found)

    def _is_recorded(self, layer_key: bytes, chunk_id: bytes) -> bool:
        """Whether there is a record, and it speaks of the layer at this key."""
        with contextlib.suppress(PeerProtocolError):
            record = self.record(chunk_id)
            return record is not None and layer_key.startswith(_layer_key(record, 0)[:-2])
        return False

    # -- manifests ----------------------------------------------------------------------------------------

    def put_manifest(self, manifest: Manifest) -> None:
        value = _SAVED_AT.pack(time.time()) + encode(Frame("part", 0, manifest))
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
            saved.append((value[: _SAVED_AT.size], turn_key))
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
            # layers without a record (see drop_unrecorded), or after a delete a record without layers, which reads as
            # missing.
            reach("flush.before")
            self._layers.flush()
            reach("flush.layers")
            self._chunks.flush()
            self._manifests.flush()
            reach("flush.after")
        self.has_unflushed_chunks = False

    def compact(self) -> None:
        """Rewrite the layers without what was deleted. Releases the interpreter lock; from a thread of its own."""
        with _translated():
            self._layers.compact_range(None, None)

    def group_by_file(self, chunk_ids: Sequence[bytes]) -> tuple[list[list[ChunkRecord]], list[bytes]]:
        """Those of `chunk_ids` that are there, the ones of one table file together, oldest first. Flushes.

        Deleted group by group, they make compaction rewrite the files that hold them, and none of those between.
        Second: the ids of damaged records, which alone knew where their layers lie.
        """
        self.flush()
        found: list[tuple[bytes, ChunkRecord]] = []
        damaged: list[bytes] = []
        for chunk_id in chunk_ids:
            try:
                record = self.record(chunk_id)
            except PeerProtocolError:
                damaged.append(chunk_id)
                continue
            if record is not None:
                found.append((_layer_key(record, 0), record))
        found.sort(key=lambda item: item[0])
        starts = sorted(file["start_key"] for file in self._layer_files())
        by_file = itertools.groupby(found, key=lambda item: bisect.bisect_right(starts, item[0]))
        return [[record for _, record in group] for _, group in by_file], damaged

    def compact_layers(self) -> None:
        """Rewrite the layers' files in which something was deleted and flushed. As `compact`, where that is little."""
        self._compact_deletions([self._layers], self._layer_files())

    def compact_records(self) -> None:
        """The same for records and manifests, whose keys do not tell one from the other."""
        files = [file for file in self._db.live_files() if len(file["start_key"]) == ID_BYTES]
        self._compact_deletions([self._chunks, self._manifests], files)

    def _compact_deletions(self, families: Sequence[rocksdict.Rdict], files: Sequence[dict[str, Any]]) -> None:
        ranges: list[tuple[bytes, bytes]] = []
        for first, last in sorted((f["start_key"], f["end_key"]) for f in files if f["num_deletions"]):
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(last, ranges[-1][1])
            else:
                ranges.append((first, last))
        for family, (first, last) in itertools.product(families, ranges):
            with _translated():
                reach("compact.before")
                family.compact_range(first, last, _rewriting())
                reach("compact.after")

    def _layer_files(self) -> list[dict[str, Any]]:
        """RocksDB's description of its table files, of the layers' family: their keys alone have this length."""
        return [file for file in self._db.live_files() if len(file["start_key"]) == _PLACE.size]

    def physical_bytes(self) -> int:
        """What the database takes on the disk, garbage not yet compacted included."""
        total = 0
        for entry in os.scandir(self.path):
            with contextlib.suppress(FileNotFoundError):  # RocksDB deletes files as we look
                total += entry.stat().st_blocks * 512
        return total

    def close(self) -> None:
        """Flush and close. Raises as put_chunk; closed all the same."""
        try:
            self.flush()
        finally:
            # Cuts a compaction short. Rdict.close would flush once more and fail for it; the last reference closes too.
            self._db.cancel_all_background(True)
            del self._layers, self._chunks, self._manifests, self._handles, self._db


def _options() -> rocksdict.Options:
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    # KV is noise to a compressor.
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_write_buffer_size(_MEMTABLE_BYTES)
    options.set_max_write_buffer_number(4)
    options.set_target_file_size_base(64 * _MIB)
    options.set_max_open_files(_OPEN_FILES)
    options.set_max_background_jobs(2)
    # Without the log, a crash between the flushes of two families would leave a record without its layers.
    options.set_atomic_flush(True)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(4 * _MIB)
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


def _layer_key(record: ChunkRecord, layer: int) -> bytes:
    return _PLACE.pack(int(record.written_s * 1e6), record.chunk_id, layer)


def _unpack_manifest(turn_key: bytes, raw: bytes) -> tuple[float, Manifest]:
    """When it was saved, and the manifest. Raises PeerProtocolError: damaged."""
    body = decode(raw[_SAVED_AT.size :]).body
    if not isinstance(body, Manifest) or body.turn_key != turn_key:
        raise PeerProtocolError(f"damaged manifest {turn_key.hex()}")
    (saved_s,) = _SAVED_AT.unpack_from(raw)
    return float(saved_s), body


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
        if "Corruption" in text:
            raise DamagedDatabase(text) from error
        if "Incomplete" in text or "incomplete" in text:
            raise Stalled(text) from error
        raise PeerError(text) from error
