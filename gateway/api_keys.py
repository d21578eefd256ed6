"""API keys: who may ask, for which tenant, within which limits. A file or a variable holds their digests, never keys.

A key is 32 random bytes, so its SHA-256 needs no salt and no slow function: there is nothing to guess. The file:

    [[keys]]
    name = "ann's laptop"       # for people; appears in no answer
    sha256 = "9f86d0..."
    tenant = "research"         # keys of one tenant share conversations, KV and limits; "default" if not given
    admin = false               # may use /admin

    [tenants.research]          # limits of a tenant; [tenants.default] is one like any other
    requests_per_minute = 600
    tokens_per_minute = 1_000_000
    stored_bytes = 20_000_000_000
    priority = 0

    [limits]                    # of the tenants that are not listed
    requests_per_minute = 60
"""

from __future__ import annotations

import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.limits import Limits
from protocol.errors import ConfigError

PREFIX = "ca-"
DEFAULT_TENANT = "default"
_Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ApiKey(_Strict):
    name: _Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: _Name = DEFAULT_TENANT
    admin: bool = False


class _File(_Strict):
    keys: list[ApiKey] = []
    tenants: dict[_Name, dict[str, int]] = {}
    limits: dict[str, int] = {}


@dataclass(frozen=True)
class ApiKeys:
    """All keys there are. None at all: everybody may ask, see tenants.py."""

    keys: tuple[ApiKey, ...] = ()
    limits: Mapping[str, Limits] = field(default_factory=dict)  # by tenant
    default_limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in self.keys]
            if len(set(values)) < len(values):
                raise ConfigError(f"api_keys: two keys have one {what}", param="api_keys")
        if unused := set(self.limits) - {key.tenant for key in self.keys}:
            raise ConfigError(f"api_keys: no key is for tenant {sorted(unused)[0]!r}", param="api_keys")

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, token: str) -> ApiKey | None:
        """The key that is this token. Takes the same time whichever it is."""
        found, wanted = None, digest_of(token)
        for key in self.keys:
            if hmac.compare_digest(key.sha256, wanted):
                found = key
        return found

    def limits_of(self, tenant: str) -> Limits:
        return self.limits.get(tenant, self.default_limits)


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    return sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def load_api_keys(path: Path | None, hashes: str = "") -> ApiKeys:
    """Of a file, and of a line of `name=sha256` or `name=sha256=admin`, separated by commas.

    Raises ConfigError: unreadable, unknown fields, bad values; it never shows a value, which may be a key by mistake.
    """
    document = _File() if path is None else _read(path)
    try:
        limits = {tenant: _limits(values, f"tenants.{tenant}") for tenant, values in document.tenants.items()}
        return ApiKeys((*document.keys, *_from_line(hashes)), limits, _limits(document.limits, "limits"))
    except ConfigError as error:
        where = f" in {path}" if path is not None else ""
        raise ConfigError(error.message + where, param="api_keys") from error


def _read(path: Path) -> _File:
    try:
        return _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"api_keys: cannot read {path}: {error.strerror}", param="api_keys") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys: {path} is not TOML: {error}", param="api_keys") from error
    except ValidationError as error:
        raise ConfigError(f"api_keys: {_explain(error)} in {path}", param="api_keys") from error


def _limits(values: Mapping[str, int], where: str) -> Limits:
    try:
        return Limits(**values)
    except TypeError as error:
        unknown = sorted(set(values) - set(Limits.__dataclass_fields__))
        raise ConfigError(f"api_keys: {where} has no '{unknown[0]}'", param="api_keys") from error
    except ConfigError as error:
        raise ConfigError(f"api_keys: {where}: {error.message}", param="api_keys") from error


def _from_line(hashes: str) -> Sequence[ApiKey]:
    keys = []
    for number, entry in enumerate(filter(None, (part.strip() for part in hashes.split(","))), 1):
        match = re.fullmatch(r"([^=]+)=([0-9a-f]{64})(=admin)?", entry)
        if match is None:
            raise ConfigError(
                f"api_key_hashes: entry {number} must be NAME=SHA256 or NAME=SHA256=admin", param="api_key_hashes"
            )
        keys.append(ApiKey(name=match[1].strip(), sha256=match[2], admin=bool(match[3])))
    return keys


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
