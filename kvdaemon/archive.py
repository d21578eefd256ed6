"""An archive: one conversation's context and KV in one file that proves itself.

    magic, version (4 bytes), size of the header (4 bytes)
    header             MessagePack: the geometry, and the manifest's fields
    for each chunk, oldest first, and each of its layers:
                       xxh3-64 (8 bytes), keys, values
    blake2b-256        of everything before

All integers are little-endian. The sizes of chunks follow from the header, and their ids from namespace and tokens: a
file that was changed by one bit, cut or made longer is refused before anything of it is used. The digest proves that a
file is whole, not who made it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgpack
import xxhash
from pydantic import TypeAdapter, ValidationError

from protocol.arena import Geometry
from protocol.errors import CapacityError, InvalidRequest, PeerProtocolError
from protocol.ids import ROOT, unpack_tokens
from protocol.lineage import kept_tokens, lineage_of
from protocol.messages import GeometryFields, Manifest

MAGIC = b"CAttnCnv"
VERSION = 1
_START = struct.Struct("<8sII")
_SUM = struct.Struct("<Q")
_DIGEST_BYTES = 32
_LARGEST_HEADER_BYTES = 64 * 1024 * 1024
_READ_BYTES = 8 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)

Layers = list[tuple[bytes, bytes]]  # per layer: keys, values


@dataclass(frozen=True)
class Contents:
    """What an archive holds, beside the KV itself."""

    geometry: Geometry
    manifest: Manifest

    def __post_init__(self) -> None:
        """Raises InvalidRequest: the manifest's chunk ids do not follow from its tokens."""
        manifest = self.manifest
        tokens = unpack_tokens(manifest.token_ids)
        if not 0 < manifest.kv_tokens <= len(tokens):
            raise InvalidRequest("the context has no KV")
        size = self.geometry.chunk_tokens
        for at, start, end in manifest.truncations:
            if start % size or end % size or not start < end <= at <= manifest.kv_tokens:
                raise InvalidRequest("the context was not truncated by whole chunks")
        expected = lineage_of(manifest.namespace, tokens[: manifest.kv_tokens], size, manifest.truncations)
        if expected.chunk_ids != manifest.chunk_ids:
            raise InvalidRequest("the context's chunk ids do not follow from its namespace and tokens")

    def chunk_tokens(self, index: int) -> int:
        """How many tokens the chunk holds."""
        return min(self.geometry.chunk_tokens, self.kept_tokens - index * self.geometry.chunk_tokens)

    @property
    def kept_tokens(self) -> int:
        """Tokens with KV, without those that truncations dropped."""
        return kept_tokens(self.manifest.kv_tokens, self.manifest.truncations)

    def parent_id(self, index: int) -> bytes:
        return self.manifest.chunk_ids[index - 1] if index else ROOT

    @property
    def kv_bytes(self) -> int:
        return self.kept_tokens * self.geometry.token_bytes

    @property
    def body_bytes(self) -> int:
        """Of chunks with their checksums."""
        return self.kv_bytes + len(self.manifest.chunk_ids) * self.geometry.layers * _SUM.size


class ArchiveWriter:
    """Writes beside `path`, readable to the user only, and takes its name at the end.

    Leaves nothing behind where it is not finished.

    with ArchiveWriter(path, contents) as archive: archive.add(layers) for each chunk; archive.finish()
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        """Raises InvalidRequest: no file can be made there; CapacityError: the disk is full."""
        self._path = path
        self._contents = contents
        self._digest = blake2b(digest_size=_DIGEST_BYTES)
        self._chunks = 0
        with self._translated():
            fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)  # mode 0600
        self._temporary = Path(temporary)
        self._file: IO[bytes] = os.fdopen(fd, "wb")
        fields = {
            "geometry": dataclasses.asdict(contents.geometry),
            "manifest": dataclasses.asdict(contents.manifest),
        }
        header = msgpack.packb(fields, use_bin_type=True, unicode_errors="surrogatepass")
        try:
            self._write(_START.pack(MAGIC, VERSION, len(header)))
            self._write(header)
        except BaseException:
            self.abandon()
            raise

    def add(self, layers: Layers) -> None:
        """The next chunk's KV. Raises CapacityError: the disk is full."""
        for keys, values in layers:
            checksum = xxhash.xxh3_64(keys)
            checksum.update(values)
            for piece in (_SUM.pack(checksum.intdigest()), keys, values):
                self._write(piece)
        self._chunks += 1

    def finish(self) -> int:
        """Make the file durable under its name. Returns its size in bytes. Raises CapacityError: the disk is full."""
        assert self._chunks == len(self._contents.manifest.chunk_ids)
        with self._translated():
            self._file.write(self._digest.digest())
            self._file.flush()
            os.fsync(self._file.fileno())
            size = os.fstat(self._file.fileno()).st_size
            self._file.close()
            os.replace(self._temporary, self._path)
            _sync_directory(self._path.parent)
        return size

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written before cannot be flushed now
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abandon()

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        with self._translated():
            self._file.write(data)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise CapacityError(f"{self._path.parent} is full; nothing was written") from error
            raise InvalidRequest(f"cannot write {self._path}: {error.strerror}") from error


