"""The transport, over real sockets: one final reply per request, and nobody is disturbed by anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from protocol import PROTOCOL_VERSION
from protocol.codec import MAX_FRAME_BYTES, Frame, decode, encode
from protocol.errors import (
    Cancelled,
    CapacityError,
    ConfigError,
    InternalError,
    PeerProtocolError,
    PeerTimeout,
    PeerUnavailable,
)
from protocol.ids import new_id
from protocol.messages import (
    Ack,
    GetManifest,
    GetModel,
    GetStatus,
    Hello,
    ManifestReply,
    Ping,
    Reserve,
    Reserved,
    ReservedSlot,
    TurnDelta,
    Welcome,
)
from protocol.rpc import Ask, Call, Curve, Handler, Peer, RpcClient, RpcServer, check_endpoint

KEY = b"k" * 16


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


async def reserve(call: Call, body: Reserve) -> Reserved:
    return Reserved(tuple(ReservedSlot(n, 1) for n in range(body.count)))


@contextlib.asynccontextmanager
async def serving(endpoint: str, handlers: Mapping[type, Handler], **options: Any) -> AsyncIterator[RpcServer]:
    server = RpcServer(endpoint, "test", {Reserve: reserve, **handlers}, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def connected(endpoint: str, **options: Any) -> AsyncIterator[RpcClient]:
    client = RpcClient(endpoint, "cli", **options)
    await client.start()
    try:
        await client.wait_connected(10)
        yield client
    finally:
        await client.stop()


@contextlib.contextmanager
def raw_peer(endpoint: str) -> Any:
    """A DEALER that says whatever it likes."""
    dealer = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(endpoint)
    try:
        yield dealer
    finally:
        dealer.close()


async def ask_raw(dealer: Any, data: bytes) -> Frame:
    await dealer.send(data)
    return await receive_raw(dealer)


async def receive_raw(dealer: Any) -> Frame:
    return decode(await asyncio.wait_for(dealer.recv(), 5))


def hello(correlation: int = 1, version: int = PROTOCOL_VERSION, heartbeat_s: float = 1.0) -> bytes:
    return encode(Frame("req", correlation, Hello(version, "cli", new_id(), heartbeat_s)))


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.01)


class Gate:
    """A handler that stays inside until it is let go, and notes how it ended."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.let_go = asyncio.Event()
        self.ended: list[str] = []

    async def __call__(self, call: Call, body: Any) -> Ack:
        self.entered.set()
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        return Ack()


# -- requests and replies -----------------------------------------------------------------------------------------


def test_a_request_gets_its_reply(endpoint: str) -> None:
    async def main() -> None:
        seen: list[tuple[object, float]] = []
        async with (
            serving(endpoint, {}, observe=lambda request, seconds: seen.append((request, seconds))) as server,
            connected(endpoint) as client,
        ):
            reply = await client.request(Reserve(2), Reserved, 5)
            assert reply == Reserved((ReservedSlot(0, 1), ReservedSlot(1, 1)))
            assert [peer.role for peer in server.peers] == ["cli"]
            assert server.stats.requests == 1
            await eventually(lambda: len(seen) == 1)
            assert seen[0][0] == Reserve(2)
            assert 0 <= seen[0][1] < 5

    run(main())


def test_many_requests_at_once_each_get_their_own_reply(endpoint: str) -> None:
    """Replies come in whatever order handlers finish, and none is mixed up, from several clients at a time."""

    async def slow(call: Call, body: Reserve) -> Reserved:
        await asyncio.sleep(0.0005 * (body.count % 7))
        return await reserve(call, body)

    async def main() -> None:
        async with serving(endpoint, {Reserve: slow}), connected(endpoint) as one, connected(endpoint) as two:
            clients = [one, two]
            replies = await asyncio.gather(
                *(clients[n % 2].request(Reserve(n), Reserved, 30) for n in range(400)),
            )
            assert [len(reply.slots) for reply in replies] == list(range(400))

    run(main())


