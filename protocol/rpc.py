"""Requests and streamed replies over ZeroMQ: DEALER to ROUTER, correlation ids, a deadline on everything.

Guarantees, to both sides:
- every request that a server accepts gets exactly one final reply: done, failed or cancelled;
- a request ends by its deadline, whatever the peer does: reply, PeerTimeout or PeerUnavailable;
- a client that loses its server fails its open requests at once, and when a server is back says hello and
  replays its state (`on_connected`) before any other request passes;
- a peer's wrong bytes are counted and answered, and disturb nobody else.

One asyncio loop owns a client or a server; nothing here is safe from another thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import socket as sockets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from protocol import PROTOCOL_VERSION
from protocol.codec import MAX_FRAME_BYTES, Frame, correlation_of, decode, encode
from protocol.errors import (
    Cancelled,
    ConfigError,
    PeerProtocolError,
    PeerTimeout,
    PeerUnavailable,
    from_wire,
    to_wire,
)
from protocol.ids import new_id
from protocol.messages import Ack, Hello, Ping, Welcome

log = logging.getLogger("rpc")
M = TypeVar("M")

_HEARTBEAT_MS = 1_000
_DEAD_AFTER_MS = 4_000  # ZMTP heartbeats unanswered for this long end a connection
_HIGH_WATER = 10_000  # messages queued to one peer; past it the peer counts as stuck
_IPC_PATH_LIMIT = 107  # sun_path of a Unix socket
_LONGEST_HEARTBEAT_S = 60.0
_DRAIN_S = 0.02


@dataclass(frozen=True)
class Curve:
    """CURVE keys of one side, Z85 text. server_public is the other side's key on a client and unused on a server."""

    public: bytes
    secret: bytes
    server_public: bytes = b""


def check_endpoint(endpoint: str, curve: Curve | None) -> None:
    """Raises ConfigError: an endpoint that we refuse, with what to change."""
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        if len(path.encode()) > _IPC_PATH_LIMIT:
            raise ConfigError(f"socket path {path} is longer than {_IPC_PATH_LIMIT} bytes; choose a shorter --run-dir")
    elif endpoint.startswith("tcp://"):
        host = endpoint.removeprefix("tcp://").rsplit(":", 1)[0].strip("[]")
        if curve is None and not _is_loopback(host):
            raise ConfigError(f"{endpoint} leaves this machine without CURVE keys; give --keys or use loopback")
    elif not endpoint.startswith("inproc://"):
        raise ConfigError(f"{endpoint} is neither ipc:// nor tcp://")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: it may resolve to anything
        return False


def _configure(socket: zmq.asyncio.Socket, curve: Curve | None, *, server: bool) -> None:
    socket.linger = 0
    socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, _DEAD_AFTER_MS)
    socket.set(zmq.HEARTBEAT_TTL, _DEAD_AFTER_MS)
    socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.set(zmq.SNDHWM, _HIGH_WATER)
    socket.set(zmq.RCVHWM, _HIGH_WATER)
    if curve is not None:
        socket.curve_publickey = curve.public
        socket.curve_secretkey = curve.secret
        if server:
            socket.curve_server = True
        else:
            socket.curve_serverkey = curve.server_public


def _is_served(path: str) -> bool:
    """Whether somebody listens on a Unix socket. ZeroMQ would take the path over without a word."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:  # nobody, no socket at all, or one that is not ours to ask: bind will tell
            return False
    return True


def _report_failure(task: asyncio.Task[None]) -> None:
    """A loop of a client or server never ends by itself; where a bug ends one, it must not do so in silence."""
    if not task.cancelled() and task.exception() is not None:
        log.critical("a transport loop died", exc_info=task.exception())


# -- server -------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """One connected client, as the server knows it."""

    identity: bytes
    role: str
    client_id: bytes
    heartbeat_s: float
    last_seen_s: float
    calls: dict[int, asyncio.Task[None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One request being handled: who asked, and the way to stream parts of the reply."""

    peer: Peer
    deadline_s: float  # monotonic; after it nobody waits any more
    send: Callable[[Any], Awaitable[None]]


