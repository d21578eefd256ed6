"""The directories a running system lives in: made before a start, swept after a clean end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from protocol.arena import exclusive
from protocol.errors import ConfigError

_SOCKETS = ("kvdaemon.sock", "inference.sock", "ssd.sock")
_RUN_LOCKS = ("up.lock", "kvdaemon.lock", "ssd.lock")
_DATA_LOCKS = ("gateway.lock", "kvdaemon.lock")


def prepare(data_dir: Path, run_dir: Path) -> None:
    """Make both directories. Raises ConfigError: one cannot be made, or the run directory is somebody else's."""
    _make(data_dir, "data_dir")
    _make(run_dir, "run_dir")
    # Its default name can be guessed, in a directory that all users may write: who owns it could replace our sockets.
    status = run_dir.lstat()
    if status.st_uid != os.getuid() or run_dir.is_symlink():
        raise ConfigError(f"run_dir: {run_dir} belongs to another user", param="run_dir")
    if status.st_mode & 0o077:
        run_dir.chmod(0o700)


def sweep(data_dir: Path, run_dir: Path, *, keep_arena: bool) -> None:
    """Remove what services that were killed leave: all of the run directory, and locks that nobody holds."""
    for name in _DATA_LOCKS:
        if (data_dir / name).exists():
            with contextlib.suppress(ConfigError), exclusive(data_dir / name, name):
                pass  # it removes the file at its end
    leftovers = [run_dir / name for name in (*_SOCKETS, *_RUN_LOCKS, ".arena.new")]
    if not keep_arena:
        leftovers.append(run_dir / "arena")
    leftovers += [*(run_dir / "clients").glob("*"), *run_dir.glob("inference-*.sock")]
    for path in leftovers:
        path.unlink(missing_ok=True)
    for directory in (run_dir / "clients", run_dir):
        with contextlib.suppress(OSError):  # not empty: somebody else's files
            directory.rmdir()


def _make(path: Path, key: str) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: cannot make {path}: {error.strerror}", param=key) from error
