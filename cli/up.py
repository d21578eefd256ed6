"""`cachedattention up`: the services as one system that starts, heals and ends as one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.status import Status

from cli.child import Child
from cli.places import prepare, sweep
from cli.settings import PREFIX, Settings, reachable
from inference.embedded.small_talk import SUGGESTION
from protocol.arena import exclusive
from protocol.errors import ConfigError

_STOP_LIMIT_S = {"gateway": 15.0, "inference": 15.0, "kvdaemon": 20.0}  # in this order
_HURRY_S = 3.0
_DEGRADED_PATIENCE_S = 5.0  # a start waits this long for a service that is ready, but not in full
_POLL_S = 0.15
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 10.0
_HEALTHY_AFTER_S = 60.0


class StartFailed(ConfigError):
    """A service died or did not become ready; the message carries its last words."""


def restart_delay_s(previous_s: float, ran_s: float) -> float:
    """How long to wait before a service that died is started again: doubled each time, forgiven after a minute."""
    if ran_s >= _HEALTHY_AFTER_S or previous_s <= 0.0:
        return _FIRST_BACKOFF_S
    return min(2 * previous_s, _LONGEST_BACKOFF_S)


def run_up(settings: Settings, *, start_timeout_s: float, keep_arena: bool) -> int:
    """Run the system until SIGINT or SIGTERM. Returns 0 after an orderly end.

    Raises ConfigError: a port is in use, the directories are in use, or a service cannot start.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line for every poll is no news
    # What a service would refuse is better refused here, before anything runs.
    for make_config in (settings.kvdaemon_config, settings.inference_config, settings.gateway_config):
        make_config()
    prepare(settings.data_dir, settings.run_dir)
    with (
        exclusive(settings.data_dir / "up.lock", "cachedattention up"),
        exclusive(settings.run_dir / "up.lock", "cachedattention up", param="run_dir"),
    ):
        keep = True  # what an earlier run left, until we know better
        try:
            system = _System(*_with_ports(settings), Console(highlight=False, soft_wrap=True))
            try:
                clean = asyncio.run(system.run(start_timeout_s))
            finally:
                # Arena and SSD agree only where the daemon came to its end; otherwise the next one adopts the arena.
                keep = keep_arena or system.kvdaemon_ended_badly
        finally:
            sweep(settings.data_dir, settings.run_dir, keep_arena=keep)
    return 0 if clean else 1


@dataclass
class _Watched:
    command: str  # that runs it: of several workers the same
    child: Child
    url: str  # of its status endpoints
    started_s: float = 0.0
    delay_s: float = 0.0


