"""The tables of the SSD tier, on a real RocksDB."""

from __future__ import annotations

import itertools
import mmap
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from kvdaemon.ssd.chunk_files import Place
from kvdaemon.ssd.tables import ChunkRecord, DatabaseInUse, Tables, _sealed
from kvdaemon.ssd.worker import DAMAGED_MARK, open_tier
from protocol.errors import PeerProtocolError
from protocol.lineage import Truncation
from protocol.messages import Manifest

_CAPACITY = 1024 * 1024 * 1024


def record(chunk_id: bytes, slot: int = 0) -> ChunkRecord:
    return ChunkRecord(chunk_id, b"p" * 16, b"n" * 16, b"g" * 16, 7, 3000, Place(12288, slot), 12.5, (0, 1, 2**64 - 1))


def manifest(key: bytes, text: str = "hi") -> Manifest:
    return Manifest(key, b"n" * 16, b"\1\0\0\0", text, (b"c" * 16,), 1, (Truncation(1, 0, 1),))


def test_round_trip_and_reopen(tmp_path: Path) -> None:
    """What was put is there after opening again, what was deleted is not; a deletion tells where the KV was."""
    tables = Tables(tmp_path / "ssd")
    kept, deleted = b"a" * 16, b"b" * 16
    for chunk_id in (kept, deleted):
        assert tables.put_chunk(record(chunk_id, slot=chunk_id[0])) is None
    assert tables.has_unsynced
    assert tables.delete_chunks([deleted, b"never was here!!"]) == ([record(deleted, slot=ord("b"))], [])
    tables.close()
    tables = Tables(tmp_path / "ssd")
    assert tables.record(kept) == record(kept, slot=ord("a"))
    assert tables.record(deleted) is None
    tables.close()


def test_a_chunk_put_again_tells_where_the_older_copy_is(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "ssd")
    older, newer = record(b"a" * 16, slot=4), record(b"a" * 16, slot=9)
    tables.put_chunk(older)
    assert tables.put_chunk(newer) == Place(12288, 4)
    assert tables.record(b"a" * 16) == newer
    tables.close()


def test_listing_pages(tmp_path: Path) -> None:
    """Pages join to all records in key order; a damaged record comes as its bare id."""
    tables = Tables(tmp_path / "ssd")
    ids = sorted(bytes([n]) * 16 for n in range(10))
    for chunk_id in ids:
        tables.put_chunk(record(chunk_id))
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
    assert tables.delete_chunks(ids[4:6]) == ([record(ids[5])], [ids[4]])
    assert tables.record(ids[4]) is None
    tables.close()


def test_everything_survives_without_a_flush(tmp_path: Path) -> None:
    """It goes through the log: a database that was never closed has it after opening again, in the state of the end."""
    tables = Tables(tmp_path / "ssd")
    saved = manifest(b"k" * 16, "grüße \ud800")
    tables.put_manifest(saved)
    tables.put_chunk(record(b"a" * 16))
    tables.put_chunk(record(b"b" * 16))
    tables.delete_chunks([b"b" * 16])
    shutil.copytree(tmp_path / "ssd", tmp_path / "copy")  # as the disk is when the process is killed now
    tables.close()
    copy = Tables(tmp_path / "copy")
    assert copy.manifest(b"k" * 16) == saved
    assert copy.manifest(b"x" * 16) is None
    assert copy.record(b"a" * 16) == record(b"a" * 16)
    assert copy.record(b"b" * 16) is None
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


@pytest.mark.parametrize("record_bytes", [b"", b"\xc1", b"\x90", b"\x97" + b"\xc0" * 7, b"\x93\x01\x02\x03"])
def test_garbage_is_no_record(record_bytes: bytes) -> None:
    for raw in (record_bytes, _sealed(b"c" * 16, record_bytes)):
        with pytest.raises(PeerProtocolError):
            ChunkRecord.unpack(b"c" * 16, raw)


@pytest.mark.parametrize(
    "change",
    [
        {"parent_id": b"short"},
        {"tokens": 0},
        {"checksums": ()},
        {"checksums": 5},
        {"place": Place(12288, -1)},
        {"place": Place(2999, 0)},
    ],
)
def test_a_record_whose_numbers_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(PeerProtocolError):
        ChunkRecord.unpack(b"c" * 16, record(b"c" * 16)._replace(**change).pack())


def test_damaged_database_is_moved_aside(tmp_path: Path) -> None:
    """A database that cannot be opened is kept beside, without its chunk files, and a fresh one started; so is one that
    was marked. Only the latest is kept."""
    tables, files, moved = open_tier(tmp_path / "ssd", _CAPACITY)
    assert moved == ""
    tables.put_chunk(record(b"a" * 16))
    files.write(files.take(4096), 0, memoryview(mmap.mmap(-1, 4096)))
    files.close()
    tables.close()
    for file in (tmp_path / "ssd").glob("MANIFEST-*"):
        file.write_bytes(b"\x00" * 100)
    tables, files, moved = open_tier(tmp_path / "ssd", _CAPACITY)
    assert Path(moved).is_dir()
    assert not (Path(moved) / "chunks").exists()
    assert files.physical_bytes() == 0
    assert tables.record(b"a" * 16) is None
    tables.put_chunk(record(b"b" * 16))
    files.close()
    tables.close()
    (tmp_path / "ssd" / DAMAGED_MARK).touch()
    tables, files, moved_again = open_tier(tmp_path / "ssd", _CAPACITY)
    assert moved_again not in ("", moved)
    assert [str(kept) for kept in tmp_path.glob("ssd.damaged-*")] == [moved_again]
    assert tables.record(b"b" * 16) is None
    files.close()
    tables.close()


def test_a_damaged_block_of_records_costs_only_its_own(tmp_path: Path) -> None:
    """Bytes flipped in the table of records: the listing says so, and goes on behind the damage."""
    tables = Tables(tmp_path / "ssd")
    ids = [bytes([n, k]) * 8 for n in range(0, 250, 2) for k in range(8)]
    for chunk_id in ids:
        tables.put_chunk(record(chunk_id))
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
        open_tier(tmp_path / "ssd", _CAPACITY)
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
    """Manifests and records from all over the database: after delete, flush and compaction none of their bytes is left,
    all others are there."""
    tables = Tables(tmp_path / "ssd")
    ids = [bytes([n]) * 16 for n in range(120)]
    victims = [ids[n] for n in (3, 4, 60)]
    for chunk_id in ids:
        mark = b"ERASED" if chunk_id in victims else b"KEPT"
        tables.put_chunk(record(chunk_id)._replace(parent_id=mark.ljust(16)))
        tables.put_manifest(manifest(chunk_id, text=mark.decode() * 20))
        if chunk_id[0] % 40 == 0:
            tables.flush()
    deleted, damaged = tables.delete_chunks([*victims, b"never was here!!"])
    assert [found.chunk_id for found in deleted] == victims
    assert damaged == []
    for victim in victims:
        tables.delete_manifest(victim)
    assert occurrences(tables.path, b"ERASED") > 0
    tables.flush()
    tables.compact_records()
    assert occurrences(tables.path, b"ERASED") == 0
    for chunk_id in ids:
        is_there = chunk_id not in victims
        assert (tables.record(chunk_id) is not None) == (tables.manifest(chunk_id) is not None) == is_there
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


def occurrences(directory: Path, marker: bytes) -> int:
    """In all files of a database, logs included."""
    return sum(path.read_bytes().count(marker) for path in directory.iterdir())
