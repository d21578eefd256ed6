"""The gateway process: what it is made of, how it starts, and how it stops in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
from collections.abc import Generator

import uvicorn

from gateway.api.admin import admin_router
from gateway.api.chat import chat_router
from gateway.api.completions import completions_router
from gateway.api.conversations import conversations_router
from gateway.api.health import health_router
from gateway.api.models import models_router
from gateway.api.responses import responses_router
from gateway.api.tokenize import tokenize_router
from gateway.app import make_app
from gateway.config import GatewayConfig
from gateway.dispatch import Dispatcher
from gateway.hints import QueueHints
from gateway.idempotency import Idempotency
from gateway.journal.conversations import Conversations
from gateway.journal.journal import Journal
from gateway.key_watch import KeyWatch
from gateway.page.machine import Machine
from gateway.page.mount import Page, Parts
from gateway.queue import TurnQueue
from gateway.queue_policies import POLICIES
from gateway.quotas import Quotas
from gateway.retention import Retention
from gateway.returns import Returns
from gateway.tenants import Tenants, load_secret
from gateway.turns import Turns
from gateway.workers import Workers
from monitoring.gateway_metrics import GatewayMetrics
from monitoring.logs import get_logger
from monitoring.registry import new_registry
from monitoring.status_server import Readiness
from protocol.arena import exclusive
from protocol.errors import ConfigError

log = get_logger(__name__)

_BACKLOG = 1024
_LAST_WRITES_S = 2  # for responses that were decided to reach their clients


def run(config: GatewayConfig) -> int:
    """Serve until SIGTERM or SIGINT; a second one cuts the end short. Returns 0.

    Raises ConfigError: the port is in use, another gateway has data_dir, or the journal cannot be used.
    """
    check_tls(config)
    with (
        contextlib.closing(listen(config.host, config.port)) as listener,
        exclusive(config.data_dir / "gateway.lock", "gateway"),
    ):
        asyncio.run(_serve(config, listener))
    return 0


def check_tls(config: GatewayConfig) -> None:
    """Raises ConfigError: certificate and key cannot be read, or do not belong together."""
    if config.tls_certificate is not None and config.tls_key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_certificate, config.tls_key)
        except OSError as error:  # of which ssl.SSLError is one
            raise ConfigError(f"TLS with {config.tls_certificate}: {error}", param="tls_certificate") from error


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError: the port is in use, or there is no such address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name with several addresses, such as localhost, the one that everybody tries.
        family, kind, number, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        listener = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host}: {error}", param="host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}", param="port") from error
    return listener


class Gateway:
    """Everything but the HTTP server. Owned by one loop."""

    def __init__(self, config: GatewayConfig, tenants: Tenants, journal: Journal) -> None:
        """Use Gateway.open."""
        self.config = config
        self.metrics = GatewayMetrics(new_registry())
        self._journal = journal
        self._key_watch: KeyWatch | None = None
        if config.api_key_file is not None:
            self._key_watch = KeyWatch(tenants, config.api_key_file, config.api_key_hashes)
        self._workers = Workers(config.inference_endpoints, config.curve, self._peers_changed)
        self.metrics.inference_workers.set(len(config.inference_endpoints))
        self.metrics.queue_limit.set(config.queue_limit)
        self._hints = QueueHints(config.kvdaemon_endpoint, config.curve, self._peers_changed)
        queue = TurnQueue(config.queue_limit, POLICIES[config.queue_policy])
        self._dispatcher = Dispatcher(queue, self._workers, self._hints.tell, self.metrics)
        self._returns = Returns(self._hints)
        self._turns = Turns(
            journal, self._dispatcher, self._workers, self.metrics, config.turn_timeout_s, self._returns
        )
        self._quotas = Quotas(self._hints, self._turns.meters)
        conversations = Conversations(journal)
        idempotency, limit = Idempotency(), config.max_body_bytes
        self._retention = Retention(conversations, self._hints, self._workers, idempotency, self.metrics)
        machine = Machine(self._turns, self._dispatcher, self._workers, self._hints)
        parts = Parts(self._turns, conversations, self._retention, self._workers, tenants, machine, limit)
        self._page = Page(parts) if config.page else None
        self.app = make_app(
            (
                chat_router(self._turns, self._workers, tenants, journal, idempotency, limit),
                completions_router(self._turns, self._workers, tenants, idempotency, limit),
                responses_router(self._turns, self._workers, tenants, journal, conversations, idempotency, limit),
                conversations_router(conversations, self._retention, self._workers, tenants, limit),
                tokenize_router(self._workers, tenants, limit),
                admin_router(tenants, self._turns, self._dispatcher),
                models_router(self._workers, tenants),
                health_router(self.readiness, self.metrics),
            ),
            self.metrics,
            config.cors_origins,
            None if self._page is None else self._page.before,
        )

    @classmethod
    async def open(cls, config: GatewayConfig) -> Gateway:
        """Open what lies in data_dir and begin to connect. Raises ConfigError: it cannot be used."""
        tenants = Tenants(load_secret(config.data_dir / "secret"), config.api_keys)
        journal = await Journal.open(config.database_url, config.data_dir)
        try:
            gateway = cls(config, tenants, journal)
            gateway.metrics.conversations.set(await journal.count_conversations())
            await gateway._workers.start()
            await gateway._hints.start()
            gateway._returns.start()
            gateway._quotas.start()
            gateway._retention.start()
            if gateway._key_watch is not None:
                gateway._key_watch.start()
        except BaseException:
            await journal.close()
            raise
        return gateway

    def readiness(self) -> Readiness:
        if self._turns.is_drained:
            return Readiness(False, "drained", "an admin wants no new turns here")
        if not self._turns.is_accepting:
            return Readiness(False, "stopping", "the server is shutting down")
        if not self._workers.is_connected:
            return Readiness(False, "starting", self._workers.reason)
        missing = [self._workers.reason] if self._workers.reason else []
        if not self._hints.is_connected:
            missing.append("kvdaemon is not connected")
        return Readiness(True, "degraded" if missing else "ok", "; ".join(missing))

    async def drain(self, hurry: asyncio.Event) -> None:
        """Refuse new turns, and bring those at hand to their end."""
        await self._turns.drain(self.config.drain_s, hurry)

    async def close(self) -> None:
        if self._page is not None:
            await self._page.close()
        if self._key_watch is not None:
            await self._key_watch.stop()
        await self._quotas.stop()
        await self._returns.stop()
        await self._retention.stop()
        await self._hints.stop()
        await self._workers.stop()
        await self._journal.close()

    def _peers_changed(self) -> None:
        self.metrics.inference_connected.set(self._workers.serving)
        self.metrics.kvdaemon_connected.set(self._hints.is_connected)
        self._dispatcher.pump()


class HttpServer(uvicorn.Server):
    """uvicorn, with signals left to us: we end the turns before the connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def http_server(gateway: Gateway) -> HttpServer:
    config = gateway.config
    return HttpServer(
        uvicorn.Config(
            gateway.app,
            loop="asyncio",
            http="httptools",
            ws="none" if config.page is False else "websockets-sansio",
            ws_max_size=config.max_body_bytes,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_WRITES_S,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
        )
    )


async def _serve(config: GatewayConfig, listener: socket.socket) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    gateway = await Gateway.open(config)
    gc.freeze()  # what is there now stays: collections that look at all of it would stop every stream for 0.1 s
    try:
        await serve(gateway, listener, stop, hurry)
    finally:
        await gateway.close()


async def serve(gateway: Gateway, listener: socket.socket, stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """Serve HTTP until `stop`, then end in order: refuse, let turns end, abort them, answer, close connections."""
    server = http_server(gateway)
    serving = asyncio.create_task(server.serve([listener]))
    host, port = listener.getsockname()[:2]
    config = gateway.config
    log.info("gateway serves", host=host, port=port, tls=config.tls_certificate is not None)
    if not config.api_keys:
        who = "everybody who reaches it" if config.anonymous else "everybody on this machine, and nobody else"
        log.warning(f"no API keys: the gateway serves {who}")
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not serving.done():
        log.info("gateway stops")
        await gateway.drain(hurry)
        server.should_exit = True
    await serving
