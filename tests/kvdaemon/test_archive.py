"""Archives: what was written comes back to the last bit; whatever was changed is refused before anything is used."""

from __future__ import annotations

import stat
import struct
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from kvdaemon.archive import ArchiveReader, ArchiveWriter, Contents, Layers
from protocol.arena import Geometry
from protocol.errors import InvalidRequest
from protocol.lineage import Truncation
from tests.kvdaemon.contexts import Turn, make_turn

TINY = Geometry(layers=2, key_bytes=2, value_bytes=3, chunk_tokens=4)
_REFUSALS = r"damaged|not a conversation|version"


def layers_of(turn: Turn, index: int) -> Layers:
    return [(keys.tobytes(), values.tobytes()) for keys, values in turn.chain[index].layers]


def written(path: Path, turn: Turn, geometry: Geometry = TINY) -> bytes:
    with ArchiveWriter(path, Contents(geometry, turn.manifest)) as archive:
        for index in range(len(turn.chain)):
            archive.add(layers_of(turn, index))
        assert archive.finish() == path.stat().st_size
    return path.read_bytes()


def read(path: Path) -> tuple[Contents, list[Layers]]:
    with ArchiveReader(path) as archive:
        return archive.contents, list(archive.chunks())


def put(path: Path, raw: bytes | bytearray) -> None:
    """Write a new file: to write over one would wait for the disk, thousands of times."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)


def sealed(body: bytes) -> bytes:
    """`body` with a right digest: what a program with a bug, or a forger, would write."""
    return body + blake2b(body, digest_size=32).digest()


@pytest.fixture
def turn() -> Turn:
    made = make_turn(range(10), geometry=TINY)
    return replace(made, manifest=replace(made.manifest, text="ein Löffel\ud800"))  # JSON can carry a lone surrogate


@pytest.mark.parametrize("tokens", [2, 4, 5, 6, 9, 10])
def test_round_trip(tmp_path: Path, tokens: int) -> None:
    """Contexts of one or more chunks, whole and partial; the file is the user's alone, and the only one there."""
    turn = make_turn(range(tokens), geometry=TINY)
    first = written(tmp_path / "one", turn)
    contents, chunks = read(tmp_path / "one")
    assert contents == Contents(TINY, turn.manifest)
    assert chunks == [layers_of(turn, index) for index in range(len(turn.chain))]
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600
    assert written(tmp_path / "two", turn) == first
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_a_truncated_context_comes_back_truncated(tmp_path: Path) -> None:
    turn = make_turn(range(30), geometry=TINY, truncations=(Truncation(21, 4, 12), Truncation(26, 12, 20)))
    written(tmp_path / "archive", turn)
    contents, chunks = read(tmp_path / "archive")
    assert contents.manifest.truncations == turn.manifest.truncations
    assert contents.kept_tokens == 29 - 16
    assert chunks == [layers_of(turn, index) for index in range(len(turn.chain))]


@pytest.mark.parametrize("truncation", [(21, 4, 13), (21, 12, 4), (10, 4, 12), (99, 4, 12)])
def test_a_truncation_that_cannot_be_is_refused(truncation: tuple[int, int, int]) -> None:
    turn = make_turn(range(30), geometry=TINY)
    with pytest.raises(InvalidRequest, match="whole chunks"):
        Contents(TINY, replace(turn.manifest, truncations=(Truncation(*truncation),)))