def test_a_streamed_reply_comes_in_order_and_ends(endpoint: str) -> None:
    async def count(call: Call, body: GetModel) -> Ack:
        for n in range(50):
            await call.send(TurnDelta(str(n), b""))
        return Ack()

    async def main() -> None:
        async with serving(endpoint, {GetModel: count}), connected(endpoint) as client:
            parts = [part async for part in client.stream(GetModel(), 10, 5)]
            assert parts == [TurnDelta(str(n), b"") for n in range(50)] + [Ack()]

    run(main())


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (CapacityError("no room", param="dram"), CapacityError),
        (ZeroDivisionError("oops"), InternalError),
        (RecursionError("deep"), InternalError),
    ],
)
def test_a_handlers_error_reaches_the_caller(endpoint: str, raised: Exception, expected: type[Exception]) -> None:
    async def fail(call: Call, body: GetStatus) -> Ack:
        raise raised

    async def main() -> None:
        async with serving(endpoint, {GetStatus: fail}) as server, connected(endpoint) as client:
            with pytest.raises(expected, match=str(raised)) as caught:
                await client.request(GetStatus(), Ack, 5)
            assert getattr(caught.value, "param", None) == getattr(raised, "param", None)
            with pytest.raises(expected):
                async for _ in client.stream(GetStatus(), 5, 5):
                    pass
            assert server.stats.failures == 2
            await client.request(Reserve(1), Reserved, 5)

    run(main())


@pytest.mark.parametrize(
    "reply", [None, "text", Reserve("many"), ManifestReply(object())], ids=["none", "text", "of text", "of objects"]
)  # type: ignore[arg-type]
def test_a_handler_that_returns_no_message_still_gives_one_final_reply(endpoint: str, reply: Any) -> None:
    async def wrong(call: Call, body: GetStatus) -> Any:
        return reply

    async def main() -> None:
        async with serving(endpoint, {GetStatus: wrong}), connected(endpoint) as client:
            with pytest.raises((InternalError, PeerProtocolError)):
                await client.request(GetStatus(), Ack, 5)
            await client.request(Reserve(1), Reserved, 5)

    run(main())


def test_a_reply_too_large_to_send_is_an_error_of_that_request(endpoint: str) -> None:
    async def huge(call: Call, body: GetStatus) -> TurnDelta:
        return TurnDelta("x" * MAX_FRAME_BYTES, b"")

    async def main() -> None:
        async with serving(endpoint, {GetStatus: huge}), connected(endpoint) as client:
            with pytest.raises(PeerProtocolError, match="over the limit"):
                await client.request(GetStatus(), TurnDelta, 10)
            with pytest.raises(PeerProtocolError, match="over the limit"):
                await client.request(TurnDelta("x" * MAX_FRAME_BYTES, b""), Ack, 10)
            await client.request(Reserve(1), Reserved, 5)

    run(main())


def test_an_unexpected_type_of_reply_is_a_protocol_error(endpoint: str) -> None:
    async def main() -> None:
        async with serving(endpoint, {}), connected(endpoint) as client:
            with pytest.raises(PeerProtocolError, match="answered by Reserved"):
                await client.request(Reserve(1), Ack, 5)

    run(main())


def test_a_message_nobody_handles_is_refused(endpoint: str) -> None:
    async def main() -> None:
        async with serving(endpoint, {}) as server, connected(endpoint) as client:
            with pytest.raises(PeerProtocolError, match="does not answer GetManifest"):
                await client.request(GetManifest(KEY), ManifestReply, 5)
            assert server.stats.rejected_frames == 1

    run(main())


def test_handlers_that_wait_for_nothing_are_plain_functions(endpoint: str) -> None:
    """Their reply, their error and what cannot be sent reach the caller as those of a coroutine function do."""

    def plain(call: Call, body: Reserve) -> Any:
        if body.count == 1:
            raise CapacityError("no room")
        return Reserved(()) if body.count == 2 else object()

    async def main() -> None:
        async with serving(endpoint, {Reserve: plain}) as server, connected(endpoint) as client:
            with pytest.raises(CapacityError, match="no room"):
                await client.request(Reserve(1), Reserved, 5)
            assert await client.request(Reserve(2), Reserved, 5) == Reserved(())
            with pytest.raises(InternalError):
                await client.request(Reserve(3), Reserved, 5)
            assert (server.stats.requests, server.stats.failures) == (3, 2)

    run(main())


