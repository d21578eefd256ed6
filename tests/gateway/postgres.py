"""A PostgreSQL server for a test, where the machine has one."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest


@contextmanager
def postgres_url() -> Iterator[str]:
    """The URL of an empty database, reached over a Unix socket. Where there is no server to start: fails in CI, and
    skips elsewhere.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        _do_without("no PostgreSQL under /usr/lib/postgresql")
    binaries = found[-1].parent
    owner = _unprivileged()
    directory = Path(tempfile.mkdtemp(prefix="ca-pg-"))
    if owner is not None:
        os.chown(directory, owner.pw_uid, owner.pw_gid)

    def execute(*command: str) -> None:
        who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=directory, timeout=120, **who)

    data = str(directory / "data")
    control = str(binaries / "pg_ctl")
    try:
        execute(str(binaries / "initdb"), "-D", data, "-U", "test", "--auth=trust", "--no-sync", "-E", "UTF8")
        options = f"-c listen_addresses='' -c unix_socket_directories='{directory}' -c fsync=off"
        execute(control, "-D", data, "-w", "-o", options, "-l", str(directory / "log"), "start")
        try:
            yield f"postgresql+psycopg://test@/postgres?host={directory}"
        finally:
            execute(control, "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory)


def _unprivileged() -> pwd.struct_passwd | None:
    """PostgreSQL does not run as root; then whom it shall run as. None: as we are."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return _do_without("running as root, and no other user to run PostgreSQL as")


def _do_without(reason: str) -> NoReturn:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
