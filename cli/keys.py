"""Keys in files: CURVE keys for services on several machines, and API keys for callers (gateway/api_keys.py).

One CURVE pair serves a whole installation: each process is told by its possession that a peer belongs to it. The
public half admits a client, so both files are secrets.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import zmq

from gateway.api_keys import digest_of, load_api_keys, new_key
from protocol.errors import ConfigError
from protocol.rpc import Curve

_PUBLIC, _SECRET = "curve.public", "curve.secret"
_Z85_BYTES = 40


def make_keys(directory: Path) -> None:
    """Write a new pair. Raises ConfigError: there is one already, or the directory cannot be written."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, key in zip((_PUBLIC, _SECRET), zmq.curve_keypair(), strict=True):
            fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(key + b"\n")
    except FileExistsError as error:
        raise ConfigError(f"{directory} holds keys already", param="keys") from error
    except OSError as error:
        raise ConfigError(f"cannot write keys to {directory}: {error.strerror}", param="keys") from error


def load_keys(directory: Path) -> Curve:
    """The pair in `directory`, for both sides. Raises ConfigError: it is missing or damaged."""
    public, secret = (_read(directory / name) for name in (_PUBLIC, _SECRET))
    if zmq.curve_public(secret) != public:
        raise ConfigError(f"{_PUBLIC} and {_SECRET} in {directory} are no pair", param="keys")
    return Curve(public, secret, server_public=public)


def add_api_key(path: Path, name: str, tenant: str, *, admin: bool) -> str:
    """Add a new key to the file, which is made if it is not there. Returns the key, which nobody can see again.

    Raises ConfigError: the file cannot be read or written, has a key of that name, or the name is none.
    """
    key = new_key()
    # JSON's strings are TOML's, too.
    lines = [f"{field} = {json.dumps(text)}" for field, text in (("name", name), ("sha256", digest_of(key)))]
    lines += [f"tenant = {json.dumps(tenant)}"] + ["admin = true"] * admin
    candidate = path.with_name(f".{path.name}.new")
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        fd = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            # At the front: what comes before the first table of an array belongs to no table.
            file.write("[[keys]]\n" + "\n".join(lines) + "\n\n" + before)
        load_api_keys(candidate)
        candidate.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", param="api_keys") from error
    finally:
        candidate.unlink(missing_ok=True)
    return key


def _read(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; `cachedattention keys {path.parent}` makes a pair", param="keys"
        ) from error
    if len(key) != _Z85_BYTES:
        raise ConfigError(f"{path} holds no CURVE key of {_Z85_BYTES} characters", param="keys")
    return key
