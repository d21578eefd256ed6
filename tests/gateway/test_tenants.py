"""Salts by caller and secret; the secret is made once, whole, and only for us to read."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.tenants import SECRET_BYTES, Tenants, Unauthorized, load_secret
from protocol.errors import ConfigError


def test_salt_depends_on_token_and_secret() -> None:
    one, two = Tenants(b"1" * 32), Tenants(b"2" * 32)
    tenants = [t.identify(header) for t in (one, two) for header in (None, "Bearer a", "Bearer b", "Bearer \x00")]
    assert len({tenant.salt for tenant in tenants}) == len({tenant.id for tenant in tenants}) == 8
    assert not {tenant.salt for tenant in tenants} & {tenant.id for tenant in tenants}


def test_forms_of_one_caller_are_equal() -> None:
    tenants = Tenants(b"1" * 32)
    assert tenants.identify("Bearer abc") == tenants.identify("bearer   abc ")
    assert tenants.identify(None) == tenants.identify("") == tenants.identify("Bearer ")
    with pytest.raises(Unauthorized):
        tenants.identify("Basic abc")


def test_secret_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "data" / "secret"
    secret = load_secret(path)
    assert len(secret) == SECRET_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secret(path) == secret
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_concurrent_starts_agree_on_a_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: load_secret(tmp_path / "secret"), range(8)))
    assert len(secrets) == 1


def test_a_damaged_secret_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="secret of 32"):
        load_secret(tmp_path / "secret")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        load_secret(tmp_path / "file" / "secret")
