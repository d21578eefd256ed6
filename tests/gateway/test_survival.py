"""Processes that die, restart and stop. Real processes, real signals, real HTTP."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gateway.service import run
from protocol.errors import ConfigError
from protocol.messages import ChatMessage
from tests.gateway.inference_peer import END, MODEL, answer_to
from tests.gateway.serving import GatewayProcess, PeerProcess, ServedGateway, eventually, journaled, make_config, talk


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture
def peer(directory: Path) -> Iterator[PeerProcess]:
    process = PeerProcess(directory)
    yield process
    process.close()


@pytest.fixture
def mortal(directory: Path, peer: PeerProcess) -> Iterator[ServedGateway]:
    """A gateway whose inference is a process that can be killed."""
    gateway = ServedGateway(directory, peer=False)
    gateway.wait_ready()
    yield gateway
    gateway.close()


@pytest.fixture
def process(directory: Path) -> Iterator[GatewayProcess]:
    """A gateway that can be killed. Its inference is not there yet."""
    gateway = GatewayProcess(directory, drain_s=2.0)
    yield gateway
    gateway.close()


# -- inference dies ---------------------------------------------------------------------------------------------


def test_a_stream_goes_on_where_it_stopped(mortal: ServedGateway, peer: PeerProcess, pool: ThreadPoolExecutor) -> None:
    """Killed in the middle of a character of three bytes: nothing is lost, nothing comes twice."""
    asked = "a✓ [die 12] [slow 0.02]"  # slow enough for what was sampled to leave the process before it dies
    answer = pool.submit(mortal.stream, asked)
    peer.wait_dead()
    peer.restart()
    text, tokens, chunks = answer.result(60.0)
    whole = answer_to([ChatMessage("user", asked)])
    assert text == whole.decode()
    assert tokens == [*whole, END]
    assert "error" not in chunks[-1]
    reported = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert bytes(byte for part in reported for entry in part["content"] for byte in entry["bytes"]) == whole
    (row,) = journaled(mortal.data_dir)
    assert (row.status, row.answer) == ("done", text)
    assert mortal.metric("turn_retries_total") == 1
    # The answer is the conversation's like any other.
    assert mortal.chat(asked, text, "more")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_turn_that_streams_nothing_is_run_again(
    mortal: ServedGateway, peer: PeerProcess, pool: ThreadPoolExecutor, directory: Path
) -> None:
    asked = f"again [die-once 5 {directory}/died]"
    answer = pool.submit(mortal.chat, asked)
    peer.wait_dead()
    peer.restart()
    assert answer.result(60.0)["choices"][0]["message"]["content"] == answer_to([ChatMessage("user", asked)]).decode()
    assert [row.status for row in journaled(mortal.data_dir)] == ["done"]


def test_a_turn_that_kills_inference_each_time_fails(
    mortal: ServedGateway, peer: PeerProcess, pool: ThreadPoolExecutor
) -> None:
    """Three attempts, then the place belongs to others."""
    reply = pool.submit(mortal.post, {"model": MODEL, "messages": talk("poison [die 3]")})
    for _ in range(3):
        peer.wait_dead()
        peer.restart()
    failed = reply.result(60.0)
    assert failed.status_code == 503
    assert failed.json()["error"]["code"] == "peer_unavailable"
    (row,) = journaled(mortal.data_dir)
    assert (row.status, row.error_code) == ("failed", "peer_unavailable")
    mortal.wait_ready()
    mortal.chat("others go on")


def test_an_orderly_restart_of_inference_interrupts_nothing(served: ServedGateway, pool: ThreadPoolExecutor) -> None:
    """Its transport ends every call as cancelled; that is not the client's wish, and the turn goes on later."""
    answer = pool.submit(served.stream, "x [slow 0.05]")
    eventually(lambda: served.peer.running == 1)
    time.sleep(0.2)
    served.call(served.peer.server.stop())
    eventually(lambda: served.get("/ready").status_code == 503)
    served.call(served.peer.server.start())
    text, tokens, _ = answer.result(60.0)
    assert text == "You said: x ✓"
    assert tokens == [*text.encode(), END]