def test_handlers_begin_in_the_order_in_which_requests_come(endpoint: str) -> None:
    """Plain functions and coroutine functions alike, also where many requests wait to be read at once."""

    async def main() -> None:
        began: list[int] = []

        async def waits(call: Call, body: GetManifest) -> Ack:
            began.append(call.correlation)
            await asyncio.sleep(0)
            return Ack()

        def plain(call: Call, body: GetStatus) -> Ack:
            began.append(call.correlation)
            return Ack()

        async with serving(endpoint, {GetManifest: waits, GetStatus: plain}):
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello())
                for n in range(2, 200):
                    dealer.send(encode(Frame("req", n, GetManifest(KEY) if n % 2 else GetStatus())))
                time.sleep(0.05)  # noqa: ASYNC251 - the server must find all of them waiting at once
                for _ in range(2, 200):
                    await receive_raw(dealer)
                assert began == list(range(2, 200))

    run(main())


def test_a_bug_while_a_message_is_received_disturbs_no_other(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(endpoint, {}) as server, connected(endpoint) as client:
            monkeypatch.setattr(server, "_accept", lambda *_: 1 / 0)
            with pytest.raises(PeerTimeout):
                await client.request(Reserve(1), Reserved, 0.1)
            monkeypatch.undo()
            await client.request(Reserve(1), Reserved, 5)

    run(main())
    assert "a message could not be received" in caplog.text


# -- deadlines and cancelling ----------------------------------------------------------------------------------------


def test_a_deadline_ends_the_wait_and_cancels_the_handler(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(endpoint, {GetStatus: gate}), connected(endpoint) as client:
            started = time.monotonic()
            with pytest.raises(PeerTimeout):
                await client.request(GetStatus(), Ack, 0.2)
            assert time.monotonic() - started < 2
            await eventually(lambda: gate.ended == ["cancelled"])

    run(main())


def test_a_stream_that_falls_silent_ends_and_is_cancelled(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(endpoint, {GetStatus: gate}), connected(endpoint) as client:
            with pytest.raises(PeerTimeout):
                async for _ in client.stream(GetStatus(), 30, 0.2):
                    pass
            await eventually(lambda: gate.ended == ["cancelled"])

    run(main())


def test_time_in_which_a_process_stood_still_is_nobodys_silence(endpoint: str) -> None:
    """Neither a reply that could not be made nor a ping that could not be read counts as missing."""

    async def main() -> None:
        lost: list[Peer] = []
        async with (
            serving(endpoint, {Reserve: reserve}, on_peer_lost=lost.append) as server,
            connected(endpoint) as client,
        ):
            for stall_s in (1.0, 5.5):
                asked = asyncio.ensure_future(client.request(Reserve(1), Reserved, 0.5))
                await asyncio.sleep(0)  # it is sent
                time.sleep(stall_s)  # noqa: ASYNC251 - the loop is to stand still
                assert isinstance(await asked, Reserved)
            await asyncio.sleep(1.0)  # peers are looked at meanwhile
            assert not lost
            assert len(server.peers) == 1
            assert client.is_connected

    run(main())


def test_the_handler_knows_the_callers_deadline(endpoint: str) -> None:
    async def left(call: Call, body: Reserve) -> Reserved:
        assert 1.0 < call.deadline_s - time.monotonic() <= 3.0
        return Reserved(())

    async def main() -> None:
        async with serving(endpoint, {Reserve: left}), connected(endpoint) as client:
            await client.request(Reserve(0), Reserved, 3)

    run(main())


def test_leaving_a_stream_cancels_the_handler(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()

        async def stream_then_wait(call: Call, body: GetStatus) -> Ack:
            await call.send(TurnDelta("first", b""))
            return await gate(call, body)

        async with serving(endpoint, {GetStatus: stream_then_wait}), connected(endpoint) as client:
            stream = client.stream(GetStatus(), 30, 30)
            assert await anext(stream) == TurnDelta("first", b"")
            await stream.aclose()  # type: ignore[attr-defined]
            await eventually(lambda: gate.ended == ["cancelled"])
            await client.request(Reserve(1), Reserved, 5)

    run(main())


def test_cancelling_the_waiting_task_cancels_the_handler(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(endpoint, {GetStatus: gate}), connected(endpoint) as client:
            task = asyncio.ensure_future(client.request(GetStatus(), Ack, 30))
            await gate.entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await eventually(lambda: gate.ended == ["cancelled"])

    run(main())


@pytest.mark.parametrize("together", [True, False])
def test_a_cancelled_request_gets_exactly_one_final_reply(endpoint: str, together: bool) -> None:
    """Also where the cancel arrives with the request, before the handler took its first step."""

    async def main() -> None:
        gate = Gate()
        async with serving(endpoint, {GetStatus: gate}) as server:
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello())
                for correlation in range(2, 30):
                    gate.entered.clear()
                    request, cancel = Frame("req", correlation, GetStatus()), Frame("cancel", correlation)
                    await dealer.send(encode(request))
                    if not together:
                        await gate.entered.wait()
                    await dealer.send(encode(cancel))
                    await dealer.send(encode(cancel))
                    reply = await receive_raw(dealer)
                    assert (reply.kind, reply.correlation, reply.body["code"]) == ("err", correlation, "cancelled")
                assert (await ask_raw(dealer, encode(Frame("req", 99, Ping())))).correlation == 99
                assert server.peers[0].calls == {}

    run(main())


def test_a_burst_of_requests_and_cancels_gets_one_reply_each(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(endpoint, {GetStatus: gate}):
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello())
                time.sleep(0.05)  # noqa: ASYNC251 - the server must find all of them waiting at once
                for n in range(2, 200):
                    dealer.send(encode(Frame("req", n, GetStatus())))
                    dealer.send(encode(Frame("cancel", n)))
                replies = [await receive_raw(dealer) for _ in range(2, 200)]
                assert sorted(reply.correlation for reply in replies) == list(range(2, 200))
                assert {reply.kind for reply in replies} == {"err"}

    run(main())


def test_a_correlation_id_in_use_is_refused_and_the_first_request_lives(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(endpoint, {GetStatus: gate}):
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello())
                await dealer.send(encode(Frame("req", 7, GetStatus())))
                await gate.entered.wait()
                refused = await ask_raw(dealer, encode(Frame("req", 7, Reserve(1))))
                assert (refused.kind, refused.body["code"]) == ("err", "peer_protocol_error")
                gate.let_go.set()
                assert await receive_raw(dealer) == Frame("end", 7, Ack())

    run(main())


# -- stopping and restarting --------------------------------------------------------------------------------------


def test_stop_gives_every_accepted_request_its_final_reply(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        server = RpcServer(endpoint, "test", {GetStatus: gate})
        await server.start()
        async with connected(endpoint) as client:
            waiting = [asyncio.ensure_future(client.request(GetStatus(), Ack, 30)) for _ in range(50)]
            await eventually(lambda: server.stats.requests == 50)
            await server.stop()
            outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
            assert {type(outcome) for outcome in outcomes} == {Cancelled}
            assert gate.ended == ["cancelled"] * 50
        assert not Path(endpoint.removeprefix("ipc://")).exists()

    run(main())


def test_stop_while_requests_keep_coming_leaves_none_without_an_answer(endpoint: str) -> None:
    """Requests that arrive during the stop fail or are cancelled; none waits for its deadline."""

    async def main() -> None:
        server = RpcServer(endpoint, "test", {GetStatus: Gate()})
        await server.start()
        async with connected(endpoint) as client:
            waiting: list[asyncio.Task[Ack]] = []

            async def pour() -> None:
                while True:
                    waiting.append(asyncio.ensure_future(client.request(GetStatus(), Ack, 30)))
                    await asyncio.sleep(0)

            pouring = asyncio.ensure_future(pour())
            await asyncio.sleep(0.1)
            await server.stop()
            pouring.cancel()
            outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
            assert {type(outcome) for outcome in outcomes} <= {Cancelled, PeerUnavailable}
        assert not [task for task in asyncio.all_tasks() if "_handle" in repr(task)]

    run(main())


def test_a_restarted_server_fails_open_requests_at_once_and_is_told_everything_again(endpoint: str) -> None:
    async def main() -> None:
        told: list[bytes] = []
        lost: list[float] = []

        async def replay(welcome: Welcome, ask: Ask) -> None:
            reply = await ask(Reserve(3), Reserved, 5)
            assert len(reply.slots) == 3
            told.append(welcome.epoch)

        gate = Gate()
        first = RpcServer(endpoint, "test", {GetStatus: gate, Reserve: reserve})
        await first.start()
        options = {"on_connected": replay, "on_disconnected": lambda: lost.append(time.monotonic())}
        async with connected(endpoint, **options) as client:
            waiting = asyncio.ensure_future(client.request(GetStatus(), Ack, 30))
            await gate.entered.wait()
            kill_like_a_signal(first)
            started = time.monotonic()
            with pytest.raises(PeerUnavailable):
                await waiting
            assert time.monotonic() - started < 2
            assert len(lost) == 1
            assert not client.is_connected
            with pytest.raises(PeerUnavailable):
                await client.request(Reserve(1), Reserved, 30)
            async with serving(endpoint, {}) as second:
                await client.wait_connected(10)
                assert told == [first.epoch, second.epoch]
                assert len((await client.request(Reserve(1), Reserved, 5)).slots) == 1
        await first.stop()

    run(main())


def kill_like_a_signal(server: RpcServer) -> None:
    """Take a server's socket away without a word to anybody, as the end of its process would."""
    assert server._socket is not None
    assert server._reaper is not None
    server._reaper.cancel()
    server._socket.close()
    server._socket = None


def test_a_server_that_forgot_us_is_greeted_again(endpoint: str) -> None:
    """A restart so quick that no disconnect was seen: 'say hello first' is enough to begin anew."""

    async def main() -> None:
        async with serving(endpoint, {}) as server, connected(endpoint) as client:
            server._peers.clear()
            with pytest.raises((PeerUnavailable, PeerProtocolError)):
                await client.request(Reserve(1), Reserved, 5)
            await client.wait_connected(10)
            await client.request(Reserve(1), Reserved, 5)

    run(main())


def test_replay_is_repeated_until_it_succeeds_and_nothing_passes_before(endpoint: str) -> None:
    async def main() -> None:
        attempts: list[int] = []

        async def replay(welcome: Welcome, ask: Ask) -> None:
            attempts.append(1)
            assert not client.is_connected
            if len(attempts) < 3:
                raise CapacityError("not yet")

        async with serving(endpoint, {}):
            client = RpcClient(endpoint, "cli", on_connected=replay)
            await client.start()
            await client.wait_connected(10)
            assert len(attempts) == 3
            await client.stop()

    run(main())


def test_a_client_may_start_before_its_server(endpoint: str) -> None:
    async def main() -> None:
        client = RpcClient(endpoint, "cli")
        await client.start()
        with pytest.raises(PeerUnavailable, match="not connected"):
            await client.request(Ping(), Ack, 5)
        with pytest.raises(PeerUnavailable, match=r"did not answer in 0\.1 s"):
            await client.wait_connected(0.1)
        async with serving(endpoint, {}):
            await client.wait_connected(10)
            await client.stop()

    run(main())


def test_stopping_a_client_fails_its_open_requests(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(endpoint, {GetStatus: gate}):
            async with connected(endpoint) as client:
                waiting = asyncio.ensure_future(client.request(GetStatus(), Ack, 30))
                await gate.entered.wait()
            with pytest.raises(PeerUnavailable, match="closed"):
                await waiting
            with pytest.raises(PeerUnavailable):
                await client.request(GetStatus(), Ack, 30)

    run(main())


def test_a_client_stops_at_any_moment(endpoint: str) -> None:
    """Also when a connection event arrives in the very moment of the stop."""

    async def main() -> None:
        async with serving(endpoint, {}):
            for turn in range(60):
                client = RpcClient(endpoint, "cli")
                await client.start()
                for _ in range(turn % 20):
                    await asyncio.sleep(0)
                client._wake.set()
                await asyncio.wait_for(client.stop(), 5)

    run(main())


def test_a_second_server_on_the_same_endpoint_is_refused(endpoint: str) -> None:
    """ZeroMQ by itself would steal the path of an ipc endpoint from the first."""

    async def main() -> None:
        async with serving(endpoint, {}), connected(endpoint) as client:
            with pytest.raises(ConfigError, match="another process"):
                await RpcServer(endpoint, "test", {}).start()
            await client.request(Reserve(1), Reserved, 5)

    run(main())


def test_a_socket_file_left_by_a_dead_server_is_taken_over(endpoint: str) -> None:
    path = endpoint.removeprefix("ipc://")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)

    async def main() -> None:
        async with serving(endpoint, {}), connected(endpoint) as client:
            assert Path(path).stat().st_mode & 0o777 == 0o600
            await client.request(Reserve(1), Reserved, 5)

    run(main())


# -- peers that misbehave ------------------------------------------------------------------------------------------


def test_a_silent_peer_is_reaped_once_and_its_requests_are_cancelled(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        lost: list[Peer] = []
        async with (
            serving(endpoint, {GetStatus: gate}, on_peer_lost=lost.append) as server,
            connected(endpoint) as client,
        ):
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello())
                silent = server.peers[-1].client_id
                await dealer.send(encode(Frame("req", 2, GetStatus())))
                await gate.entered.wait()
                await eventually(lambda: bool(lost), 15)
                assert [peer.client_id for peer in lost] == [silent]
                await eventually(lambda: gate.ended == ["cancelled"], 5)  # told to end first, ends a moment later
                # It is told so when it speaks again.
                assert (await receive_raw(dealer)).body["code"] == "cancelled"
                again = await ask_raw(dealer, encode(Frame("req", 3, Ping())))
                assert again.body["message"] == "say hello first"
            assert client.is_connected  # pings kept this one alive
            assert len(server.peers) == 1

    run(main())


def test_a_client_that_reconnects_is_not_lost(endpoint: str) -> None:
    async def main() -> None:
        lost: list[Peer] = []
        client_id = new_id()
        async with serving(endpoint, {}, on_peer_lost=lost.append) as server:
            async with connected(endpoint, client_id=client_id):
                pass
            async with connected(endpoint, client_id=client_id):
                assert [peer.client_id for peer in server.peers] == [client_id]
        assert lost == []

    run(main())


def test_saying_hello_again_gives_up_the_requests_before_it(endpoint: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(endpoint, {GetStatus: gate}) as server:
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello())
                await dealer.send(encode(Frame("req", 2, GetStatus())))
                await gate.entered.wait()
                await dealer.send(hello(3))
                replies = {frame.correlation: frame for frame in [await receive_raw(dealer) for _ in range(2)]}
                assert replies[2].body["code"] == "cancelled"
                assert isinstance(replies[3].body, Welcome)
                assert len(server.peers) == 1

    run(main())


def test_a_bug_in_on_peer_lost_does_not_stop_the_server(endpoint: str) -> None:
    def explode(peer: Peer) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        async with serving(endpoint, {}, on_peer_lost=explode) as server, connected(endpoint) as client:
            server._drop(server.peers[0])
            await client.wait_connected(10)
            with contextlib.suppress(PeerUnavailable, PeerProtocolError):
                await client.request(Reserve(1), Reserved, 5)
            await client.wait_connected(10)
            await client.request(Reserve(1), Reserved, 5)

    run(main())


@pytest.mark.parametrize("heartbeat_s", [float("inf"), float("nan"), -1.0, 1e9])
def test_nobody_can_promise_to_be_silent_for_ever(endpoint: str, heartbeat_s: float) -> None:
    async def main() -> None:
        async with serving(endpoint, {}) as server:
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello(heartbeat_s=heartbeat_s))
                assert 0 < server.peers[0].heartbeat_s <= 60

    run(main())


def test_another_protocol_version_is_refused_with_both_versions(endpoint: str) -> None:
    async def main() -> None:
        async with serving(endpoint, {}) as server:
            with raw_peer(endpoint) as dealer:
                reply = await ask_raw(dealer, hello(version=99))
                assert reply.kind == "err"
                assert f"protocol version {PROTOCOL_VERSION}, the peer 99" in reply.body["message"]
                assert server.peers == []
                refused = await ask_raw(dealer, encode(Frame("req", 2, Reserve(1))))
                assert refused.body["message"] == "say hello first"

    run(main())


def test_a_client_refuses_a_server_of_another_version(endpoint: str) -> None:
    async def main() -> None:
        router = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        router.linger = 0
        router.bind(endpoint)

        async def answer() -> None:
            while True:
                identity, data = await router.recv_multipart()
                welcome = Welcome(99, "test", new_id())
                await router.send_multipart([identity, encode(Frame("end", decode(data).correlation, welcome))])

        answering = asyncio.ensure_future(answer())
        client = RpcClient(endpoint, "cli")
        await client.start()
        with pytest.raises(PeerUnavailable, match="protocol version 99"):
            await client.wait_connected(1)
        await client.stop()
        answering.cancel()
        router.close()

    run(main())


GARBAGE = [
    b"",
    b"\x00",
    b"\xc1" * 100,
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xdd\xff\xff\xff\xff",
    msgpack.packb({"k": {}, "i": 1}),
    msgpack.packb({"k": "end", "i": 1, "t": "ack", "b": {}}),
    msgpack.packb({"k": "part", "i": 1, "t": "ack", "b": {}}),
    msgpack.packb({"k": "req", "i": 1, "t": "nothing we know", "b": {}}),
    msgpack.packb({"k": "req", "i": 1, "t": "reserve", "b": {"count": "5"}}),
    b"\x84\xa1k\xa3req\xa1i\x01\xa1b\x80\xa1t" + b"\x91" * 1000 + b"\xc0",
]


async def undisturbed(client: RpcClient, attack: Callable[[], Awaitable[None]]) -> None:
    """The attack changes nothing for a neighbour: requests before, during and after it are answered at once."""
    assert client.is_connected
    attacking = asyncio.ensure_future(attack())
    while not attacking.done():
        await client.request(Reserve(1), Reserved, 5)
        await asyncio.sleep(0.005)
    await attacking
    await client.request(Reserve(1), Reserved, 5)


@pytest.mark.parametrize("greeted", [True, False])
def test_garbage_frames_disturb_nobody(endpoint: str, greeted: bool) -> None:
    async def main() -> None:
        async with serving(endpoint, {}) as server, connected(endpoint) as client:
            with raw_peer(endpoint) as dealer:

                async def attack() -> None:
                    if greeted:
                        await ask_raw(dealer, hello())
                    for data in GARBAGE:
                        await dealer.send(data)
                    await dealer.send_multipart([b"two", b"parts"])
                    await dealer.send_multipart([b"x"] * 20)

                await undisturbed(client, attack)
                await eventually(lambda: server.stats.rejected_frames == len(GARBAGE) + 2)
                assert client.is_connected

    run(main())


def test_a_legible_correlation_id_gets_its_error(endpoint: str) -> None:
    async def main() -> None:
        async with serving(endpoint, {}):
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello())
                reply = await ask_raw(dealer, msgpack.packb({"k": "req", "i": 41, "t": "reserve", "b": {"count": -1}}))
                assert (reply.kind, reply.correlation) == ("err", 41)
                assert reply.body["code"] == "peer_protocol_error"
                assert "reserve.count" in reply.body["message"]

    run(main())


def test_an_oversized_frame_costs_its_sender_the_connection_and_nobody_else(endpoint: str) -> None:
    async def main() -> None:
        lost: list[Peer] = []
        async with serving(endpoint, {}, on_peer_lost=lost.append), connected(endpoint) as client:
            with raw_peer(endpoint) as dealer:
                await ask_raw(dealer, hello())

                async def attack() -> None:
                    await dealer.send(bytes(MAX_FRAME_BYTES + 1))
                    await asyncio.sleep(0.3)

                await undisturbed(client, attack)
            assert lost == []

    run(main())


def test_raw_bytes_on_the_unix_socket_disturb_nobody(endpoint: str) -> None:
    """Not even ZeroMQ's own handshake: noise, half a greeting, a flood, and a connection that says nothing."""

    def shout(data: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(1)
            raw.connect(endpoint.removeprefix("ipc://"))
            with contextlib.suppress(OSError):
                raw.sendall(data)
                raw.recv(1000)

    async def main() -> None:
        async with serving(endpoint, {}), connected(endpoint) as client:
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)
            for data in (
                b"hello\r\n",
                b"\x00" * 100_000,
                b"\xff" * 100_000,
                greeting[:20],
                greeting + b"\xff" * 999,
                b"",
            ):

                async def attack(data: bytes = data) -> None:
                    await asyncio.to_thread(shout, data)

                await undisturbed(client, attack)

    run(main())


def test_a_client_survives_a_server_that_talks_nonsense(endpoint: str) -> None:
    async def main() -> None:
        router = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        router.linger = 0
        router.bind(endpoint)

        async def answer() -> None:
            while True:
                identity, data = await router.recv_multipart()
                frame = decode(data)
                for garbage in GARBAGE:
                    await router.send_multipart([identity, garbage])
                await router.send_multipart([identity, encode(Frame("end", 10**9, Ack()))])
                if isinstance(frame.body, Hello):
                    reply = encode(Frame("end", frame.correlation, Welcome(PROTOCOL_VERSION, "test", KEY)))
                elif isinstance(frame.body, Reserve):
                    reply = msgpack.packb({"k": "end", "i": frame.correlation, "t": "reserved", "b": 5})
                else:
                    reply = encode(Frame("end", frame.correlation, Ack()))
                await router.send_multipart([identity, reply])

        answering = asyncio.ensure_future(answer())
        async with connected(endpoint) as client:
            with pytest.raises(PeerProtocolError):
                await client.request(Reserve(1), Reserved, 5)
            assert await client.request(GetStatus(), Ack, 5) == Ack()
        answering.cancel()
        router.close()

    run(main())


# -- endpoints and keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "named"),
    [
        ("tcp://0.0.0.0:5555", "CURVE"),
        ("tcp://*:5555", "CURVE"),
        ("tcp://10.0.0.1:5555", "CURVE"),
        ("tcp://[fe80::1]:5555", "CURVE"),
        ("tcp://127.example.org:5555", "CURVE"),
        ("ipc:///" + "x" * 107, "--run-dir"),
        ("http://localhost", "neither"),
        ("", "neither"),
    ],
)
def test_refused_endpoints(endpoint: str, named: str) -> None:
    for make in (lambda: RpcServer(endpoint, "test", {}), lambda: RpcClient(endpoint, "cli")):
        with pytest.raises(ConfigError, match=named):
            make()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5", "tcp://localhost:5", "tcp://[::1]:5", "ipc:///" + "x" * 106])
def test_allowed_endpoints(endpoint: str) -> None:
    check_endpoint(endpoint, None)


def test_curve_keys_allow_tcp_off_loopback() -> None:
    check_endpoint("tcp://0.0.0.0:5555", Curve(b"p", b"s"))


def test_a_taken_tcp_port_is_a_config_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        async def main() -> None:
            with pytest.raises(ConfigError, match="cannot listen"):
                await RpcServer(f"tcp://127.0.0.1:{port}", "test", {}).start()

        run(main())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_curve_over_tcp() -> None:
    """With the server's key a client is served; with a wrong one, or none, it is not."""
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    other_public, _ = zmq.curve_keypair()
    endpoint = f"tcp://127.0.0.1:{free_port()}"

    async def main() -> None:
        ours, theirs = Curve(server_public, server_secret), Curve(client_public, client_secret, server_public)
        async with serving(endpoint, {}, curve=ours) as server, connected(endpoint, curve=theirs) as client:
            assert len((await client.request(Reserve(2), Reserved, 5)).slots) == 2
            for curve in (Curve(client_public, client_secret, other_public), None):
                stranger = RpcClient(endpoint, "cli", curve=curve)
                await stranger.start()
                with pytest.raises(PeerUnavailable):
                    await stranger.wait_connected(1)
                await stranger.stop()
            assert len(server.peers) == 1
            await client.request(Reserve(1), Reserved, 5)

    run(main())


def test_requests_over_plain_loopback_tcp() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"

    async def main() -> None:
        async with serving(endpoint, {}), connected(endpoint) as client:
            await client.request(Reserve(1), Reserved, 5)

    run(main())
