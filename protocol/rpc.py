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
import functools
import inspect
import ipaddress
import itertools
import logging
import socket as sockets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import zmq
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
from protocol.loop_socket import LoopSocket
from protocol.messages import Ack, Hello, Ping, Welcome

log = logging.getLogger("rpc")
M = TypeVar("M")

_HEARTBEAT_MS = 1_000
_DEAD_AFTER_MS = 4_000  # ZMTP heartbeats unanswered for this long end a connection
_HIGH_WATER = 10_000  # messages queued to one peer; past it the peer counts as stuck
_IPC_PATH_LIMIT = 107  # sun_path of a Unix socket
_LONGEST_HEARTBEAT_S = 60.0
_DRAIN_S = 0.02
# From here on a loop that runs late counts as stalled (a machine that was paused, a long collection): what it missed
# meanwhile is no silence of its peers.
_STALL_S = 0.1


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


def _configure(socket: zmq.Socket[bytes], curve: Curve | None, *, server: bool) -> None:
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
    calls: dict[int, asyncio.Task[Any]] = field(default_factory=dict)  # that wait for something


@dataclass(slots=True)
class Call:
    """One request being handled: who asked, and the way to stream parts of the reply."""

    peer: Peer
    correlation: int
    started_s: float  # monotonic, as the deadline
    deadline_s: float  # after it nobody waits any more
    _reply: Callable[[bytes, Frame], None]

    async def send(self, part: Any) -> None:
        """Raises PeerProtocolError: too large."""
        self._reply(self.peer.identity, Frame("part", self.correlation, part))


Handler = Callable[[Call, Any], Any]


@dataclass
class RpcStats:
    """Counters, read by monitoring: nothing here acts on them."""

    requests: int = 0
    rejected_frames: int = 0
    failures: int = 0