def test_every_flipped_bit_is_refused(tmp_path: Path, turn: Turn) -> None:
    sound = written(tmp_path / "archive", turn)
    for position in range(8 * len(sound)):
        raw = bytearray(sound)
        raw[position // 8] ^= 1 << position % 8
        put(tmp_path / "archive", raw)
        with pytest.raises(InvalidRequest, match=_REFUSALS):
            read(tmp_path / "archive")
    (tmp_path / "archive").write_bytes(sound)
    assert read(tmp_path / "archive")[0].manifest == turn.manifest


def test_every_other_length_is_refused(tmp_path: Path, turn: Turn) -> None:
    """Cut anywhere, lengthened, or with bytes taken out of or put into the middle."""
    sound = written(tmp_path / "archive", turn)
    changed = [sound[:length] for length in range(len(sound))]
    changed += [sound + bytes(more) for more in (1, 8, 32, 4096)]
    changed += [sound + sound, sound + sound[-32:]]
    changed += [sound[:at] + sound[at + 1 :] for at in range(len(sound))]
    changed += [sound[:at] + b"\0" + sound[at:] for at in range(len(sound))]
    for raw in changed:
        put(tmp_path / "archive", raw)
        with pytest.raises(InvalidRequest, match=_REFUSALS):
            read(tmp_path / "archive")


def test_a_right_digest_alone_is_not_enough(tmp_path: Path, turn: Turn) -> None:
    """Bodies that contradict themselves are refused though their digest is right: tokens, ids, sizes, checksums."""
    sound = written(tmp_path / "archive", turn)[:-32]
    header_end = 16 + struct.unpack_from("<I", sound, 12)[0]
    refused = 0
    for position in range(8 * len(sound)):
        raw = bytearray(sound)
        raw[position // 8] ^= 1 << position % 8
        put(tmp_path / "archive", sealed(bytes(raw)))
        try:
            contents, chunks = read(tmp_path / "archive")
        except InvalidRequest:
            refused += 1
            continue
        # What cannot be told from the truth: another turn key, another text, the last token, which has no KV.
        assert position < 8 * header_end
        assert contents.manifest.chunk_ids == turn.manifest.chunk_ids
        assert chunks == [layers_of(turn, index) for index in range(3)]
    assert refused > 8 * (len(sound) - header_end)
    for body in (sound[:-1], sound + b"\0"):
        (tmp_path / "archive").write_bytes(sealed(body))
        with pytest.raises(InvalidRequest, match="size does not fit"):
            read(tmp_path / "archive")


def test_a_file_that_changes_after_it_was_verified(tmp_path: Path) -> None:
    """Its KV is compared with what was verified; a file that takes its name does no harm."""
    geometry = Geometry(layers=2, key_bytes=1024, value_bytes=1024, chunk_tokens=4)  # larger than a read buffer
    turn, stranger = (make_turn(range(start, start + 10), geometry=geometry) for start in (0, 100))
    kv = [layers_of(turn, index) for index in range(3)]
    sound = written(tmp_path / "archive", turn, geometry)
    with ArchiveReader(tmp_path / "archive") as archive:
        (tmp_path / "other").write_bytes(b"something else")
        (tmp_path / "other").replace(tmp_path / "archive")
        assert list(archive.chunks()) == kv
    (tmp_path / "archive").write_bytes(sound)
    body_bytes = Contents(geometry, turn.manifest).body_bytes
    other = written(tmp_path / "other", stranger, geometry)[-32 - body_bytes : -32]
    with ArchiveReader(tmp_path / "archive") as archive:
        with (tmp_path / "archive").open("r+b") as file:
            file.seek(len(sound) - 32 - body_bytes)
            file.write(other)  # whole in itself: its own checksums are right
        with pytest.raises(InvalidRequest, match="changed while it was read"):
            list(archive.chunks())


def test_no_files(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InvalidRequest, match=f"cannot read .*{why}"):
            ArchiveReader(path)
    (tmp_path / "noise").write_bytes(np.random.default_rng(1).bytes(10_000))
    with pytest.raises(InvalidRequest, match="is not a conversation's file"):
        ArchiveReader(tmp_path / "noise")


def test_what_is_not_finished_leaves_nothing(tmp_path: Path, turn: Turn) -> None:
    with ArchiveWriter(tmp_path / "archive", Contents(TINY, turn.manifest)) as archive:
        archive.add(layers_of(turn, 0))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidRequest, match="cannot write"):
        ArchiveWriter(tmp_path / "none" / "archive", Contents(TINY, turn.manifest))


def test_contents_must_follow_from_their_tokens(turn: Turn) -> None:
    """Another geometry, another namespace, no KV: refused before a file is made."""
    for geometry, manifest in (
        (replace(TINY, chunk_tokens=8), turn.manifest),
        (TINY, replace(turn.manifest, namespace=b"n" * 16)),
        (TINY, replace(turn.manifest, kv_tokens=8)),
    ):
        with pytest.raises(InvalidRequest, match="do not follow"):
            Contents(geometry, manifest)
    for kv_tokens in (0, 11):
        with pytest.raises(InvalidRequest, match="no KV"):
            Contents(TINY, replace(turn.manifest, kv_tokens=kv_tokens))