class ArchiveReader:
    """An archive that was found whole: every byte of it was read, its digest, checksums and lineage are right.

    with ArchiveReader(path) as archive: for layers in archive.chunks(): ...
    """

    def __init__(self, path: Path) -> None:
        """Reads the whole file. Raises InvalidRequest: it cannot be read, is no archive, or a damaged one."""
        self._path = path
        self._checksums: list[list[bytes]] = []  # of each chunk's layers, as they were when all was verified
        with self._translated():
            self._file = path.open("rb")
        try:
            with self._translated():
                self._check(self._file)
        except BaseException:
            self._file.close()
            raise

    def chunks(self) -> Iterator[Layers]:
        """Each chunk's KV, oldest first. Raises InvalidRequest: the file changed since it was verified."""
        with self._translated():
            self._file.seek(self._body_start)
        for index, checksums in enumerate(self._checksums):
            with self._translated():
                layers, found = self._read_chunk(self._file, index)
            if found != checksums:
                raise InvalidRequest(f"{self._path} was changed while it was read")
            yield layers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _check(self, file: IO[bytes]) -> None:
        start = file.read(_START.size)
        if len(start) < _START.size or start[: len(MAGIC)] != MAGIC:
            raise InvalidRequest(f"{self._path} is not a conversation's file")
        _, version, header_bytes = _START.unpack(start)
        if version != VERSION:
            raise InvalidRequest(f"{self._path} has version {version}, this program reads {VERSION}")
        if header_bytes > _LARGEST_HEADER_BYTES:
            raise self._damaged("its header is too large")
        header = file.read(header_bytes)
        # First: whatever else is said about a file with another digest would be a guess.
        if not _has_digest(file):
            raise self._damaged("its digest is wrong")
        self._body_start = _START.size + header_bytes
        try:
            self.contents = _parse(header)
        except InvalidRequest as error:
            raise self._damaged(error.message) from error
        if os.fstat(file.fileno()).st_size != self._body_start + self.contents.body_bytes + _DIGEST_BYTES:
            raise self._damaged("its size does not fit its header")
        file.seek(self._body_start)
        for index in range(len(self.contents.manifest.chunk_ids)):
            self._checksums.append(self._read_chunk(file, index)[1])

    def _read_chunk(self, file: IO[bytes], index: int) -> tuple[Layers, list[bytes]]:
        """The next chunk's KV and checksums."""
        geometry = self.contents.geometry
        tokens = self.contents.chunk_tokens(index)
        layers: Layers = []
        checksums: list[bytes] = []
        for layer in range(geometry.layers):
            noted = file.read(_SUM.size)
            keys, values = file.read(tokens * geometry.key_bytes), file.read(tokens * geometry.value_bytes)
            checksum = xxhash.xxh3_64(keys)
            checksum.update(values)
            if noted != _SUM.pack(checksum.intdigest()):
                raise self._damaged(f"the checksum of chunk {index}, layer {layer} is wrong")
            layers.append((keys, values))
            checksums.append(noted)
        return layers, checksums

    def _damaged(self, why: str) -> InvalidRequest:
        return InvalidRequest(f"{self._path} is damaged: {why}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidRequest(f"cannot read {self._path}: {error.strerror}") from error


def _has_digest(file: IO[bytes]) -> bool:
    """Whether the file ends in the digest of all before."""
    remaining = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
    file.seek(0)
    digest = blake2b(digest_size=_DIGEST_BYTES)
    while remaining > 0:
        piece = file.read(min(remaining, _READ_BYTES))
        if not piece:
            return False
        digest.update(piece)
        remaining -= len(piece)
    return file.read() == digest.digest()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_GEOMETRY, _MANIFEST = TypeAdapter(GeometryFields), TypeAdapter(Manifest)


def _parse(header: bytes) -> Contents:
    """Raises InvalidRequest: not a header of ours."""
    try:
        fields: Any = msgpack.unpackb(header, use_list=False, unicode_errors="surrogatepass")
        geometry = Geometry.from_message(_GEOMETRY.validate_python(fields["geometry"]))
        return Contents(geometry, _MANIFEST.validate_python(fields["manifest"]))
    except (ValueError, TypeError, KeyError, msgpack.UnpackException, ValidationError, PeerProtocolError) as error:
        raise InvalidRequest("its header is not one of ours") from error