class RpcServer:
    """A ROUTER that answers typed requests.

    handlers: message type -> function (call, message) that returns the final reply; an error that it raises becomes
    the failed final reply. One that has to wait is a coroutine function: it may stream with `call.send`, and is
    cancelled when the client cancels, dies or falls silent. Handlers begin in the order in which requests come.
    on_peer_lost: called once for a client process that fell silent, not for one that only reconnected.
    observe: called with (request, seconds) after every request.
    """

    def __init__(
        self,
        endpoint: str,
        service: str,
        handlers: Mapping[type, Handler],
        *,
        curve: Curve | None = None,
        on_peer_lost: Callable[[Peer], None] | None = None,
        observe: Callable[[Any, float], None] | None = None,
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
        self._reaper: asyncio.Task[None] | None = None
        self._socket: LoopSocket | None = None

    @property
    def peers(self) -> list[Peer]:
        return list(self._peers.values())

    async def start(self) -> None:
        """Bind and serve. Raises ConfigError: the endpoint is taken or cannot be made."""
        if self.endpoint.startswith("ipc://") and _is_served(self.endpoint.removeprefix("ipc://")):
            raise ConfigError(f"cannot listen on {self.endpoint}: another process does")
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        _configure(socket, self._curve, server=True)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        try:
            socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(f"cannot listen on {self.endpoint}: {error.strerror}") from error
        if self.endpoint.startswith("ipc://"):
            Path(self.endpoint.removeprefix("ipc://")).chmod(0o600)
        self._socket = LoopSocket(socket, self._receive)
        self._reaper = asyncio.ensure_future(self._reap_silent_peers())
        self._reaper.add_done_callback(_report_failure)

    async def stop(self) -> None:
        """Accept nothing more, cancel what runs, each with its final reply, then close the socket."""
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)
        if self._socket is not None:
            self._socket.stop_reading()
        calls = [task for peer in self._peers.values() for task in peer.calls.values()]
        for task in calls:
            task.cancel()
        if calls:
            await asyncio.wait(calls, timeout=2.0)
            await asyncio.sleep(0)  # those that had ended by themselves send their final replies now
        if self._socket is not None:
            self._socket.close(linger_ms=200)
            self._socket = None
            if self.endpoint.startswith("ipc://"):  # one that never bound may be another server's
                Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def _receive(self, parts: list[bytes]) -> None:
        if len(parts) != 2:
            self.stats.rejected_frames += 1
            return
        identity, data = parts
        peer = self._peers.get(identity)
        if peer is not None:
            peer.last_seen_s = time.monotonic()
        try:
            self._accept(identity, peer, decode(data))
        except PeerProtocolError as error:
            self.stats.rejected_frames += 1
            correlation = correlation_of(data)
            if correlation is not None:
                self._reply(identity, Frame("err", correlation, to_wire(error)))

    def _accept(self, identity: bytes, peer: Peer | None, frame: Frame) -> None:
        if frame.kind == "cancel":
            task = peer.calls.get(frame.correlation) if peer is not None else None
            if task is not None:
                task.cancel()
            return
        if frame.kind != "req":
            raise PeerProtocolError(f"a client sends requests, not {frame.kind!r}")
        if isinstance(frame.body, Hello):
            self._hello(identity, frame.correlation, frame.body)
            return
        if peer is None:
            # Also the state after our restart: the client still knows a server that we are not.
            raise PeerProtocolError("say hello first")
        if isinstance(frame.body, Ping):
            self._reply(identity, Frame("end", frame.correlation, Ack()))
            return
        handler = self._handlers.get(type(frame.body))
        if handler is None:
            raise PeerProtocolError(f"{self._service} does not answer {type(frame.body).__name__}")
        if frame.correlation in peer.calls:
            raise PeerProtocolError(f"correlation id {frame.correlation} is in use")
        self._handle(peer, frame, handler)

    def _hello(self, identity: bytes, correlation: int, hello: Hello) -> None:
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
        self._reply(identity, Frame("end", correlation, welcome))

    def _handle(self, peer: Peer, frame: Frame, handler: Handler) -> None:
        started_s = time.monotonic()
        deadline_s = started_s + (frame.deadline_ms or 60_000) / 1e3
        call = Call(peer, frame.correlation, started_s, deadline_s, self._reply)
        self.stats.requests += 1
        try:
            reply = handler(call, frame.body)
        except Exception as error:
            reply = error
        if inspect.iscoroutine(reply):
            task = peer.calls[frame.correlation] = asyncio.ensure_future(reply)
            # A callback, because a task that is cancelled before its first step runs nothing of its own.
            task.add_done_callback(functools.partial(self._ended, call, frame.body))
        else:
            self._finish(call, frame.body, reply)

    def _ended(self, call: Call, request: Any, task: asyncio.Task[Any]) -> None:
        del call.peer.calls[call.correlation]
        error = Cancelled("cancelled") if task.cancelled() else task.exception()
        self._finish(call, request, task.result() if error is None else error)

    def _finish(self, call: Call, request: Any, outcome: Any) -> None:
        """Send the final reply: a message, or an error."""
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            final = encode(Frame("end", call.correlation, outcome))
        except Exception as error:  # the edge: whatever failed becomes this request's final reply
            self.stats.failures += not isinstance(error, Cancelled)
            wire = to_wire(error)
            if wire["code"] == "internal_error":
                log.exception("%s failed", type(request).__name__)
            final = encode(Frame("err", call.correlation, wire))
        self._send(call.peer.identity, final)
        if self._observe is not None:
            self._observe(request, time.monotonic() - call.started_s)

    def _reply(self, identity: bytes, frame: Frame) -> None:
        self._send(identity, encode(frame))

    def _send(self, identity: bytes, data: bytes) -> None:
        if self._socket is None:
            return
        # A ROUTER drops what it cannot route; a peer that is gone is noticed by silence.
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(identity, data)

    async def _reap_silent_peers(self) -> None:
        now = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            before, now = now, time.monotonic()
            stalled_s = now - before - 0.5
            for peer in list(self._peers.values()):
                if stalled_s > _STALL_S:
                    peer.last_seen_s = min(now, peer.last_seen_s + stalled_s)
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