class _System:
    def __init__(self, settings: Settings, worker_ports: Sequence[int], console: Console) -> None:
        """worker_ports: of the workers' metrics."""
        metrics = f"http://{reachable(settings.metrics_host)}"
        self._settings = settings
        self._console = console
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._url = settings.url()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environment = inherited | settings.to_environment()

        def watched(name: str, url: str, *arguments: str, **variables: int) -> _Watched:
            more = {PREFIX + key.upper(): str(value) for key, value in variables.items()}
            command = name.partition("-")[0]
            return _Watched(command, Child(name, (command, *arguments), environment | more), url)

        # In the order of their start.
        services = [watched("kvdaemon", f"{metrics}:{settings.metrics_port_kvdaemon}")]
        for number, port in enumerate(worker_ports, 1):
            name = f"inference-{number}" if len(worker_ports) > 1 else "inference"
            url = f"{metrics}:{port}"
            services.append(watched(name, url, "--worker", str(number), metrics_port_inference=port))
        services.append(watched("gateway", self._url))
        self._services = {service.child.name: service for service in services}

    @property
    def kvdaemon_ended_badly(self) -> bool:
        return self._services["kvdaemon"].child.exit_code != 0

    async def run(self, start_timeout_s: float) -> bool:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup, or in the background
                loop.add_signal_handler(number, self._on_signal)
        try:
            await self._start_all(start_timeout_s)
            if not self._stop.is_set():
                self._announce()
                await self._watch_all()
        finally:
            clean = await self._stop_all()
        return clean

    def _on_signal(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    # -- start ---------------------------------------------------------------------------------------------------

    async def _start_all(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        with Status("starting", console=self._console) as status:
            for service in self._services.values():
                service.started_s = time.monotonic()
                await service.child.start()
            # Our own services, asked by address: a certificate of --tls-certificate names a host.
            async with httpx.AsyncClient(timeout=1.0, trust_env=False, verify=False) as client:
                ready_s: float | None = None
                while not self._stop.is_set():
                    states = {name: await _state(client, service.url) for name, service in self._services.items()}
                    self._check_alive()
                    status.update(" · ".join(f"{name}: {text}" for name, (_, text) in states.items()))
                    now = time.monotonic()
                    if all(ready for ready, _ in states.values()):
                        ready_s = ready_s if ready_s is not None else now
                        problems = [f"{name}: {text}" for name, (_, text) in states.items() if text != "ok"]
                        if not problems:
                            return
                        if now - ready_s > _DEGRADED_PATIENCE_S:
                            self._console.print(f"[yellow]degraded[/]  {'; '.join(problems)}")
                            return
                    if now > deadline_s:
                        late = [name for name, (ready, _) in states.items() if not ready]
                        raise StartFailed(self._last_words(late[0], f"was not ready within {timeout_s:g} s"))
                    await self._pause(_POLL_S)

    def _check_alive(self) -> None:
        """Raises StartFailed: a service ended while it should start."""
        for name, service in self._services.items():
            if not service.child.is_running:
                raise StartFailed(self._last_words(name, f"ended at start ({_how(service.child.exit_code)})"))

    def _last_words(self, name: str, what: str) -> str:
        lines = self._services[name].child.last_lines
        return f"{name} {what}" + (":\n  " + "\n  ".join(lines) if lines else "")

    def _announce(self) -> None:
        for service in self._services.values():
            service.child.is_quiet = False
        is_embedded = self._settings.model == "embedded"
        message = {"role": "user", "content": SUGGESTION if is_embedded else "Hello!"}
        body = json.dumps({"model": "default", "messages": [message], "max_tokens": 32, "temperature": 0})
        print_ = self._console.print
        print_(f"[bold green]ready[/]    {self._url}")
        for name, service in self._services.items():
            print_(f"metrics  {service.url}/metrics  ({name})")
        print_()
        if is_embedded:
            print_("Hello! I am a small model that remembers what you tell it. Talk to me in another terminal:\n")
        else:
            print_("Talk to it in another terminal:\n")
        print_(f"  {_own_command()} chat --url {self._url}\n", markup=False)
        print_("Or over the API:\n")
        print_(f"  curl {self._url}/v1/chat/completions \\\n    -H 'Content-Type: application/json' \\")
        print_(f"    -d {shlex.quote(body)}\n", markup=False)
        print_("[dim]Ctrl-C stops everything.[/]")

    # -- while it runs ---------------------------------------------------------------------------------------------

    async def _watch_all(self) -> None:
        watchers = [asyncio.create_task(self._watch(name, service)) for name, service in self._services.items()]
        stopped = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait({*watchers, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (*watchers, stopped):
            task.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        for task in done - {stopped}:
            task.result()  # a watcher ends only by a bug: say so

    async def _watch(self, name: str, service: _Watched) -> None:
        while True:
            code = await service.child.wait()
            if self._stop.is_set():
                return
            service.delay_s = restart_delay_s(service.delay_s, time.monotonic() - service.started_s)
            self._console.print(
                f"[yellow]{name} ended ({_how(code)}); starting it again in {service.delay_s:g} s[/]", highlight=False
            )
            await asyncio.sleep(service.delay_s)
            service.started_s = time.monotonic()
            await service.child.start()

    # -- stop ----------------------------------------------------------------------------------------------------

    async def _stop_all(self) -> bool:
        """Gateway first, so that nothing new comes; the daemon last, so that all is saved. True: all ended by 0."""
        clean = True
        for command, limit_s in _STOP_LIMIT_S.items():
            children = [service.child for service in self._services.values() if service.command == command]
            running = [child for child in children if child.is_running]
            for child in running:
                child.is_quiet = False
            if running:
                with Status(f"stopping {command}", console=self._console):
                    ended_well = await asyncio.gather(*(self._stop_one(child, limit_s) for child in running))
                clean = clean and all(ended_well)
        return clean

    async def _stop_one(self, child: Child, limit_s: float) -> bool:
        child.terminate()
        ended = asyncio.create_task(child.wait())
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({ended, hurried}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done() and self._hurry.is_set():
            child.terminate()
            await asyncio.wait({ended}, timeout=_HURRY_S)
        hurried.cancel()
        if not ended.done():
            self._console.print(f"[red]{child.name} did not stop; killed[/]")
            child.kill()
        return await ended == 0

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


async def _state(client: httpx.AsyncClient, url: str) -> tuple[bool, str]:
    """Whether a service is ready, and what it says about itself."""
    try:
        response = await client.get(f"{url}/ready")
        body = response.json()
        text = str(body.get("reason") or body.get("state") or response.status_code)
    except (httpx.HTTPError, ValueError, AttributeError):
        return False, "starting"
    return response.status_code == 200, text


def _own_command() -> str:
    """How a shell finds this program: by name, else by path."""
    beside = Path(sys.executable).with_name("cachedattention")
    by_path = shutil.which("cachedattention") is None and beside.exists()
    return shlex.quote(str(beside)) if by_path else "cachedattention"


def _how(code: int | None) -> str:
    if code is None:
        return "never started"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _with_ports(settings: Settings) -> tuple[Settings, list[int]]:
    """Settings with every port known and free, and the workers' ports of metrics.

    Raises ConfigError: one is in use, or two are the same.
    """
    with contextlib.ExitStack() as held:

        def take(key: str, host: str, port: int) -> int:
            return _take_port(key, host, port, held.callback)

        gateway = take("port", settings.host, settings.port)
        workers = [
            take("metrics_port_inference", settings.metrics_host, port) for port in settings.worker_metrics_ports()
        ]
        kvdaemon = take("metrics_port_kvdaemon", settings.metrics_host, settings.metrics_port_kvdaemon)
    return settings.model_copy(update={"port": gateway, "metrics_port_kvdaemon": kvdaemon}), workers


def _take_port(key: str, host: str, port: int, on_exit: Callable[[Callable[[], None]], object]) -> int:
    flag = f"--{key.replace('_', '-')}"
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        probe = socket.socket(family, kind, number)
        on_exit(probe.close)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen()  # with SO_REUSEADDR two sockets may be bound, but only one may listen
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{key}: cannot listen on {host} port {port}: {reason}; choose another {flag}", param=key
        ) from (error)
    return int(probe.getsockname()[1])