def test_attempts_are_not_wasted_on_a_process_that_is_going(served: ServedGateway) -> None:
    """Between the end of its turns and the end of its connection a process takes new ones only to drop them."""
    served.chat("x [going 0.6]")
    assert 1 < len(served.peer.turns) <= 3
    # An attempt draws as the one before would have.
    assert len({turn.sampling.seed for turn in served.peer.turns}) == 1


def test_turns_wait_for_inference_up_to_their_deadline(directory: Path, pool: ThreadPoolExecutor) -> None:
    gateway = ServedGateway(directory, turn_timeout_s=3.0)
    try:
        gateway.call(gateway.peer.server.stop())
        eventually(lambda: gateway.get("/ready").status_code == 503)
        started = time.monotonic()
        reply = gateway.post({"model": MODEL, "messages": talk("x"), "stream": True})
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "peer_unavailable"
        assert 2.5 < time.monotonic() - started < 10
        waiting = pool.submit(gateway.chat, "y")
        eventually(lambda: gateway.metric("queue_depth") == 1)
        gateway.call(gateway.peer.server.start())
        waiting.result(30.0)
    finally:
        gateway.close()


def test_before_inference_was_ever_seen_requests_are_refused(directory: Path) -> None:
    gateway = ServedGateway(directory, peer=False, daemon=False)
    try:
        assert gateway.get("/health").status_code == 200
        ready = gateway.get("/ready")
        assert ready.status_code == 503
        assert "inference" in ready.json()["reason"]
        for reply in (gateway.post({"model": MODEL, "messages": talk("x")}), gateway.get("/v1/models")):
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "peer_unavailable"
            assert reply.headers["retry-after"]
        assert journaled(gateway.data_dir) == []
    finally:
        gateway.close()


# -- the gateway dies -------------------------------------------------------------------------------------------


def test_kill_between_the_journal_and_the_answer(
    process: GatewayProcess, peer: PeerProcess, pool: ThreadPoolExecutor
) -> None:
    """Messages that were taken in are there afterwards, the interrupted turn is failed, the conversation goes on."""
    process.wait_ready()
    answer = process.chat("one")["choices"][0]["message"]["content"]

    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            process.chat("one", answer, "two [slow 5]")

    asked = pool.submit(ask)
    eventually(lambda: [row.status for row in journaled(process.data_dir)] == ["done", "pending"])
    process.kill()
    asked.result(30.0)
    process.restart()
    process.wait_ready()
    one, two = journaled(process.data_dir)
    assert (one.status, one.answer) == ("done", answer)
    assert (two.status, two.error_code, two.messages) == (
        "failed",
        "interrupted",
        [{"role": "user", "content": "two [slow 5]"}],
    )
    body = process.chat("one", answer, "two")
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "the tenant's salt survived too"
    assert journaled(process.data_dir)[-1].parent_id == one.id
    assert process.metric("conversations") == 1


def test_every_answer_that_a_client_got_survives_kill(process: GatewayProcess, peer: PeerProcess) -> None:
    """Killed at once after the client had the answer, streamed or not."""
    for number in range(4):
        process.wait_ready()
        if number % 2:
            text, _, _ = process.stream(f"turn {number}")
        else:
            text = process.chat(f"turn {number}")["choices"][0]["message"]["content"]
        process.kill()
        assert journaled(process.data_dir)[-1].answer == text
        process.restart()


def test_two_gateways_and_taken_ports_stop_the_start(process: GatewayProcess, peer: PeerProcess) -> None:
    process.wait_ready()
    with pytest.raises(ConfigError, match="another gateway"):
        run(make_config(process.data_dir.parent))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = process.data_dir.parent / "other"
        with pytest.raises(ConfigError, match=str(port)) as caught:
            run(make_config(other, port=port))
        assert caught.value.param == "port"
        assert not other.exists(), "nothing else had begun"
    assert process.get("/ready").status_code == 200