class _Replies:
    """What came for one request and was not taken yet: frames, or what broke the connection."""

    __slots__ = ("_came", "_waiter")

    def __init__(self) -> None:
        self._came: deque[Frame | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, reply: Frame | Exception) -> None:
        self._came.append(reply)
        if self._waiter is not None:
            _wake(self._waiter)

    async def take(self, wait_s: float) -> Frame:
        """The next frame. Raises TimeoutError, or what broke the connection. One waits at a time."""
        if not self._came:
            late_s = await self._wait(max(0.0, wait_s))
            if not self._came and late_s > _STALL_S:
                await self._wait(min(late_s, wait_s))
            if not self._came:
                raise TimeoutError
        reply = self._came.popleft()
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def _wait(self, wait_s: float) -> float:
        """Until something came, or wait_s have passed. Returns by how much the wait was longer than that."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        due_s = loop.time() + wait_s
        timer = loop.call_at(due_s, _wake, self._waiter)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None
        return loop.time() - due_s


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


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
        self._pending: dict[int, _Replies] = {}
        self._correlations = itertools.count(1)
        self._ready = asyncio.Event()
        self._transport_up = endpoint.startswith("inproc://")  # which has no events, and no way to break
        self._talking: asyncio.Task[None] | None = None
        self._breaking: asyncio.TimerHandle | None = None
        self._socket: LoopSocket | None = None
        self._monitor: LoopSocket | None = None
        self._wake = asyncio.Event()  # the transport connected or broke: the session looks again

    @property
    def is_connected(self) -> bool:
        """Whether a hello was answered and state replayed since the connection last broke."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Begin to connect, and go on for ever. Returns at once; see wait_connected."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _configure(socket, self._curve, server=False)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 500)
        # Not zmq.IMMEDIATE: with it, replies that we have not read yet are dropped when the server goes away.
        # `_transmit` is what keeps requests from queueing for a server that is not there.
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._monitor = LoopSocket(monitor, self._transport_changed)
        self._socket = LoopSocket(socket, self._receive)
        socket.connect(self.endpoint)
        self._talking = asyncio.ensure_future(self._session())
        self._talking.add_done_callback(_report_failure)

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
        if self._talking is not None:
            self._talking.cancel()
            await asyncio.gather(self._talking, return_exceptions=True)
        if self._breaking is not None:
            self._breaking.cancel()
        self._fail_all(PeerUnavailable(f"{self.endpoint}: closed"))
        self._ready.clear()
        if self._socket is not None and self._monitor is not None:
            self._socket.socket.disable_monitor()
            self._monitor.close()
            self._socket.close()
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
        correlation, replies = self._send(message, timeout_s)
        deadline = time.monotonic() + timeout_s
        finished = False
        try:
            while True:
                wait_s = min(idle_timeout_s, deadline - time.monotonic())
                frame = await self._next(replies, wait_s, message)
                finished = frame.kind in ("end", "err")
                if frame.kind == "err":
                    raise _error(frame)
                yield frame.body
                if finished:
                    return
        finally:
            self._pending.pop(correlation, None)
            if not finished:
                self._cancel(correlation)

    # -- inside -------------------------------------------------------------------------------------------

    async def _request(self, message: Any, expect: type[M], timeout_s: float) -> M:
        correlation, replies = self._send(message, timeout_s)
        try:
            frame = await self._next(replies, timeout_s, message)
        except (PeerTimeout, asyncio.CancelledError):
            self._cancel(correlation)
            raise
        finally:
            self._pending.pop(correlation, None)
        if frame.kind == "err":
            raise _error(frame)
        if not isinstance(frame.body, expect):
            raise PeerProtocolError(f"{type(message).__name__} was answered by {type(frame.body).__name__}")
        return frame.body

    def _send(self, message: Any, timeout_s: float) -> tuple[int, _Replies]:
        correlation = next(self._correlations)
        self._transmit(Frame("req", correlation, message, max(1, int(timeout_s * 1e3))))
        replies = self._pending[correlation] = _Replies()
        return correlation, replies

    def _cancel(self, correlation: int) -> None:
        with contextlib.suppress(PeerUnavailable):
            self._transmit(Frame("cancel", correlation))

    def _transmit(self, frame: Frame) -> None:
        data = encode(frame)
        if self._socket is None:
            raise PeerUnavailable(f"{self.endpoint}: closed")
        if not self._transport_up:
            raise PeerUnavailable(f"{self.endpoint}: nobody answers there")
        try:
            self._socket.send(data)
        except zmq.ZMQError as error:  # EAGAIN: the server reads nothing
            raise PeerUnavailable(f"{self.endpoint}: {error.strerror}") from error

    async def _next(self, replies: _Replies, wait_s: float, message: Any) -> Frame:
        try:
            return await replies.take(wait_s)
        except TimeoutError:
            raise PeerTimeout(f"{self.endpoint} did not answer {type(message).__name__} in {wait_s:.3g} s") from None

    def _receive(self, parts: list[bytes]) -> None:
        data = b"".join(parts)  # a server sends one
        try:
            frame = decode(data)
        except PeerProtocolError as error:
            log.warning("bad frame from %s: %s", self.endpoint, error)
            correlation = correlation_of(data)
            if correlation in self._pending:
                self._pending[correlation].put(error)
            return
        replies = self._pending.get(frame.correlation)
        if replies is None:
            return  # nobody waits for it any more
        if frame.kind == "err" and frame.body["message"] == "say hello first":
            # The server is a new process that never saw our hello.
            self._lost("the server restarted")
        replies.put(frame)

    def _transport_changed(self, event: list[bytes]) -> None:
        """A broken connection fails all open requests now, not at their deadline."""
        self._transport_up = parse_monitor_message(event)["event"] != zmq.EVENT_DISCONNECTED
        if self._transport_up:
            self._wake.set()
        else:
            # What the server said before it went is still in the pipe: a last reply is better than none.
            loop = asyncio.get_running_loop()
            self._breaking = loop.call_later(_DRAIN_S, self._lost, "the connection broke")

    def _lost(self, why: str) -> None:
        if self._breaking is not None:
            self._breaking.cancel()
        was_ready = self._ready.is_set()
        self._ready.clear()
        self._fail_all(PeerUnavailable(f"{self.endpoint}: {why}"))
        self._wake.set()
        if was_ready and self._on_disconnected is not None:
            self._on_disconnected()

    def _fail_all(self, error: Exception) -> None:
        for replies in self._pending.values():
            replies.put(error)

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
