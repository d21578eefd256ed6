"""Several answers, completions, tokenize and detokenize, cache fields: by the official client where it has them."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from gateway.returns import Rhythms
from protocol.ids import pack_tokens
from protocol.messages import Prompt
from tests.gateway.inference_peer import MODEL
from tests.gateway.serving import ServedGateway, eventually, journaled, talk


def _post(gateway: ServedGateway, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{gateway.url}{path}", json={"model": MODEL, **body}, headers=headers, timeout=30.0)


# -- several answers ---------------------------------------------------------------------------------------------


def test_n_answers_count_their_seeds_and_the_prompt_once(served: ServedGateway) -> None:
    with served.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], n=3, seed=2**63 - 2
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"You said: hi ✓"}
    assert sorted(turn.sampling.seed or 0 for turn in served.peer.turns) == [-(2**63), 2**63 - 2, 2**63 - 1]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 8
    assert answer.usage.completion_tokens == 3 * 17
    assert answer.usage.total_tokens == 8 + 3 * 17
    turns = journaled(served.data_dir)
    assert len(turns) == 3
    assert {turn.status for turn in turns} == {"done"}


def test_n_streams_in_one(served: ServedGateway) -> None:
    with served.openai() as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hi"}],
                n=2,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    texts = ["", ""]
    reasons = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == ["You said: hi ✓"] * 2
    assert reasons == {0: "stop", 1: "stop"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (8, 34)


def test_one_failure_of_n_is_an_error_and_ends_the_others(served: ServedGateway) -> None:
    reply = _post(
        served,
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "[break 3] [length 5000] [slow 0.01]"}], "n": 3},
    )
    assert reply.status_code == 500
    eventually(lambda: {turn.status for turn in journaled(served.data_dir)} <= {"failed", "cancelled"})
    assert served.metric("running_jobs") == 0


def test_a_client_that_leaves_ends_all_n_at_once(served: ServedGateway) -> None:
    body = {"model": MODEL, "messages": talk("[length 5000] [slow 0.01]"), "n": 3, "stream": True}
    url = f"{served.url}/v1/chat/completions"
    with httpx.Client(timeout=30.0) as client, client.stream("POST", url, json=body) as reply:
        for piece in reply.iter_text():
            if '"content":"b"' in piece:
                break
    eventually(lambda: served.peer.cancelled == 3)
    eventually(lambda: {turn.status for turn in journaled(served.data_dir)} == {"cancelled"})
    assert (served.metric("running_jobs"), served.metric("queue_depth")) == (0, 0)


# -- completions -------------------------------------------------------------------------------------------------


def test_completion_by_the_official_client(served: ServedGateway) -> None:
    with served.openai() as client:
        answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=9, logprobs=2, seed=4)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == ("You said:", "length")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == list("You said:")
        assert choice.logprobs.text_offset == list(range(9))
        assert choice.logprobs.top_logprobs is not None
        assert choice.logprobs.top_logprobs[0] == {"A": 0.0, "B": -1.0, "Y": -0.89}
        echoed = client.completions.create(model=MODEL, prompt="Once", max_tokens=3, echo=True)
        assert echoed.choices[0].text == "OnceYou"
        assert client.completions.create(model=MODEL, prompt="x").usage.completion_tokens == 16  # type: ignore[union-attr]
    turn = served.peer.turns[0]
    assert turn.prompt == Prompt("Once")
    assert (turn.sampling.max_tokens, turn.sampling.logprobs, turn.sampling.seed) == (9, 2, 4)
    assert journaled(served.data_dir)[0].messages == [{"role": "user", "content": "Once"}]


def test_completions_of_many_prompts_and_of_tokens(served: ServedGateway) -> None:
    with served.openai() as client:
        answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 12)
        tokens = client.completions.create(model=MODEL, prompt=[72, 105], max_tokens=3, echo=True)
        assert tokens.choices[0].text == "HiYou"
        many = client.completions.create(model=MODEL, prompt=[[72], [105, 33]], max_tokens=3, echo=True)
        assert [choice.text for choice in many.choices] == ["HYou", "i!You"]
    assert served.peer.turns[4].prompt == Prompt("Hi", pack_tokens([72, 105]))
    # A chat with the same words is another conversation, and so are other tokens with the same text.
    served.chat("Hi")
    assert len({turn.request_key for turn in served.peer.turns[4:]}) == 4


def test_a_streamed_completion(served: ServedGateway) -> None:
    with served.openai() as client:
        stream = client.completions.create(
            model=MODEL, prompt="Once", max_tokens=60, stream=True, echo=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "OnceYou said: Once ✓"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**32]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 1, "echo": True}, "echo"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
    ],
)
def test_bad_completions_are_named(served_once: ServedGateway, fields: dict[str, Any], param: str) -> None:
    reply = _post(served_once, "/v1/completions", fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert served_once.peer.turns == []


# -- tokens ------------------------------------------------------------------------------------------------------


def test_tokenize_and_back(served_once: ServedGateway) -> None:
    text = _post(served_once, "/tokenize", {"prompt": "Hi ✓", "return_token_strs": True}).json()
    assert text["tokens"] == list("Hi ✓".encode())
    assert (text["count"], text["max_model_len"]) == (6, 4096)
    assert len(text["token_strs"]) == 6
    chat = _post(served_once, "/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()
    assert chat["tokens"] == list(b"<user>x")
    assert _post(served_once, "/detokenize", {"tokens": text["tokens"]}).json() == {"prompt": "Hi ✓"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_bad_tokens_are_named(served_once: ServedGateway, path: str, body: dict[str, Any], param: str) -> None:
    reply = _post(served_once, path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


# -- cache fields ------------------------------------------------------------------------------------------------


def test_a_cache_salt_is_mixed_with_the_tenants_own(served: ServedGateway) -> None:
    """Equal salts of one tenant share; of two tenants they do not; the journal's tenant stays the same."""
    for token, salt in (("a", None), ("a", "s"), ("a", "s"), ("a", "t"), ("b", "s")):
        served.chat("hi", token=token, **({"cache_salt": salt} if salt else {}))
    plain, one, same, other, foreign = served.peer.turns
    assert one.tenant_salt == same.tenant_salt
    assert len({turn.tenant_salt for turn in (plain, one, other, foreign)}) == 4
    assert len({turn.request_key for turn in (plain, one, other, foreign)}) == 4
    assert len({turn.tenant for turn in journaled(served.data_dir)}) == 2