# -- the gateway stops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_lets_running_turns_end(
    process: GatewayProcess, peer: PeerProcess, pool: ThreadPoolExecutor, number: int
) -> None:
    process.wait_ready()
    answer = pool.submit(process.stream, "x [length 10] [slow 0.1]")
    eventually(lambda: len(journaled(process.data_dir)) == 1 and process.metric("running_jobs") == 1)
    process.terminate(number)
    eventually(lambda: process.get("/ready").status_code == 503)
    refused = process.post({"model": MODEL, "messages": talk("late")})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    text, _, chunks = answer.result(30.0)
    assert (text, "error" in chunks[-1]) == ("abcdefghij", False)
    assert process.process.wait(10.0) == 0
    assert [row.status for row in journaled(process.data_dir)] == ["done"]
    assert not (process.data_dir / "gateway.lock").exists()


def test_stop_ends_what_does_not_end_itself(
    process: GatewayProcess, peer: PeerProcess, pool: ThreadPoolExecutor
) -> None:
    """The time limit here is 2 s: a stream gets an error event, other requests 503, and the process exits with 0."""
    process.wait_ready()
    stream = pool.submit(process.stream, "x [length 1000] [slow 0.05]")
    plain = pool.submit(process.post, {"model": MODEL, "messages": talk("y [length 1000] [slow 0.05]")})
    eventually(lambda: process.metric("running_jobs") == 2)
    started = time.monotonic()
    process.terminate()
    text, _, chunks = stream.result(30.0)
    assert text.startswith("abc")
    assert chunks[-1]["error"]["code"] == "shutting_down"  # type: ignore[index]
    assert plain.result(30.0).status_code == 503
    assert process.process.wait(10.0) == 0
    assert time.monotonic() - started < 8
    assert [row.status for row in journaled(process.data_dir)] == ["failed", "failed"]


def test_stop_drops_at_once_what_still_waits(directory: Path, pool: ThreadPoolExecutor) -> None:
    """The turn that runs gets its time; one that has not begun is better sent elsewhere now."""
    gateway = ServedGateway(directory, max_running=1)
    try:
        gateway.set_hold(True)
        running = pool.submit(gateway.chat, "running")
        eventually(lambda: gateway.metric("running_jobs") == 1)
        waiting = pool.submit(gateway.post, {"model": MODEL, "messages": talk("waiting")})
        eventually(lambda: gateway.metric("queue_depth") == 1)
        gateway.request_stop()
        assert waiting.result(5.0).json()["error"]["code"] == "shutting_down"
        assert not running.done()
        gateway.set_hold(False)
        running.result(5.0)
        gateway.wait_stopped(5.0)
    finally:
        gateway.close()


def test_a_second_signal_ends_it_now(directory: Path, peer: PeerProcess, pool: ThreadPoolExecutor) -> None:
    gateway = GatewayProcess(directory, drain_s=60.0)
    try:
        gateway.wait_ready()
        stream = pool.submit(gateway.stream, "x [length 1000] [slow 0.05]")
        eventually(lambda: gateway.metric("running_jobs") == 1)
        gateway.terminate()
        eventually(lambda: gateway.get("/ready").status_code == 503)
        gateway.terminate()
        assert gateway.process.wait(10.0) == 0
        stream.result(10.0)
    finally:
        gateway.close()


def test_stop_with_inference_gone_is_prompt(
    process: GatewayProcess, peer: PeerProcess, pool: ThreadPoolExecutor
) -> None:
    """Ctrl-C reaches all processes at once: the turn is not run again, and idle connections hold nothing up."""
    process.wait_ready()
    reply = pool.submit(process.post, {"model": MODEL, "messages": talk("y [length 1000] [slow 0.05]")})
    eventually(lambda: process.metric("running_jobs") == 1)
    with socket.create_connection(("127.0.0.1", process.port)):
        started = time.monotonic()
        process.terminate()
        eventually(lambda: process.get("/ready").status_code == 503)
        peer.process.kill()
        assert reply.result(30.0).json()["error"]["code"] == "peer_unavailable"
        assert process.process.wait(10.0) == 0
        assert time.monotonic() - started < 6


def test_no_thread_is_left(directory: Path) -> None:
    before = set(threading.enumerate())
    gateway = ServedGateway(directory)
    gateway.chat("x")
    gateway.close()
    eventually(lambda: set(threading.enumerate()) <= before)
