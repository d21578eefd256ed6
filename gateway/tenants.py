"""Who asks: the caller's bearer token, turned into a tenant and a salt that keeps tenants apart.

Where API keys are configured (api_keys.py), a token must be one of them, and its tenant is the one it names. Where none
are, everybody may ask, and each token, or none, is a tenant of its own.

The salt enters every turn key and every chunk's lineage, so that different tenants share neither conversations
nor KV, not even through timing. It comes from the Authorization header only, never from a request's body, and is
keyed with a secret of this server, so that knowing a token's digest is of no use elsewhere.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

from gateway.api_keys import ApiKeys
from gateway.limits import FIRST_PRIORITY, Limits
from protocol.errors import CallerError, ConfigError
from protocol.ids import ID_BYTES, digest

SECRET_BYTES = 32
_ANONYMOUS = b"\x00"
_BEARER = b"\x01"
_NAMED = b"\x02"


class Unauthorized(CallerError):
    code = "invalid_authorization"
    http_status = 401


class Forbidden(CallerError):
    code = "forbidden"
    http_status = 403


@dataclass(frozen=True)
class Tenant:
    """id names the tenant in the journal; it does not reveal the salt. name: for people; empty without API keys."""

    id: bytes
    salt: bytes
    name: str = ""
    limits: Limits = field(default=Limits(), compare=False)
    is_admin: bool = False

    def with_cache_salt(self, cache_salt: str) -> Tenant:
        """The same tenant, whose KV and turn keys are shared by requests of an equal cache_salt only."""
        if not cache_salt:
            return self
        return replace(self, salt=digest("cache salt", self.salt, cache_salt.encode("utf-8", "surrogatepass")))


class Tenants:
    """Pure but for `use`; owned by one loop."""

    def __init__(self, secret: bytes, keys: ApiKeys = ApiKeys()) -> None:
        self._secret = secret
        self._keys = keys
        self._is_open = not keys  # without API keys everybody may ask; but not where all of them were revoked

    def use(self, keys: ApiKeys) -> bool:
        """These from now on. False: they are the same as before."""
        if keys == self._keys:
            return False
        self._keys = keys
        self._is_open = self._is_open and not keys
        return True

    def identify(self, authorization: str | None) -> Tenant:
        """The tenant of a request with this Authorization header. Without API keys, none or an empty token is the
        anonymous one.

        Raises Unauthorized: a scheme other than Bearer, or no key of ours.
        """
        scheme, _, token = (authorization or "").strip().partition(" ")
        token = token.strip()
        if scheme and scheme.lower() != "bearer":
            raise Unauthorized("the Authorization header must be 'Bearer <token>'", param="Authorization")
        if self._is_open:
            caller = _BEARER + token.encode("utf-8", "surrogatepass") if token else _ANONYMOUS
            return self._tenant(caller, "", Limits(priority=FIRST_PRIORITY), False)
        if not token:
            raise Unauthorized("an API key is needed: Authorization: Bearer <key>", param="Authorization")
        key = self._keys.find(token)
        if key is None:
            raise Unauthorized("this API key is not known here", param="Authorization")
        return self._tenant(_NAMED + key.tenant.encode(), key.tenant, self._keys.limits_of(key.tenant), key.admin)

    def require_admin(self, authorization: str | None) -> Tenant:
        """The tenant of an admin's request. Raises Unauthorized, or Forbidden: its key is not an admin's."""
        tenant = self.identify(authorization)
        if not tenant.is_admin:
            has = "none is configured" if self._is_open else "this key is not one"
            raise Forbidden(f"this needs the API key of an admin; {has}", param="Authorization")
        return tenant

    def _tenant(self, caller: bytes, name: str, limits: Limits, is_admin: bool) -> Tenant:
        salt = blake2b(caller, digest_size=ID_BYTES, key=self._secret, person=b"tenant salt").digest()
        return Tenant(digest("tenant id", salt), salt, name, limits, is_admin)


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
