"""A gateway to talk to over real HTTP: in a thread of the test's process, or as a process that may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import httpx
from openai import OpenAI
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from gateway.config import GatewayConfig
from gateway.journal.tables import Turn
from gateway.service import Gateway, listen, serve
from tests.gateway.inference_peer import MODEL, RecordingDaemon, ScriptedInference

T = TypeVar("T")


def eventually(check: Callable[[], T], timeout_s: float = 20.0) -> T:
    """The first truthy value of `check`. Fails where none comes."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        assert time.monotonic() < deadline, f"{check} never came true"
        time.sleep(0.01)
    return value


def make_config(directory: Path, **changes: Any) -> GatewayConfig:
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "data_dir": directory / "data",
        "inference_endpoints": (f"ipc://{directory}/inference.sock",),
        "kvdaemon_endpoint": f"ipc://{directory}/kvdaemon.sock",
    }
    return GatewayConfig(**(values | changes))


def journaled(data_dir: Path) -> list[Turn]:
    """The turns in the journal, oldest first, read by a connection of our own."""
    engine = create_engine(f"sqlite:///{data_dir}/journal.sqlite")
    try:
        with Session(engine) as session:
            return list(session.scalars(select(Turn).order_by(Turn.created_at_s)).all())
    finally:
        engine.dispose()


def talk(*texts: str) -> list[dict[str, str]]:
    """Messages, user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


class Client:
    """What both ways of serving have in common: an address to ask."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, body: Any, **options: Any) -> httpx.Response:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(f"{self.url}/v1/chat/completions", timeout=30.0, **content, **options)

    def chat(self, *texts: str, token: str = "", **fields: Any) -> dict[str, Any]:
        """A turn that must succeed."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        reply = self.post({"model": MODEL, "messages": talk(*texts)} | fields, headers=headers)
        assert reply.status_code == 200, reply.text
        body: dict[str, Any] = reply.json()
        return body

    def stream(self, text: str) -> tuple[str, list[int], list[dict[str, object]]]:
        """The text and tokens of a whole streamed answer, and its chunks; the last may be an error."""
        body = {"model": MODEL, "messages": talk(text), "stream": True, "return_token_ids": True, "logprobs": True}
        reply = self.post(body)
        assert reply.status_code == 200, reply.text
        events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
        return (
            "".join(choice["delta"].get("content", "") for choice in choices),
            [token for choice in choices for token in choice["token_ids"]],
            chunks,
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30.0)

    def metric(self, line: str) -> float:
        """The value of the series `line`; 0 where it is not there."""
        for row in self.get("/metrics").text.splitlines():
            if row.startswith(f"cachedattention_{line} "):
                return float(row.rsplit(" ", 1)[1])
        return 0.0

    @contextlib.contextmanager
    def openai(self, **options: Any) -> Iterator[OpenAI]:
        with OpenAI(base_url=f"{self.url}/v1", api_key="sk-test", max_retries=0, timeout=30.0, **options) as client:
            yield client

    def wait_ready(self) -> None:
        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return self.get("/ready").status_code == 200
            return False

        eventually(ready)


class ServedGateway(Client):
    """The real service and its peers' stand-ins in one loop on a thread. `peer` is the first of `workers`."""

    def __init__(
        self,
        directory: Path,
        *,
        peer: bool = True,
        daemon: bool = True,
        max_running: int = 4,
        workers: int = 1,
        **config: Any,
    ):
        if workers > 1:
            numbers = range(1, workers + 1)
            config["inference_endpoints"] = tuple(f"ipc://{directory}/inference-{n}.sock" for n in numbers)
        self.config = make_config(directory, **config)
        self.data_dir = self.config.data_dir
        self._listener = listen(self.config.host, 0)
        self.port = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway")
        self._thread.start()
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        self.peers = [self.call(self._make_peer(endpoint, max_running)) for endpoint in self.config.inference_endpoints]
        self.peer = self.peers[0]
        self.daemon = self.call(self._make_daemon())
        for one in self.peers if peer else ():
            self.call(one.server.start())
        if daemon:
            self.call(self.daemon.server.start())
        self.gateway = self.call(Gateway.open(self.config))
        self._serving: Future[None] | None = self._submit(serve(self.gateway, self._listener, self.stop, self.hurry))
        if peer:
            self.wait_ready()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something in the gateway's loop."""
        return self._submit(coroutine).result(30.0)

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    @staticmethod
    async def _make_peer(endpoint: str, max_running: int) -> ScriptedInference:
        return ScriptedInference(endpoint, max_running)

    async def _make_daemon(self) -> RecordingDaemon:
        return RecordingDaemon(self.config.kvdaemon_endpoint)

    def set_hold(self, held: bool) -> None:
        """Whether turns that start sample nothing for now."""

        async def change() -> None:
            for peer in self.peers:
                (peer.hold.clear if held else peer.hold.set)()

        self.call(change())

    def request_stop(self) -> None:
        self._loop.call_soon_threadsafe((self.hurry if self.stop.is_set() else self.stop).set)

    def wait_stopped(self, timeout_s: float = 20.0) -> None:
        """Raises what the service raised."""
        if self._serving is not None:
            self._serving.result(timeout_s)
            self._serving = None

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.stop.set)
        self._loop.call_soon_threadsafe(self.hurry.set)
        try:
            self.wait_stopped()
            self.call(self.gateway.close())
            for peer in self.peers:
                self.call(peer.server.stop())
            self.call(self.daemon.server.stop())
            self.call(_nothing_left())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10.0)
            self._loop.close()
            self._listener.close()


async def _nothing_left() -> None:
    """Every task has a parent that saw it end."""
    await asyncio.sleep(0.1)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, left


class GatewayProcess(Client):
    """`gateway.service.run` in a process of its own."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.config = make_config(directory, **(config | {"port": free_port()}))
        self.port = self.config.port
        self.data_dir = self.config.data_dir
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        given = self.config
        code = (
            "import sys; from pathlib import Path; from gateway.config import GatewayConfig; "
            "from gateway.service import run; "
            f"sys.exit(run(GatewayConfig({given.host!r}, {given.port}, Path({str(given.data_dir)!r}), "
            f"{given.inference_endpoints!r}, {given.kvdaemon_endpoint!r}, drain_s={given.drain_s})))"
        )
        return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10.0)

    def restart(self) -> None:
        self.process = self._start()

    def terminate(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20.0)
            except subprocess.TimeoutExpired:
                self.kill()
                raise


class PeerProcess:
    """The inference stand-in as a process, which a script in a message may kill."""

    def __init__(self, directory: Path, max_running: int = 4, name: str = "inference") -> None:
        self._command = [sys.executable, "-m", "tests.gateway.inference_peer"]
        self._command += ["--endpoint", f"ipc://{directory}/{name}.sock", "--max-running", str(max_running)]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(self._command, cwd=Path(__file__).parents[2], env=environment)

    def restart(self) -> None:
        self.process = self._start()

    def wait_dead(self) -> None:
        self.process.wait(20.0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
