"""One service as a child process: started, watched, its last words kept, ended in order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 15
_LONGEST_LINE = 64 * 1024


class Child:
    """A process in a session of its own, so that a Ctrl-C at the terminal reaches us alone and we decide the order.

    Its log lines come through us: they pass to our standard error, or wait while `is_quiet`.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """name: in what is said of it. command: of the program `cachedattention`."""
        self.name = name
        self._command = tuple(command)
        self.is_quiet = True
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", *self._command, "--parent", str(os.getpid())),
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=_LONGEST_LINE,
        )
        assert self._process.stdout is not None
        self._reader = asyncio.create_task(self._read(self._process.stdout))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.returncode if self._process is not None else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def last_lines(self) -> list[str]:
        return list(self._lines)

    async def wait(self) -> int:
        """Until it has ended and all it said is read."""
        assert self._process is not None
        assert self._reader is not None
        code = await self._process.wait()
        # A grandchild may hold the pipe a moment longer; its words are not worth waiting for.
        await asyncio.wait({self._reader}, timeout=1.0)
        self._reader.cancel()
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and what it started, now."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than any line of ours: dropped by the reader
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip("\n")
            self._lines.append(text)
            if not self.is_quiet:
                with contextlib.suppress(OSError):  # nobody reads our log any more; we serve on
                    print(text, file=sys.stderr, flush=True)


def die_with(parent: int) -> None:
    """Have the kernel end this process when `parent` does, however that happens. Linux; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before we asked
        raise SystemExit(1)
