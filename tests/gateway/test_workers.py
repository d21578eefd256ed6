"""Two workers behind one gateway, over real HTTP: who gets which turn, and what becomes of a dead one's turns."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.config import GatewayConfig
from protocol.errors import ConfigError
from protocol.messages import ChatMessage
from tests.gateway.inference_peer import END, MODEL, ScriptedInference, answer_to
from tests.gateway.serving import PeerProcess, ServedGateway, eventually, journaled, make_config, talk


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture
def two(directory: Path) -> Iterator[ServedGateway]:
    """Two workers with two places each."""
    gateway = ServedGateway(directory, workers=2, max_running=2)
    eventually(lambda: gateway.metric("inference_connected") == 2)
    yield gateway
    gateway.set_hold(False)
    gateway.close()


@pytest.fixture
def mortals(directory: Path) -> Iterator[list[PeerProcess]]:
    processes = [PeerProcess(directory, name=f"inference-{number}") for number in (1, 2)]
    yield processes
    for process in processes:
        process.close()


def _asked(peer: ScriptedInference) -> list[str]:
    return [turn.messages[-1].content for turn in peer.turns]


def _answers(peer: ScriptedInference) -> set[str]:
    return {answer_to(turn.messages).decode() for turn in peer.turns}


def _answer(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["message"]["content"])


def test_a_conversation_stays_with_its_worker_and_new_ones_spread(two: ServedGateway) -> None:
    """Six conversations of three turns, one turn after another: nobody is busy, so everyone keeps its own."""
    for number in range(6):
        said = [f"conversation {number}"]
        for _ in range(3):
            said += [_answer(two.chat(*said)), "more"]
    ran = [[turn.messages[0].content for turn in peer.turns] for peer in two.peers]
    assert [len(found) for found in ran] == [9, 9]
    assert not set(ran[0]) & set(ran[1])
    assert {turn.parent_wait_ms for peer in two.peers for turn in peer.turns} == {0}


def test_a_busy_worker_loses_a_conversation_to_an_idle_one(two: ServedGateway, pool: ThreadPoolExecutor) -> None:
    """Its next worker is told that the context may still be on its way to the store."""
    first = _answer(two.chat("hello"))
    (home,) = [peer for peer in two.peers if peer.turns]
    other = two.peers[1 - two.peers.index(home)]
    two.set_hold(True)
    busy = [pool.submit(two.chat, "hello", first, f"branch {number}") for number in range(2)]
    eventually(lambda: (home.running, other.running) == (1, 1))
    assert home.turns[-1].parent_wait_ms == 0
    assert 0 < other.turns[-1].parent_wait_ms <= 1000
    two.set_hold(False)
    moved = next(body for body in (reply.result(30.0) for reply in busy) if _answer(body) in _answers(other))
    branch = other.turns[-1].messages[-1].content
    more = two.chat("hello", first, branch, _answer(moved), "more")
    assert more["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert _asked(other)[-1] == "more", "it lives there now"


def test_all_places_are_used_and_no_more(two: ServedGateway, pool: ThreadPoolExecutor) -> None:
    two.set_hold(True)
    replies = [pool.submit(two.chat, f"turn {number}") for number in range(7)]
    eventually(lambda: (two.metric("running_jobs"), two.metric("queue_depth")) == (4, 3))
    eventually(lambda: [peer.running for peer in two.peers] == [2, 2])
    two.set_hold(False)
    for reply in replies:
        reply.result(30.0)
    assert [peer.most_running for peer in two.peers] == [2, 2]
    assert (two.metric("running_jobs"), two.metric("queue_depth")) == (0, 0)


def test_a_dead_workers_turns_go_on_at_the_other(
    directory: Path, mortals: list[PeerProcess], pool: ThreadPoolExecutor
) -> None:
    """Streamed ones from where they stopped, the others from the start; nobody restarts the dead one."""
    gateway = ServedGateway(directory, peer=False, workers=2)
    try:
        eventually(lambda: gateway.metric("inference_connected") == 2)
        asked = [f"{number}✓ [slow 0.03]" for number in range(4)]
        streamed = [pool.submit(gateway.stream, text) for text in asked[:2]]
        plain = [pool.submit(gateway.chat, text) for text in asked[2:]]
        eventually(lambda: gateway.metric("running_jobs") == 4)
        mortals[0].process.send_signal(signal.SIGKILL)
        mortals[0].wait_dead()
        expected = [answer_to([ChatMessage("user", text)]) for text in asked]
        for reply, whole in zip(streamed, expected[:2], strict=True):
            text, tokens, chunks = reply.result(30.0)
            assert (text, tokens) == (whole.decode(), [*whole, END])
            assert "error" not in chunks[-1]
        assert [_answer(reply.result(30.0)) for reply in plain] == [whole.decode() for whole in expected[2:]]
        assert gateway.metric("turn_retries_total") == 2, "each had two of them"
        ready = gateway.get("/ready")
        assert (ready.status_code, ready.json()["state"]) == (200, "degraded")
        assert ready.json()["reason"].startswith("inference-1 is not connected")
        assert (gateway.metric("inference_connected"), gateway.metric("inference_workers")) == (1, 2)
        mortals[0].restart()
        eventually(lambda: gateway.get("/ready").json()["state"] == "ok")
        assert [row.status for row in journaled(gateway.data_dir)] == ["done"] * 4
    finally:
        gateway.close()


def test_a_worker_that_leaves_gets_no_turns(two: ServedGateway) -> None:
    """Still connected, it refuses them; each goes to the other one at once, and the next ones to begin with."""
    leaving, staying = two.peers
    leaving.is_leaving = True
    for number in range(6):
        two.chat(f"turn {number}")
    assert len(staying.turns) == 6
    assert 1 <= len(leaving.turns) < 6
    leaving.is_leaving = False
    # Each another conversation: one that is asked again goes to where it was.
    others = (f"another {number}" for number in itertools.count())
    eventually(lambda: two.chat(next(others)) and any(text.startswith("another") for text in _asked(leaving)))


def test_a_worker_with_another_model_gets_no_turns_while_others_serve(directory: Path) -> None:
    """It is named in the log and in /ready. When it is the only one left, its model is the one that is served."""
    gateway = ServedGateway(directory, workers=2, peer=False)

    async def begin(peer: ScriptedInference) -> None:
        await peer.server.start()

    async def other_model() -> ScriptedInference:
        peer = ScriptedInference(gateway.config.inference_endpoints[1], weights=b"other weights")
        await peer.server.start()
        return peer

    try:
        gateway.call(begin(gateway.peer))
        eventually(lambda: gateway.metric("inference_connected") == 1)
        other = gateway.call(other_model())
        eventually(lambda: "inference-2 serves another model" in gateway.get("/ready").json()["reason"])
        assert gateway.get("/ready").json()["state"] == "degraded"
        for number in range(3):
            gateway.chat(f"turn {number}")
        assert (len(gateway.peer.turns), len(other.turns)) == (3, 0)
        gateway.call(gateway.peer.server.stop())
        eventually(lambda: gateway.get("/ready").json()["reason"].startswith("inference-1 is not connected"))
        gateway.chat("the new model answers")
        assert len(other.turns) == 1
        gateway.call(other.server.stop())
    finally:
        gateway.close()


def test_turns_wait_while_all_workers_are_away(two: ServedGateway, pool: ThreadPoolExecutor) -> None:
    for peer in two.peers:
        two.call(peer.server.stop())
    eventually(lambda: two.get("/ready").status_code == 503)
    waiting = pool.submit(two.post, {"model": MODEL, "messages": talk("x")})
    eventually(lambda: two.metric("queue_depth") == 1)
    two.call(two.peers[1].server.start())
    assert waiting.result(30.0).status_code == 200
    assert _asked(two.peers[1]) == ["x"]
    assert two.get("/ready").json()["state"] == "degraded"


def test_no_worker_is_no_gateway(directory: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(directory, inference_endpoints=())
    assert caught.value.param == "inference_endpoints"
    assert isinstance(make_config(directory), GatewayConfig)
