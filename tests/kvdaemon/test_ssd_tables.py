"""The tables of the SSD tier, on a real RocksDB."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import time
from pathlib import Path

import pytest

from kvdaemon.ssd.garbage import Garbage
from kvdaemon.ssd.tables import ChunkRecord, DatabaseInUse, Stalled, Tables
from kvdaemon.ssd.worker import DAMAGED_MARK, open_tables
from protocol.errors import PeerProtocolError
from protocol.messages import Manifest

_CAPACITY = 1024 * 1024 * 1024


def record(chunk_id: bytes, layers: int = 3, size: int = 1000) -> ChunkRecord:
    return ChunkRecord(chunk_id, b"p" * 16, b"n" * 16, b"g" * 16, 7, layers * size, 12.5, tuple(range(layers)))


def values(chunk_id: bytes, layers: int = 3, size: int = 1000) -> list[bytes]:
    return [bytes([chunk_id[0] ^ layer]) * size for layer in range(layers)]


def manifest(key: bytes, text: str = "hi") -> Manifest:
    return Manifest(key, b"n" * 16, b"\1\0\0\0", text, (b"c" * 16,), 1, ((2, 3),))


def test_chunk_round_trip_and_reopen(tmp_path: Path) -> None:
    """What is flushed at close is all there after opening again, byte by byte; a deleted chunk is gone, and its layers
    once their space was reclaimed."""
    tables = Tables(tmp_path / "ssd")
    kept, deleted = b"a" * 16, b"b" * 16
    for chunk_id in (kept, deleted):
        tables.put_chunk(record(chunk_id), values(chunk_id))
    tables.delete_chunks([deleted, b"never was here!!"])
    assert tables.has_unflushed_chunks
    tables.close()
    tables = Tables(tmp_path / "ssd")
    assert tables.record(kept) == record(kept)
    assert [tables.layer(record(kept), layer) for layer in range(3)] == values(kept)
    assert tables.record(deleted) is None
    reclaim_all(tables)
    assert [tables.layer(record(kept), layer) for layer in range(3)] == values(kept)
    assert all(tables.layer(record(deleted), layer) is None for layer in range(3))
    assert tables.layer(record(kept), 3) is None
    tables.close()


def test_a_chunk_written_again_leaves_nothing_of_the_older_copy(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "ssd")
    older = record(b"a" * 16)
    newer = dataclasses.replace(older, written_s=99.0)
    tables.put_chunk(older, values(b"a" * 16))
    tables.put_chunk(newer, values(b"z" * 16))
    assert tables.record(b"a" * 16) == newer
    reclaim_all(tables)
    assert [tables.layer(newer, layer) for layer in range(3)] == values(b"z" * 16)
    assert [tables.layer(older, layer) for layer in range(3)] == [None] * 3
    tables.close()


def test_listing_pages(tmp_path: Path) -> None:
    """Pages join to all records in key order; a damaged record comes as its bare id."""
    tables = Tables(tmp_path / "ssd")
    ids = sorted(bytes([n]) * 16 for n in range(10))
    for chunk_id in ids:
        tables.put_chunk(record(chunk_id), values(chunk_id))
    tables._chunks.put(ids[4], b"\x93nonsense")
    seen: list[object] = []
    after = b""
    while page := list(tables.records(after, 3)):
        seen += page
        after = page[-1] if isinstance(page[-1], bytes) else page[-1].chunk_id
    assert [item if isinstance(item, bytes) else item.chunk_id for item in seen] == ids  # type: ignore[attr-defined]
    assert seen[4] == ids[4]
    with pytest.raises(PeerProtocolError):
        tables.record(ids[4])
    tables.delete_chunks([ids[4]])
    assert tables.record(ids[4]) is None
    assert tables.layer(record(ids[5]), 0) is not None
    tables.close()


def test_manifests_survive_without_a_flush(tmp_path: Path) -> None:
    """Manifests go through the log: a database that was never closed has them after opening again."""
    tables = Tables(tmp_path / "ssd")
    saved = manifest(b"k" * 16, "grüße \ud800")
    tables.put_manifest(saved)
    tables.put_chunk(record(b"a" * 16), values(b"a" * 16))
    shutil.copytree(tmp_path / "ssd", tmp_path / "copy")  # as the disk is when the process is killed now
    tables.close()
    copy = Tables(tmp_path / "copy")
    assert copy.manifest(b"k" * 16) == saved
    assert copy.manifest(b"x" * 16) is None
    assert copy.record(b"a" * 16) is None  # and a chunk is whole or absent
    copy.close()


def test_damaged_manifest_is_an_error_and_the_oldest_go_first(tmp_path: Path) -> None:
    """A flipped byte in a manifest raises; dropping a share drops those saved first."""
    tables = Tables(tmp_path / "ssd")
    keys = [bytes([n]) * 16 for n in (5, 3, 4, 1)]
    for key in keys:
        tables.put_manifest(manifest(key))
    tables._manifests.put(b"z" * 16, b"\xff" * 8 + b"junk")
    with pytest.raises(PeerProtocolError):
        tables.manifest(b"z" * 16)
    tables.delete_manifest(b"z" * 16)
    assert tables.drop_oldest_manifests(0.5) == 2
    assert [tables.manifest(key) is None for key in keys] == [True, True, False, False]
    assert tables.manifest_bytes > 0
    tables.close()


def test_reclaiming_gives_space_back(tmp_path: Path) -> None:
    """Physical size follows the live chunks, and a file is rewritten in the room that is kept for it."""
    tables = Tables(tmp_path / "ssd", 128 * 1024 * 1024)
    ids = [bytes([n]) * 16 for n in range(40)]
    size = 300_000
    for chunk_id in ids:
        while True:
            try:
                tables.put_chunk(record(chunk_id, size=size), values(chunk_id, size=size))
                break
            except Stalled:  # the worker waits here, and lets reads pass
                time.sleep(0.05)
    tables.flush()
    full = tables.physical_bytes()
    assert full > 40 * 3 * size
    tables.delete_chunks(ids[4:])
    assert sum(len(garbage.chunks) for garbage in reclaim_all(tables)) == 36
    assert tables.physical_bytes() < full / 3
    assert tables.layer(record(ids[0]), 2) == values(ids[0], size=size)[2]
    tables.close()


@pytest.mark.parametrize("record_bytes", [b"", b"\xc1", b"\x90", b"\x97" + b"\xc0" * 7, b"\x93\x01\x02\x03"])
def test_garbage_is_no_record(record_bytes: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        ChunkRecord.unpack(b"c" * 16, record_bytes)


def test_damaged_database_is_moved_aside(tmp_path: Path) -> None:
    """A database that cannot be opened is kept beside, and a fresh one started; so is one that was marked. Only the
    latest is kept."""
    tables, moved = open_tables(tmp_path / "ssd", _CAPACITY)
    assert moved == ""
    tables.put_chunk(record(b"a" * 16), values(b"a" * 16))
    tables.close()
    for file in (tmp_path / "ssd").glob("MANIFEST-*"):
        file.write_bytes(b"\x00" * 100)
    tables, moved = open_tables(tmp_path / "ssd", _CAPACITY)
    assert Path(moved).is_dir()
    assert tables.record(b"a" * 16) is None
    tables.put_chunk(record(b"b" * 16), values(b"b" * 16))
    tables.close()
    (tmp_path / "ssd" / DAMAGED_MARK).touch()
    tables, moved_again = open_tables(tmp_path / "ssd", _CAPACITY)
    assert moved_again not in ("", moved)
    assert [str(kept) for kept in tmp_path.glob("ssd.damaged-*")] == [moved_again]
    assert tables.record(b"b" * 16) is None
    tables.close()


def test_a_damaged_block_of_records_costs_only_its_own(tmp_path: Path) -> None:
    """Bytes flipped in the table of records: the listing says so, and goes on behind the damage."""
    tables = Tables(tmp_path / "ssd")
    ids = [bytes([n, k]) * 8 for n in range(0, 250, 2) for k in range(8)]
    for chunk_id in ids:
        tables.put_chunk(record(chunk_id, layers=1, size=1), [b"x"])
    tables.close()
    files = sorted((tmp_path / "ssd").glob("*.sst"), key=lambda path: path.read_bytes().count(b"gggggggg"))
    raw = bytearray(files[-1].read_bytes())
    middle = len(raw) // 2
    raw[middle] ^= 0xFF
    files[-1].write_bytes(raw)
    tables = Tables(tmp_path / "ssd")
    found = list(tables.records(b"", 10_000))
    sound = [item.chunk_id for item in found if isinstance(item, ChunkRecord)]
    assert b"" in found
    assert len(sound) > 0.9 * len(ids)
    assert set(sound) < set(ids)
    tables.close()


def test_a_database_in_use_is_not_damaged(tmp_path: Path) -> None:
    """A lock held by somebody else must never move the directory away from under it."""
    tables = Tables(tmp_path / "ssd")
    with pytest.raises(DatabaseInUse):
        open_tables(tmp_path / "ssd", _CAPACITY)
    assert [path.name for path in tmp_path.iterdir()] == ["ssd"]
    tables.close()


def test_manifests_are_listed_in_pages_and_found_by_prefix(tmp_path: Path) -> None:
    """Pages join to all manifests in key order, each with its time; a damaged one comes without a manifest."""
    tables = Tables(tmp_path / "ssd")
    keys = sorted(bytes([n]) * 16 for n in range(10))
    before_s = time.time()
    for key in keys:
        tables.put_manifest(manifest(key))
    tables._manifests.put(keys[4], b"12345678 nonsense")
    seen = []
    after = b""
    while page := list(itertools.islice(tables.manifests_after(after), 3)):
        seen += page
        after = page[-1][0]
    assert [key for key, _, _ in seen] == keys
    assert [found for _, _, found in seen] == [None if n == 4 else manifest(key) for n, key in enumerate(keys)]
    assert all(before_s <= saved_s <= time.time() for _, saved_s, found in seen if found is not None)
    assert list(tables.turn_keys(b"\3" + bytes(15), b"\5" + b"\xff" * 15)) == keys[3:6]
    assert tables.has_manifest(keys[4])
    assert not tables.has_manifest(b"x" * 16)
    tables.close()


def test_what_is_deleted_and_compacted_is_in_no_file(tmp_path: Path) -> None:
    """Chunks from all over the database: after delete, flush and compaction of their files none of their bytes is left,
    all others are there, and most files were not rewritten."""
    tables = Tables(tmp_path / "ssd")
    victims, others = [], []
    for n in range(120):
        chunk_id = bytes([n]) * 16
        (victims if n in (3, 4, 60) else others).append(chunk_id)
        mark = b"ERASED" if chunk_id in victims else b"KEPT"
        layers = [mark + os.urandom(100_000) for _ in range(3)]
        tables.put_chunk(dataclasses.replace(record(chunk_id), written_s=1000.0 + n), layers)
        tables.put_manifest(manifest(chunk_id, text=mark.decode() * 20))
    tables.flush()
    files = {path.name for path in tables.path.glob("*.sst")}
    deleted, damaged = tables.delete_chunks([*victims, b"never was here!!"])
    assert [found.chunk_id for found in deleted] == victims
    assert damaged == []
    assert occurrences(tables.path, b"ERASED") > 0
    assert [len(garbage.chunks) for garbage in reclaim_all(tables)] == [2, 1]
    assert tables.garbage() == []
    kept = files & {path.name for path in tables.path.glob("*.sst")}
    assert len(kept) > len(files) / 2
    for victim in victims:
        tables.delete_manifest(victim)
    tables.flush()
    tables.compact_records()
    assert occurrences(tables.path, b"ERASED") == 0
    for chunk_id in others:
        found = tables.record(chunk_id)
        assert found is not None
        assert all((tables.layer(found, layer) or b"").startswith(b"KEPT") for layer in range(3))
        assert tables.manifest(chunk_id) is not None
    tables.close()


def test_a_chunk_evicted_long_before_leaves_no_bytes_either(tmp_path: Path) -> None:
    """Deleted, and its space not needed since: no record tells where it lay, but the note of its garbage does."""
    tables = Tables(tmp_path / "ssd")
    for n in range(30):
        mark = b"ERASED" if n == 7 else b"KEPT"
        chunk_id = bytes([n]) * 16
        tables.put_chunk(
            dataclasses.replace(record(chunk_id), written_s=1000.0 + n), [mark + os.urandom(1000) for _ in range(3)]
        )
    tables.flush()
    tables.delete_chunks([bytes([7]) * 16])
    tables.flush()
    assert occurrences(tables.path, b"ERASED") == 3
    tables.close()
    tables = Tables(tmp_path / "ssd")
    reclaim_all(tables)
    assert occurrences(tables.path, b"ERASED") == 0
    tables.close()


def test_the_only_manifest_leaves_no_bytes(tmp_path: Path) -> None:
    """RocksDB's default compaction would move the table with the value and the one with its deletion side by side."""
    tables = Tables(tmp_path / "ssd")
    tables.put_manifest(manifest(b"a" * 16, text="ERASED"))
    tables.flush()
    tables.delete_manifest(b"a" * 16)
    tables.flush()
    tables.compact_records()
    assert occurrences(tables.path, b"ERASED") == 0
    tables.close()


