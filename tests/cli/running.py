"""The command line as a user runs it: a process of its own, with places of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

PATIENCE_S = 120.0  # the machine may be slow and shared; nothing here waits longer than it must


def environment(**more: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("CACHEDATTENTION_")}
    return ours | {"COLUMNS": "200"} | more


def cli(*arguments: str, stdin: bytes = b"", timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )


def eventually(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain: {what}"
        time.sleep(0.05)


@dataclass
class Up:
    """A running `cachedattention up`."""

    process: subprocess.Popen[bytes]
    data_dir: Path
    run_dir: Path
    output: Path
    url: str = ""
    seen: set[int] = field(default_factory=set)  # every process that was ever part of it

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.said()
        for line in self.said().splitlines():
            if line.startswith("ready"):
                self.url = line.split()[1]
                return True
        return False

    def service(self, name: str) -> psutil.Process | None:
        """By its name, such as inference-2 of several workers."""
        command, _, worker = name.partition("-")
        expected = ["-m", "cli", command, *(["--worker", worker] if worker else [])]
        for child in psutil.Process(self.process.pid).children():
            try:
                if child.cmdline()[1 : len(expected) + 1] == expected:
                    return child
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return None

    def note_processes(self) -> None:
        self.seen |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}

    def alive(self) -> list[int]:
        """Of the processes seen, those that still run."""
        found = []
        for pid in self.seen:
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def ask(self, *contents: str, max_tokens: int = 8) -> dict[str, object]:
        """The answer to a conversation whose messages take turns, user first."""
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
        body = {"model": "embedded", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> int:
        self.note_processes()
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


def up_arguments(data_dir: Path, run_dir: Path) -> list[str]:
    ports = ("--port", "0", "--metrics-port-inference", "0", "--metrics-port-kvdaemon", "0")
    places = ("--data-dir", str(data_dir), "--run-dir", str(run_dir))
    return ["up", *ports, *places, "--dram", "64MiB", "--ssd", "128MiB", "--max-context", "1024"]


@contextmanager
def running_up(data_dir: Path, *more: str) -> Iterator[Up]:
    """`up` with the embedded model, small tiers and free ports. Whatever is left at the end is killed."""
    tmpfs = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=tmpfs, prefix="ca-test-") as parent:
        run_dir, output = Path(parent) / "run", data_dir.parent / f"{data_dir.name}.output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli", *up_arguments(data_dir, run_dir), *more],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        up = Up(process, data_dir, run_dir, output)
        try:
            eventually(up.is_ready, "up is ready")
            up.note_processes()
            yield up
        finally:
            if process.poll() is None:
                up.note_processes()
                process.kill()
                process.wait()
            for pid in up.alive():
                psutil.Process(pid).kill()
