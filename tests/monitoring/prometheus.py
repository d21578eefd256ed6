"""Prometheus and promtool, as the Makefile fetches them, and a server of them for a test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cli.running import eventually

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "monitoring" / "prometheus"


def binary(name: str) -> Path:
    """`prometheus` or `promtool`. Where neither the machine nor .venv has it: fails in CI, and skips elsewhere."""
    fetched = Path(sys.executable).parents[1] / "prometheus" / name
    if fetched.exists():
        return fetched
    if found := shutil.which(name):
        return Path(found)
    if os.environ.get("CI"):
        pytest.fail(f"no {name}: `make prometheus` fetches it")
    pytest.skip(f"no {name}: `make prometheus` fetches it")


def promtool(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [binary("promtool"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its API. Fails where it is none, as for a query that does not parse."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30, trust_env=False).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, expression: str) -> list[float]:
        """The values of all series, now."""
        return [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]

    def scrapes(self, targets: dict[str, str]) -> bool:
        return sum(self.query("up")) == len(targets)


@contextmanager
def running_prometheus(directory: Path, targets: dict[str, str], interval: str) -> Iterator[Prometheus]:
    """A server with our configuration and rules, that scrapes these `targets` (job: host and port) every `interval`."""
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(CONFIG / pattern) for pattern in config["rule_files"]]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    directory.mkdir(parents=True)
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    output = directory / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [
                binary("prometheus"),
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )

    def is_ready() -> bool:
        assert process.poll() is None, output.read_text(encoding="utf-8")
        try:
            return httpx.get(f"http://{address}/-/ready", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        eventually(is_ready, "Prometheus is ready")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
