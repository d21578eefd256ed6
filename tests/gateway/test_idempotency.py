"""A retry with the same Idempotency-Key: the same answer, computed once, whatever became of the first connection."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gateway.idempotency import Idempotency
from gateway.tenants import Tenant
from gateway.turn import Turn, TurnRequest
from protocol.messages import ChatMessage, Sampling
from tests.gateway.inference_peer import MODEL, ScriptedInference
from tests.gateway.serving import ServedGateway, eventually, journaled, talk


def _ask(gateway: ServedGateway, text: str, key: str = "k", token: str = "", **fields: Any) -> httpx.Response:
    headers = {"Idempotency-Key": key} | ({"Authorization": f"Bearer {token}"} if token else {})
    return gateway.post({"model": MODEL, "messages": talk(text), **fields}, headers=headers)


def test_a_retry_gets_the_same_answer(served: ServedGateway) -> None:
    first, again = (_ask(served, "hi", n=2) for _ in range(2))
    assert first.status_code == 200
    assert first.json() == again.json()
    assert len(served.peer.turns) == 2
    with served.openai() as client:  # as its users send it
        one, two = (
            client.with_options(default_headers={"Idempotency-Key": "sdk"}).chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hi"}]
            )
            for _ in range(2)
        )
    assert one.id == two.id


def test_a_retried_stream_says_the_same(served: ServedGateway) -> None:
    def text(reply: httpx.Response) -> tuple[str, str]:
        events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        chunks = [json.loads(event) for event in events[:-1]]
        assert events[-1] == "[DONE]"
        return chunks[0]["id"], "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    replies = [_ask(served, "hi", stream=True, logprobs=True) for _ in range(2)]
    assert text(replies[0]) == text(replies[1])
    assert len(served.peer.turns) == 1


def test_a_retry_joins_the_running_one(served: ServedGateway) -> None:
    served.set_hold(True)
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(_ask, served, "hi") for _ in range(3)]
        eventually(lambda: served.peer.running == 1)
        served.set_hold(False)
        assert len({reply.result(30.0).text for reply in replies}) == 1
    assert len(served.peer.turns) == 1


def test_a_client_that_lost_its_stream_comes_back_for_all_of_it(served: ServedGateway) -> None:
    """The turn went on without it."""
    body = {"model": MODEL, "messages": talk("x [length 60] [slow 0.02]"), "stream": True}
    headers = {"Idempotency-Key": "k"}
    url = f"{served.url}/v1/chat/completions"
    with httpx.Client(timeout=30.0) as client, client.stream("POST", url, json=body, headers=headers) as reply:
        for piece in reply.iter_text():
            if '"content":"c"' in piece:
                break
    reply = served.post(body, headers=headers)
    assert "[DONE]" in reply.text
    assert (len(served.peer.turns), served.peer.cancelled) == (1, 0)
    (turn,) = journaled(served.data_dir)
    assert (turn.status, len(turn.answer)) == ("done", 60)


def test_another_request_with_the_key_is_a_clear_error(served: ServedGateway) -> None:
    assert _ask(served, "hi").status_code == 200
    for other in (_ask(served, "bye"), _ask(served, "hi", stream=True)):
        assert other.status_code == 422
        error = other.json()["error"]
        assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    assert _ask(served, "bye", token="bob").status_code == 200  # another tenant's key is another key
    for bad in ("", "x" * 256):
        assert _ask(served, "hi", key=bad).status_code == 400


def test_a_failed_turn_is_run_again(served: ServedGateway) -> None:
    for _ in range(2):
        assert _ask(served, "x [break 3]").status_code == 500
    assert len(served.peer.turns) == 2


def _turn() -> Turn:
    request = TurnRequest(Tenant(b"i" * 16, b"s" * 16), (ChatMessage("user", "x"),), Sampling(), False, 0.0)
    return Turn(request, ScriptedInference("ipc:///nowhere").model)


@pytest.mark.parametrize("kept", [1, 3])
def test_what_is_remembered_is_bounded_in_bytes_and_time(kept: int) -> None:
    remembered = Idempotency(limit_bytes=kept * (4096 + 100))
    for number in range(5):
        remembered.note(b"t", str(number), b"x" * 100, [_turn()], 0.0)
    found = [number for number in range(5) if remembered.find(b"t", str(number), b"x" * 100, 1.0)]
    assert found == list(range(5 - kept, 5))
    assert remembered.find(b"t", "4", b"x" * 100, 3601.0) is None
    remembered.note(b"t", "5", b"x", [_turn()], 4000.0)
    assert list(remembered._entries) == [(b"t", "5")]
