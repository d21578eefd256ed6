"""The services as real processes, for measurements and end-to-end tests: start, kill, restart, ask."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

Service = str  # of several workers each is one: inference-1, inference-2
SERVICES: tuple[Service, ...] = ("kvdaemon", "inference", "gateway")
_READY_S = 120.0


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Stack:
    """kvdaemon, inference and gateway on ports and directories of their own. Not safe from several threads.

    settings: names of the command line without dashes (`dram`, `workers`), as in `CACHEDATTENTION_<NAME>`.
    """

    def __init__(self, home: Path, model: Path | str, settings: Mapping[str, Any] | None = None) -> None:
        self.home = home
        self.data_dir = home / "data"
        self.run_dir = Path(tempfile.mkdtemp(prefix="ca-", dir="/dev/shm"))
        workers = int((settings or {}).get("workers", 1))
        named = tuple(f"inference-{number}" for number in range(1, workers + 1))
        self.workers: tuple[Service, ...] = named if workers > 1 else ("inference",)
        self.services: tuple[Service, ...] = ("kvdaemon", *self.workers, "gateway")
        self.ports = {service: free_port() for service in self.services}
        self.url = f"http://127.0.0.1:{self.ports['gateway']}"
        self.processes: dict[Service, subprocess.Popen[bytes]] = {}
        self._settings: dict[str, Any] = {
            "model": model,
            "port": self.ports["gateway"],
            "data_dir": self.data_dir,
            "run_dir": self.run_dir,
            "metrics_port_kvdaemon": self.ports["kvdaemon"],
            **(settings or {}),
        }
        self.http = httpx.Client(base_url=self.url, timeout=300.0)

    # -- life and death -----------------------------------------------------------------------------------

    def start(self, *services: Service) -> None:
        """Start the given services (all by default) and wait until they are ready."""
        chosen = services or self.services
        for service in chosen:
            self.launch(service)
        for service in chosen:
            self.wait_ready(service)

    def launch(self, service: Service) -> None:
        """Start one service and do not wait."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CACHEDATTENTION_")}
        settings = self._settings
        command, _, worker = service.partition("-")
        if command == "inference":
            settings = settings | {"metrics_port_inference": self.ports[service]}
        environment |= {f"CACHEDATTENTION_{k.upper()}": str(v) for k, v in settings.items()}
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / f"{service}.log").open("ab") as log:
            self.processes[service] = subprocess.Popen(
                [sys.executable, "-m", "cli", command, *(["--worker", worker] if worker else [])],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self, service: Service, timeout_s: float = _READY_S) -> None:
        """Raises RuntimeError with the service's last log lines: it died or is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.processes[service].poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self.ports[service]}/ready").status_code == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{service} is not ready:\n{self.log_tail(service)}")

    def kill(self, *services: Service) -> None:
        """kill -9."""
        for service in services:
            self.processes[service].send_signal(signal.SIGKILL)
        for service in services:
            self.processes[service].wait(30)

    def restart(self, service: Service, **settings: Any) -> int:
        """Stop a service as its operator would, and start it with these settings changed. Returns its exit status."""
        process = self.processes[service]
        process.terminate()
        status = process.wait(30)
        self._settings |= settings
        self.start(service)
        return status

    def stop(self) -> None:
        """Stop in order, as `up` does, and remove the run directory."""
        for service in reversed(self.services):
            process = self.processes.get(service)
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(30)
        self.http.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def log_tail(self, service: Service, lines: int = 30) -> str:
        path = self.home / f"{service}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    # -- asking -------------------------------------------------------------------------------------------

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """One turn, not streamed, greedy unless told otherwise. Raises httpx.HTTPStatusError."""
        body = {"model": "default", "messages": messages, "temperature": 0, "return_token_ids": True, **fields}
        response = self.http.post("/v1/chat/completions", json=body)
        if response.is_error:
            raise httpx.HTTPStatusError(response.text, request=response.request, response=response)
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self, service: Service) -> dict[str, float]:
        """All samples of one service, by name with labels as in the exposition format."""
        text = httpx.get(f"http://127.0.0.1:{self.ports[service]}/metrics").text
        samples = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def wait_metric(self, service: Service, name: str, value: float, timeout_s: float = 30.0) -> None:
        """Wait until a gauge has a value. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while (found := self.metrics(service).get(name)) != value:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{service}: {name} is {found}, not {value}")
            time.sleep(0.02)

    def drop_dram(self) -> None:
        """Leave history on SSD only, and cold: restart the daemon without its arena and its files' page cache."""
        process = self.processes["kvdaemon"]
        process.terminate()
        process.wait(60)
        (self.run_dir / "arena").unlink(missing_ok=True)
        drop_page_cache(self.data_dir)
        self.start("kvdaemon")
        for worker in self.workers:
            self.wait_metric(worker, "cachedattention_store_connected", 1.0)


def drop_page_cache(directory: Path) -> None:
    """Make the kernel forget the contents of all files below `directory`, so that reads go to the device."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@contextlib.contextmanager
def running_stack(model: Path | str, **settings: Any) -> Iterator[Stack]:
    """A started stack in a temporary directory, stopped at the end."""
    home = Path(tempfile.mkdtemp(prefix="cachedattention-"))
    stack = Stack(home, model, settings)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(home, ignore_errors=True)