Handler = Callable[[Call, Any], Awaitable[Any]]


@dataclass
class RpcStats:
    """Counters, read by monitoring: nothing here acts on them."""

    requests: int = 0
    rejected_frames: int = 0
    failures: int = 0


class RpcServer:
    """A ROUTER that answers typed requests.

    handlers: message type -> async function (call, message) that returns the final reply. A handler may stream
    with `call.send`; it is cancelled when the client cancels, dies or falls silent, and an error that it raises
    becomes the failed final reply.
    on_peer_lost: called once for a client process that fell silent, not for one that only reconnected.
    observe: called with (name of the request's type, seconds) after every request.
    """

    def __init__(
        self,
        endpoint: str,
        service: str,
        handlers: Mapping[type, Handler],
        *,
        curve: Curve | None = None,
        on_peer_lost: Callable[[Peer], None] | None = None,
        observe: Callable[[str, float], None] | None = None,
    ) -> None:
        check_endpoint(endpoint, curve)
        self.endpoint = endpoint
        self.epoch = new_id()
        self.stats = RpcStats()
        self._service = service
        self._handlers = dict(handlers)
        self._curve = curve
        self._on_peer_lost = on_peer_lost
        self._observe = observe
        self._peers: dict[bytes, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: zmq.asyncio.Socket | None = None

    @property
    def peers(self) -> list[Peer]:
        return list(self._peers.values())

    async def start(self) -> None:
        """Bind and serve. Raises ConfigError: the endpoint is taken or cannot be made."""
        if self.endpoint.startswith("ipc://") and _is_served(self.endpoint.removeprefix("ipc://")):
            raise ConfigError(f"cannot listen on {self.endpoint}: another process does")
        socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        _configure(socket, self._curve, server=True)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        try:
            socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(f"cannot listen on {self.endpoint}: {error.strerror}") from error
        if self.endpoint.startswith("ipc://"):
            Path(self.endpoint.removeprefix("ipc://")).chmod(0o600)
        self._socket = socket
        self._spawn(self._receive())
        self._spawn(self._reap_silent_peers())

    async def stop(self) -> None:
        """Accept nothing more, cancel what runs, each with its final reply, then close the socket."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        calls = [task for peer in self._peers.values() for task in peer.calls.values()]
        for task in calls:
            task.cancel()
        if calls:
            await asyncio.wait(calls, timeout=2.0)
        if self._socket is not None:
            self._socket.close(linger=200)
            self._socket = None
            if self.endpoint.startswith("ipc://"):  # one that never bound may be another server's
                Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(_report_failure)

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            parts = await self._socket.recv_multipart()
            if len(parts) != 2:
                self.stats.rejected_frames += 1
                continue
            identity, data = parts
            peer = self._peers.get(identity)
            if peer is not None:
                peer.last_seen_s = time.monotonic()
            try:
                frame = decode(data)
                await self._accept(identity, peer, frame)
            except PeerProtocolError as error:
                self.stats.rejected_frames += 1
                correlation = correlation_of(data)
                if correlation is not None:
                    await self._reply(identity, Frame("err", correlation, to_wire(error)))

    async def _accept(self, identity: bytes, peer: Peer | None, frame: Frame) -> None:
        if frame.kind == "cancel":
            task = peer.calls.get(frame.correlation) if peer is not None else None
            if task is not None:
                task.cancel()
            return
        if frame.kind != "req":
            raise PeerProtocolError(f"a client sends requests, not {frame.kind!r}")
        if isinstance(frame.body, Hello):
            await self._hello(identity, frame.correlation, frame.body)
            return
        if peer is None:
            # Also the state after our restart: the client still knows a server that we are not.
            raise PeerProtocolError("say hello first")
        if isinstance(frame.body, Ping):
            await self._reply(identity, Frame("end", frame.correlation, Ack()))
            return
        handler = self._handlers.get(type(frame.body))
        if handler is None:
            raise PeerProtocolError(f"{self._service} does not answer {type(frame.body).__name__}")
        if frame.correlation in peer.calls:
            raise PeerProtocolError(f"correlation id {frame.correlation} is in use")
        task = asyncio.ensure_future(self._handle(peer, frame, handler))
        peer.calls[frame.correlation] = task
        # Give it its first step before the next frame is read: a task cancelled before that would never run at
        # all, and its request would get no final reply.
        await asyncio.sleep(0)

    async def _hello(self, identity: bytes, correlation: int, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            raise PeerProtocolError(
                f"{self._service} speaks protocol version {PROTOCOL_VERSION}, the peer {hello.protocol_version}"
            )
        known = self._peers.get(identity)
        if known is None:
            sane = 0.0 < hello.heartbeat_s <= _LONGEST_HEARTBEAT_S  # neither for ever nor not a number
            heartbeat_s = hello.heartbeat_s if sane else _LONGEST_HEARTBEAT_S
            now = time.monotonic()
            self._peers[identity] = Peer(identity, hello.role, hello.client_id, heartbeat_s, now)
        else:  # it lost touch with us, not we with it: it has given up what it had asked
            for task in list(known.calls.values()):
                task.cancel()
        for other in self.peers:
            if other.client_id == hello.client_id and other.identity != identity:
                self._drop(other)  # the same process on its new connection: its old calls have no reader
        welcome = Welcome(PROTOCOL_VERSION, self._service, self.epoch)
        await self._reply(identity, Frame("end", correlation, welcome))

    async def _handle(self, peer: Peer, frame: Frame, handler: Handler) -> None:
        async def send(part: Any) -> None:
            await self._reply(peer.identity, Frame("part", frame.correlation, part))

        started = time.monotonic()
        deadline_s = started + (frame.deadline_ms or 60_000) / 1e3
        self.stats.requests += 1
        try:
            reply = await handler(Call(peer, deadline_s, send), frame.body)
            final = encode(Frame("end", frame.correlation, reply))
        except asyncio.CancelledError:
            final = encode(Frame("err", frame.correlation, to_wire(Cancelled("cancelled"))))
        except Exception as error:  # the edge: whatever failed becomes this request's final reply
            self.stats.failures += 1
            wire = to_wire(error)
            if wire["code"] == "internal_error":
                log.exception("%s failed", type(frame.body).__name__)
            final = encode(Frame("err", frame.correlation, wire))
        # From here on nothing can cancel this request: what was decided is what is sent.
        del peer.calls[frame.correlation]
        await self._send(peer.identity, final)
        if self._observe is not None:
            self._observe(type(frame.body).__name__, time.monotonic() - started)

    async def _reply(self, identity: bytes, frame: Frame) -> None:
        await self._send(identity, encode(frame))

    async def _send(self, identity: bytes, data: bytes) -> None:
        if self._socket is None:
            return
        # A ROUTER drops what it cannot route; a peer that is gone is noticed by silence.
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send_multipart((identity, data))

    async def _reap_silent_peers(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            for peer in list(self._peers.values()):
                if now - peer.last_seen_s > max(5.0, 5 * peer.heartbeat_s):
                    self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        self._peers.pop(peer.identity, None)
        for task in list(peer.calls.values()):
            task.cancel()
        if self._on_peer_lost is not None and all(other.client_id != peer.client_id for other in self.peers):
            try:
                self._on_peer_lost(peer)
            except Exception:  # the owner's bug; the other peers are still to be served
                log.exception("on_peer_lost failed")


# -- client -------------------------------------------------------------------------------------------------


class Ask(Protocol):
    """The shape of RpcClient.request."""

    async def __call__(self, message: Any, expect: type[M], timeout_s: float) -> M: ...


@dataclass
class _Pending:
    replies: asyncio.Queue[Frame | Exception] = field(default_factory=asyncio.Queue)


class RpcClient:
    """A DEALER that asks one server.

    on_connected: awaited after every successful hello with (welcome, ask), before other requests pass; replays
    state through `ask`, which is `request` for this moment. Where it raises, hello is tried again.
    on_disconnected: called when the server goes away.
    """

    def __init__(
        self,
        endpoint: str,
        role: str,
        *,
        client_id: bytes | None = None,
        curve: Curve | None = None,
        on_connected: Callable[[Welcome, Ask], Awaitable[None]] | None = None,
        on_disconnected: Callable[[], None] | None = None,
    ) -> None:
        check_endpoint(endpoint, curve)
        self.endpoint = endpoint
        self.client_id = client_id or new_id()
        self.last_error = ""
        self._role = role
        self._curve = curve
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._pending: dict[int, _Pending] = {}
        self._correlations = itertools.count(1)
        self._ready = asyncio.Event()
        self._transport_up = endpoint.startswith("inproc://")  # which has no events, and no way to break
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: zmq.asyncio.Socket | None = None
        self._monitor: zmq.asyncio.Socket | None = None
        self._wake = asyncio.Event()  # the transport connected or broke: the session looks again

    @property
    def is_connected(self) -> bool:
        """Whether a hello was answered and state replayed since the connection last broke."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Begin to connect, and go on for ever. Returns at once; see wait_connected."""
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        _configure(socket, self._curve, server=False)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 500)
        # Not zmq.IMMEDIATE: with it, replies that we have not read yet are dropped when the server goes away.
        # `_transmit_bytes` is what keeps requests from queueing for a server that is not there.
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        assert monitor is not None
        self._socket, self._monitor = socket, monitor
        socket.connect(self.endpoint)
        for coroutine in (self._receive(), self._watch(), self._session()):
            task = asyncio.ensure_future(coroutine)
            self._tasks.add(task)
            task.add_done_callback(_report_failure)

    async def wait_connected(self, timeout_s: float) -> None:
        """Raises PeerUnavailable: no hello answered in time; the text says what stood against it."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise PeerUnavailable(
                f"{self.endpoint} did not answer in {timeout_s:g} s {self.last_error}".strip()
            ) from None

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all(PeerUnavailable(f"{self.endpoint}: closed"))
        self._ready.clear()
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._socket = self._monitor = None

    async def request(self, message: Any, expect: type[M], timeout_s: float) -> M:
        """One request, one reply of type `expect`.

        Raises what the server raised, PeerTimeout, PeerUnavailable (at once when not connected), or
        PeerProtocolError where the reply is of another type.
        """
        if not self._ready.is_set():
            raise PeerUnavailable(f"{self.endpoint} is not connected {self.last_error}".strip())
        return await self._request(message, expect, timeout_s)

    async def stream(self, message: Any, timeout_s: float, idle_timeout_s: float) -> AsyncGenerator[Any, None]:
        """One request; yields each part and at last the final reply. Leaving the loop early cancels the request.

        timeout_s bounds the whole, idle_timeout_s the wait for each part.
        """
        if not self._ready.is_set():
            raise PeerUnavailable(f"{self.endpoint} is not connected {self.last_error}".strip())
        correlation, pending = await self._send(message, timeout_s)
        deadline = time.monotonic() + timeout_s
        finished = False
        try:
            while True:
                wait_s = min(idle_timeout_s, deadline - time.monotonic())
                frame = await self._next(pending, wait_s, message)
                finished = frame.kind in ("end", "err")
                if frame.kind == "err":
                    raise _error(frame)
                yield frame.body
                if finished:
                    return
        finally:
            self._pending.pop(correlation, None)
            if not finished:
                await self._transmit(Frame("cancel", correlation))

    # -- inside -------------------------------------------------------------------------------------------

    async def _request(self, message: Any, expect: type[M], timeout_s: float) -> M:
        correlation, pending = await self._send(message, timeout_s)
        try:
            frame = await self._next(pending, timeout_s, message)
        except (PeerTimeout, asyncio.CancelledError):
            await self._transmit(Frame("cancel", correlation))
            raise
        finally:
            self._pending.pop(correlation, None)
        if frame.kind == "err":
            raise _error(frame)
        if not isinstance(frame.body, expect):
            raise PeerProtocolError(f"{type(message).__name__} was answered by {type(frame.body).__name__}")
        return frame.body

    async def _send(self, message: Any, timeout_s: float) -> tuple[int, _Pending]:
        correlation = next(self._correlations)
        pending = _Pending()
        self._pending[correlation] = pending
        data = encode(Frame("req", correlation, message, max(1, int(timeout_s * 1e3))))
        try:
            await self._transmit_bytes(data)
        except PeerUnavailable:
            self._pending.pop(correlation, None)
            raise
        return correlation, pending

    async def _transmit(self, frame: Frame) -> None:
        with contextlib.suppress(PeerUnavailable):
            await self._transmit_bytes(encode(frame))

    async def _transmit_bytes(self, data: bytes) -> None:
        if self._socket is None:
            raise PeerUnavailable(f"{self.endpoint}: closed")
        if not self._transport_up:
            raise PeerUnavailable(f"{self.endpoint}: nobody answers there")
        try:
            await self._socket.send(data, flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:  # EAGAIN: the server reads nothing
            raise PeerUnavailable(f"{self.endpoint}: {error.strerror}") from error

    async def _next(self, pending: _Pending, wait_s: float, message: Any) -> Frame:
        try:
            async with asyncio.timeout(max(0.0, wait_s)):
                reply = await pending.replies.get()
        except TimeoutError:
            raise PeerTimeout(f"{self.endpoint} did not answer {type(message).__name__} in {wait_s:.3g} s") from None
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            data = await self._socket.recv()
            try:
                frame = decode(data)
            except PeerProtocolError as error:
                log.warning("bad frame from %s: %s", self.endpoint, error)
                correlation = correlation_of(data)
                if correlation in self._pending:
                    self._pending[correlation].replies.put_nowait(error)
                continue
            pending = self._pending.get(frame.correlation)
            if pending is None:
                continue  # nobody waits for it any more
            if frame.kind == "err" and frame.body["message"] == "say hello first":
                # The server is a new process that never saw our hello.
                self._lost("the server restarted")
            pending.replies.put_nowait(frame)

    async def _watch(self) -> None:
        """Turn transport events into state: a broken connection fails all open requests now, not at their deadline."""
        assert self._monitor is not None
        while True:
            parts = await self._monitor.recv_multipart()
            event = parse_monitor_message(parts)["event"]
            if event == zmq.EVENT_DISCONNECTED:
                # What the server said before it went is still in the pipe: a last reply is better than none.
                self._transport_up = False
                await asyncio.sleep(_DRAIN_S)
                self._lost("the connection broke")
            else:
                self._transport_up = True
            self._wake.set()

    def _lost(self, why: str) -> None:
        was_ready = self._ready.is_set()
        self._ready.clear()
        self._fail_all(PeerUnavailable(f"{self.endpoint}: {why}"))
        self._wake.set()
        if was_ready and self._on_disconnected is not None:
            self._on_disconnected()

    def _fail_all(self, error: Exception) -> None:
        for pending in self._pending.values():
            pending.replies.put_nowait(error)

    async def _session(self) -> None:
        """Say hello whenever we are not connected, ping while we are."""
        while True:
            if not self._ready.is_set():
                self._wake.clear()
                try:
                    hello = Hello(PROTOCOL_VERSION, self._role, self.client_id)
                    welcome = await self._request(hello, Welcome, 2.0)
                    if welcome.protocol_version != PROTOCOL_VERSION:
                        raise PeerProtocolError(f"the server speaks protocol version {welcome.protocol_version}")
                    if self._on_connected is not None:
                        await self._on_connected(welcome, self._request)
                    self.last_error = ""
                    self._ready.set()
                    continue
                except asyncio.CancelledError:
                    raise
                except Exception as error:  # tried again below; shown to whoever waits
                    if self.last_error != f"({error})" and not isinstance(error, PeerUnavailable):
                        log.warning("hello to %s failed: %s", self.endpoint, error)
                    self.last_error = f"({error})"
                await self._sleep(0.25)
            else:
                try:
                    await self._request(Ping(), Ack, 3.0)
                except Exception as error:
                    self._lost(f"no answer to a ping ({error})")
                    continue
                await self._sleep(1.0)

    async def _sleep(self, seconds: float) -> None:
        # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that arrives together with the event.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()


def _error(frame: Frame) -> Exception:
    body: Mapping[str, Any] = frame.body
    return from_wire(body["code"], body["message"], body["param"])