def test_turns_of_one_cache_key_stay_at_one_worker(tmp_path_factory: pytest.TempPathFactory, directory: Any) -> None:
    """Though none continues another; without a key they spread."""
    gateway = ServedGateway(directory, workers=2)
    try:
        eventually(lambda: gateway.metric("inference_connected") == 2)
        for number in range(4):
            gateway.chat(f"turn {number}", prompt_cache_key="k")
        assert sorted(len(peer.turns) for peer in gateway.peers) == [0, 4]
        for number in range(4):
            gateway.chat(f"plain {number}")
        assert sorted(len(peer.turns) for peer in gateway.peers) == [4, 4]
    finally:
        gateway.close()


def test_the_rhythm_of_a_cache_key_is_told_to_the_store(served: ServedGateway) -> None:
    """After two turns it is known when the third one should come."""
    for number in range(2):
        served.chat(f"turn {number}", prompt_cache_key="k")
    (told,) = eventually(lambda: served.daemon.anticipated)
    assert told.turn_key == journaled(served.data_dir)[1].turn_key
    assert 0 <= told.in_s < 10


def test_rhythms_are_learned_and_bounded() -> None:
    rhythms = Rhythms(limit=2)
    assert rhythms.due_in_s(b"a", 0.0) is None
    rhythms.arrived(b"a", 0.0)
    assert rhythms.due_in_s(b"a", 1.0) is None
    rhythms.arrived(b"a", 10.0)
    assert rhythms.due_in_s(b"a", 12.0) == 8.0
    rhythms.arrived(b"a", 30.0)
    assert rhythms.due_in_s(b"a", 30.0) == pytest.approx(13.0)
    assert rhythms.due_in_s(b"a", 99.0) == 0.0
    rhythms.arrived(b"b", 31.0)
    rhythms.arrived(b"c", 32.0)
    assert rhythms.due_in_s(b"a", 32.0) is None


def test_a_context_to_be_kept_is_expected_until_it_goes_on(served: ServedGateway) -> None:
    answer = served.chat("one", prompt_cache_retention="24h")["choices"][0]["message"]["content"]
    (told,) = eventually(lambda: served.daemon.anticipated)
    (first,) = journaled(served.data_dir)
    assert told.turn_key == first.turn_key
    returns = served.gateway._returns
    assert list(returns._kept) == [first.turn_key]
    assert returns._kept[first.turn_key] == pytest.approx(time.monotonic() + 24 * 3600, abs=60)
    served.chat("one", answer, "two")
    assert list(returns._kept) == []
    served.chat("three", prompt_cache_retention="in_memory")
    assert list(returns._kept) == []
