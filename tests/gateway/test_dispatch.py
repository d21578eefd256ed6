"""Order, bounds, places, hints and cancellation, over real HTTP."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.inference_peer import MODEL, ScriptedInference
from tests.gateway.serving import ServedGateway, eventually, journaled, talk


@pytest.fixture
def narrow(directory: Path) -> Iterator[ServedGateway]:
    """One turn at inference, two that wait; nothing is sampled until it is let go."""
    gateway = ServedGateway(directory, max_running=1, queue_limit=2)
    yield gateway
    gateway.set_hold(False)
    gateway.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def _depth(gateway: ServedGateway) -> tuple[float, float]:
    return gateway.metric("running_jobs"), gateway.metric("queue_depth")


def test_turns_run_in_the_order_of_arrival(narrow: ServedGateway, pool: ThreadPoolExecutor) -> None:
    narrow.set_hold(True)
    replies = []
    for number, depth in ((0, (1, 0)), (1, (1, 1)), (2, (1, 2))):
        replies.append(pool.submit(narrow.chat, f"turn {number}"))
        eventually(lambda depth=depth: _depth(narrow) == depth)
    narrow.set_hold(False)
    for reply in replies:
        reply.result(30.0)
    assert [turn.messages[0].content for turn in narrow.peer.turns] == ["turn 0", "turn 1", "turn 2"]
    assert narrow.peer.most_running == 1
    assert _depth(narrow) == (0, 0)


def test_a_full_queue_is_429_and_leaves_no_trace(narrow: ServedGateway, pool: ThreadPoolExecutor) -> None:
    narrow.set_hold(True)
    replies = [pool.submit(narrow.chat, f"turn {number}") for number in range(3)]
    eventually(lambda: _depth(narrow) == (1, 2))
    for stream in (False, True):
        reply = narrow.post({"model": MODEL, "messages": talk("one too many"), "stream": stream})
        assert reply.status_code == 429
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert reply.json()["error"]["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) > 0
    assert len(journaled(narrow.data_dir)) == 3
    narrow.set_hold(False)
    for done in replies:
        done.result(30.0)
    narrow.chat("there is room again")


def test_as_many_run_at_once_as_inference_takes(directory: Path, pool: ThreadPoolExecutor) -> None:
    gateway = ServedGateway(directory, max_running=3, queue_limit=20)
    try:
        gateway.set_hold(True)
        replies = [pool.submit(gateway.chat, f"turn {number}") for number in range(6)]
        eventually(lambda: _depth(gateway) == (3, 3))
        eventually(lambda: gateway.peer.running == 3)
        gateway.set_hold(False)
        for reply in replies:
            reply.result(30.0)
        assert gateway.peer.most_running == 3
    finally:
        gateway.close()


def test_hints_follow_the_waiting_order(narrow: ServedGateway, pool: ThreadPoolExecutor) -> None:
    """Only turns that wait, only those that continue something; nothing is told of one that is dispatched at once."""
    told = narrow.daemon.orders
    answers = [narrow.chat(f"turn {n}")["choices"][0]["message"]["content"] for n in range(2)]
    keys = [turn.turn_key for turn in journaled(narrow.data_dir)]
    assert set(told) == {()}
    narrow.set_hold(True)
    running = pool.submit(narrow.chat, "new")
    eventually(lambda: _depth(narrow) == (1, 0))
    waiting = []
    for n in (1, 0):
        waiting.append(pool.submit(narrow.chat, f"turn {n}", answers[n], "more"))
        eventually(lambda n=n: _depth(narrow) == (1, 2 - n))
    eventually(lambda: told[-1] == (keys[1], keys[0]))
    narrow.set_hold(False)
    for reply in (running, *waiting):
        reply.result(30.0)
    eventually(lambda: told[-1] == ())


def test_hints_are_told_again_to_a_new_daemon(narrow: ServedGateway, pool: ThreadPoolExecutor) -> None:
    """Without a daemon turns run as ever; one that comes back learns the order at once."""
    answer = narrow.chat("turn")["choices"][0]["message"]["content"]
    narrow.call(narrow.daemon.server.stop())
    eventually(lambda: narrow.get("/ready").json()["state"] == "degraded")
    assert narrow.get("/ready").status_code == 200
    narrow.set_hold(True)
    running = pool.submit(narrow.chat, "new")
    eventually(lambda: _depth(narrow) == (1, 0))
    waiting = pool.submit(narrow.chat, "turn", answer, "more")
    eventually(lambda: _depth(narrow) == (1, 1))
    narrow.call(narrow.daemon.server.start())
    key = journaled(narrow.data_dir)[0].turn_key
    eventually(lambda: narrow.daemon.orders[-1] == (key,))
    narrow.set_hold(False)
    running.result(30.0)
    waiting.result(30.0)


def _leave_stream(gateway: ServedGateway, text: str, after: str) -> None:
    """Read a stream until `after` was seen, then hang up."""
    body = {"model": MODEL, "messages": talk(text), "stream": True}
    seen = ""
    with (
        httpx.Client(timeout=30.0) as client,
        client.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as reply,
    ):
        for piece in reply.iter_text():
            seen += piece
            if after in seen:
                return
    raise AssertionError("the stream ended by itself")


def test_a_client_that_leaves_a_stream_cancels_its_turn(narrow: ServedGateway) -> None:
    _leave_stream(narrow, "x [length 10000] [slow 0.01]", '"content":"c"')
    eventually(lambda: narrow.peer.cancelled == 1)
    eventually(lambda: _depth(narrow) == (0, 0))
    (row,) = journaled(narrow.data_dir)
    assert row.status == "cancelled"
    assert row.answer.startswith("abc")
    assert len(row.answer_tokens or b"") == 4 * len(row.answer)
    narrow.chat("the place is free again")
    assert narrow.metric('turns_total{status="cancelled"}') == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_answer_cancels_its_turn(narrow: ServedGateway, stream: bool) -> None:
    """While it runs, and while it waits."""
    narrow.set_hold(True)
    with httpx.Client() as running, httpx.Client() as waiting, ThreadPoolExecutor(2) as pool:
        body: dict[str, Any] = {"model": MODEL, "messages": talk("x"), "stream": stream}

        def ask(client: httpx.Client) -> None:
            with contextlib.suppress(httpx.ReadTimeout):
                if stream:  # its first bytes come when the turn has started
                    with client.stream("POST", f"{narrow.url}/v1/chat/completions", json=body, timeout=1.5) as reply:
                        reply.read()
                else:
                    client.post(f"{narrow.url}/v1/chat/completions", json=body, timeout=1.5)

        pool.submit(ask, running)
        eventually(lambda: _depth(narrow) == (1, 0))
        pool.submit(ask, waiting)
        eventually(lambda: _depth(narrow) == (1, 1))
    eventually(lambda: _depth(narrow) == (0, 0))
    eventually(lambda: narrow.peer.cancelled >= 1)
    eventually(lambda: [row.status for row in journaled(narrow.data_dir)] == ["cancelled"] * 2)
    narrow.set_hold(False)
    narrow.chat("the place is free again")


def test_a_turn_ends_by_its_deadline(directory: Path) -> None:
    gateway = ServedGateway(directory, turn_timeout_s=0.6)
    try:
        gateway.set_hold(True)
        reply = gateway.post({"model": MODEL, "messages": talk("x")})
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "no_capacity"
        eventually(lambda: gateway.peer.cancelled == 1)
        assert [row.status for row in journaled(gateway.data_dir)] == ["failed"]
    finally:
        gateway.close()


@contextlib.contextmanager
def _locked(gateway: ServedGateway) -> Iterator[None]:
    """Another process is writing into the journal."""
    with contextlib.closing(sqlite3.connect(gateway.data_dir / "journal.sqlite", isolation_level=None)) as other:
        other.execute("begin immediate")
        yield
        other.execute("rollback")


def test_a_broken_journal_is_503_and_nothing_runs(narrow: ServedGateway) -> None:
    with _locked(narrow):
        reply = narrow.post({"model": MODEL, "messages": talk("x"), "stream": True})
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "journal_unavailable"
    assert narrow.peer.turns == []
    eventually(lambda: journaled(narrow.data_dir) == [])
    assert _depth(narrow) == (0, 0)
    narrow.chat("well again")


def test_no_answer_is_acknowledged_that_is_not_journaled(served: ServedGateway, pool: ThreadPoolExecutor) -> None:
    """The database is locked while the answer comes: its client is not told that the turn is done."""
    for stream in (True, False):
        asked = pool.submit(served.post, {"model": MODEL, "messages": talk("x [slow 0.02]"), "stream": stream})
        eventually(lambda: served.peer.running == 1)
        with _locked(served):
            reply = asked.result(30.0)
        assert "journal_unavailable" in reply.text
        assert '"finish_reason":"stop"' not in reply.text
        assert "[DONE]" not in reply.text
        assert reply.status_code == (200 if stream else 503)
    assert "done" not in [row.status for row in journaled(served.data_dir)]


def test_many_turns_and_clients_that_leave(directory: Path) -> None:
    """Whatever mixture comes, every place is free and every turn has one end afterwards."""
    gateway = ServedGateway(directory, max_running=3, queue_limit=12)
    outcomes: list[int] = []
    dice = random.Random(7)
    plans = [(dice.random() < 0.5, dice.choice((0.02, 0.1, 0.4, 30.0))) for _ in range(80)]

    def ask(number: int) -> None:
        stream, patience_s = plans[number]
        body = {"model": MODEL, "messages": talk(f"{number} [slow 0.005]"), "stream": stream}
        with contextlib.suppress(httpx.TimeoutException):
            reply = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=httpx.Timeout(patience_s))
            outcomes.append(reply.status_code)

    try:
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(ask, range(len(plans))))
        eventually(lambda: _depth(gateway) == (0, 0))
        eventually(lambda: gateway.peer.running == 0)
        statuses = [row.status for row in journaled(gateway.data_dir)]
        assert set(statuses) <= {"done", "cancelled"}
        assert statuses.count("done") >= outcomes.count(200) > 0
        assert set(outcomes) <= {200, 429}
        assert len(statuses) + outcomes.count(429) <= len(plans)
        assert gateway.peer.most_running <= 3 + gateway.peer.cancelled
        for number in range(4):
            gateway.chat(f"after {number}")
    finally:
        gateway.close()


def test_a_turn_of_another_model_is_not_run(narrow: ServedGateway, pool: ThreadPoolExecutor) -> None:
    """A turn's keys belong to the model it was asked of; when another one comes up, it must be sent again."""
    narrow.call(narrow.peer.server.stop())
    eventually(lambda: narrow.get("/ready").status_code == 503)
    waiting = pool.submit(narrow.post, {"model": MODEL, "messages": talk("x")})
    eventually(lambda: _depth(narrow) == (0, 1))

    async def other_model() -> ScriptedInference:
        peer = ScriptedInference(narrow.config.inference_endpoints[0], weights=b"other weights")
        await peer.server.start()
        return peer

    other = narrow.call(other_model())
    reply = waiting.result(30.0)
    assert reply.status_code == 503
    assert "another model" in reply.json()["error"]["message"]
    assert other.turns == []
    narrow.chat("the new one answers")
    narrow.call(other.server.stop())
