"""Who asks: the caller's bearer token, turned into a salt that keeps tenants apart.

The salt enters every turn key and every chunk's lineage, so that different callers share neither conversations
nor KV, not even through timing. It comes from the Authorization header only, never from a request's body, and is
keyed with a secret of this server, so that knowing a token's digest is of no use elsewhere.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from protocol.errors import CallerError, ConfigError
from protocol.ids import ID_BYTES, digest

SECRET_BYTES = 32
_ANONYMOUS = b"\x00"
_BEARER = b"\x01"


class Unauthorized(CallerError):
    code = "invalid_authorization"
    http_status = 401


@dataclass(frozen=True)
class Tenant:
    """id names the tenant in the journal; it does not reveal the salt."""

    id: bytes
    salt: bytes


class Tenants:
    """Pure after construction; safe from any thread."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def identify(self, authorization: str | None) -> Tenant:
        """The tenant of a request with this Authorization header; none or an empty token is the anonymous one.

        Raises Unauthorized: a scheme other than Bearer.
        """
        scheme, _, token = (authorization or "").strip().partition(" ")
        token = token.strip()
        if scheme and scheme.lower() != "bearer":
            raise Unauthorized("the Authorization header must be 'Bearer <token>'", param="Authorization")
        caller = _BEARER + token.encode("utf-8", "surrogatepass") if token else _ANONYMOUS
        salt = blake2b(caller, digest_size=ID_BYTES, key=self._secret, person=b"tenant salt").digest()
        return Tenant(digest("tenant id", salt), salt)


def load_secret(path: Path) -> bytes:
    """The server's secret, made at the first start. Raises ConfigError: unreadable, or not a secret of ours.

    Losing the secret loses nothing but the way back to what was stored: every conversation begins anew.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read or make {path}: {error.strerror}", param="data_dir") from error
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{path} holds {len(secret)} bytes, not a secret of {SECRET_BYTES}", param="data_dir")
    return secret


def _create(path: Path) -> None:
    """Whole or not at all, also when the machine loses power, and never over a secret that is there."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        os.write(fd, os.urandom(SECRET_BYTES))
        os.fsync(fd)
        try:
            os.link(temporary, path)
        except FileExistsError:  # another process was first; its secret counts
            pass
        os.fsync(directory)
    finally:
        os.unlink(temporary)
        os.close(fd)
        os.close(directory)