def test_a_chunk_that_came_back_is_no_garbage(tmp_path: Path) -> None:
    """A crash may keep the note of a chunk's garbage and lose its deletion: what a record speaks of is not buried."""
    tables = Tables(tmp_path / "ssd")
    ids = [bytes([n]) * 16 for n in range(4)]
    chunks = [dataclasses.replace(record(chunk_id), written_s=100.0 + n) for n, chunk_id in enumerate(ids)]
    for chunk in chunks:
        tables.put_chunk(chunk, values(chunk.chunk_id))
    tables.delete_chunks(ids[:2])
    tables._chunks.put(ids[0], chunks[0].pack())
    (garbage,) = reclaim_all(tables)
    assert len(garbage.chunks) == 2
    assert [tables.layer(chunk, 2) is not None for chunk in chunks] == [True, False, True, True]
    assert tables.garbage() == []
    tables.close()


def reclaim_all(tables: Tables) -> list[Garbage]:
    """As the worker does it."""
    tables.flush()
    found = tables.garbage()
    for garbage in found:
        before = tables.physical_bytes()
        tables.bury(garbage)
        tables.reclaim(garbage)
        tables.reclaimed(garbage)
        assert tables.physical_bytes() <= before + 2 * tables.file_bytes
        tables.flush()
    return found


def occurrences(directory: Path, marker: bytes) -> int:
    """In all files of a database, logs included."""
    return sum(path.read_bytes().count(marker) for path in directory.iterdir())
