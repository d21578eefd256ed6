"""A turn over real HTTP: OpenAI's shapes, the official client, continuation by turn key, tenants."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from protocol.ids import unpack_tokens
from protocol.messages import ChatMessage, Sampling
from tests.gateway.inference_peer import END, MODEL, answer_to, logprobs_of, render
from tests.gateway.serving import ServedGateway, journaled, talk


def test_completion_has_openai_shape(served: ServedGateway) -> None:
    body = served.chat("tell me a story")
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL
    assert isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "You said: tell me a story ✓", "refusal": None}
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    ours = usage["cachedattention"]
    assert ours["hbm"] + ours["dram"] + ours["ssd"] + ours["computed"] + sum(ours["missed"].values()) == len(
        render([ChatMessage("user", "tell me a story")])
    )
    assert 0 < ours["prefill_s"] <= ours["ttft_s"] < 10
    assert "token_ids" not in choice
    assert "prompt_token_ids" not in body


def test_token_ids_are_returned_where_asked_for(served: ServedGateway) -> None:
    body = served.chat("hi", return_token_ids=True)
    message = ChatMessage("user", "hi")
    assert body["prompt_token_ids"] == render([message])
    assert body["choices"][0]["token_ids"] == [*answer_to([message]), END]


def test_truncation_is_passed_on_and_told(served: ServedGateway) -> None:
    """Auto unless told otherwise; what the context has lost is reported, streamed or not."""
    kept = served.chat("hi", truncation="disabled")["usage"]["cachedattention"]
    assert (kept["dropped"], kept["kept"]) == (0, [])
    usage = served.chat("hi [dropped 3]")["usage"]
    said = usage["total_tokens"]
    assert (usage["cachedattention"]["dropped"], usage["cachedattention"]["kept"]) == (3, [[3, said]])
    streamed = {"messages": talk("hi [dropped 3]"), "stream": True, "stream_options": {"include_usage": True}}
    *_, last, _ = _events(served.post({"model": MODEL, "truncation": "auto", **streamed}))
    parts = json.loads(last)["usage"]["cachedattention"]
    assert (parts["dropped"], parts["kept"]) == (3, [[3, said]])
    assert [turn.truncation for turn in served.peer.turns] == ["disabled", "auto", "auto"]


def test_second_turn_continues_the_first(served: ServedGateway) -> None:
    """A client that sends the whole history hits everything that the turn before left behind."""
    first = served.chat("one")
    answer = first["choices"][0]["message"]["content"]
    second = served.chat("one", answer, "two")
    left_behind = first["usage"]["total_tokens"] - 1
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == left_behind
    one, two = journaled(served.data_dir)
    assert two.parent_id == one.id
    assert two.conversation_id == one.conversation_id
    assert two.messages == [{"role": "user", "content": "two"}]
    assert (one.answer, one.status) == (answer, "done")
    assert list(unpack_tokens(one.answer_tokens or b"")) == [*answer.encode(), END]
    assert served.peer.turns[1].parent_turn_key == one.turn_key
    assert served.metric("conversations") == 1


def test_editing_makes_a_branch(served: ServedGateway) -> None:
    answer = served.chat("one")["choices"][0]["message"]["content"]
    served.chat("one", answer, "two")
    served.chat("one", answer, "two, edited")
    served.chat("one", "an answer that was never given", "two")
    served.chat("another one", answer, "two")
    one, two, edited, corrected, foreign = journaled(served.data_dir)
    assert two.parent_id == edited.parent_id == one.id
    assert (corrected.conversation_id, corrected.parent_id) == (one.conversation_id, None)
    assert len(corrected.messages) == 3
    assert foreign.conversation_id != one.conversation_id


def test_longest_known_prefix_wins(served: ServedGateway) -> None:
    texts = ["one"]
    for _ in range(3):
        texts += [served.chat(*texts)["choices"][0]["message"]["content"], "more"]
    turns = journaled(served.data_dir)
    served.chat(*texts[:5], "edited answer", "again")  # known up to the second answer
    assert journaled(served.data_dir)[-1].parent_id == turns[1].id
    served.chat(*texts)
    assert journaled(served.data_dir)[-1].parent_id == turns[2].id


def test_tenants_share_nothing(served: ServedGateway) -> None:
    answer = served.chat("one", token="alice")["choices"][0]["message"]["content"]
    for token in ("bob", ""):
        body = served.chat("one", answer, "two", token=token)
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    body = served.chat("one", answer, "two", token="alice", user="bob")
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    alice, bob, nobody, again = served.peer.turns
    assert len({alice.tenant_salt, bob.tenant_salt, nobody.tenant_salt}) == 3
    assert alice.tenant_salt == again.tenant_salt
    assert len({turn.request_key for turn in (bob, nobody, again)}) == 3


def test_all_roles_and_parts_reach_inference(served: ServedGateway) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b":1}'}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "weather?", "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ]
    reply = served.post(
        {
            "model": "default",
            "messages": messages,
            "max_tokens": 5,
            "temperature": 0,
            "top_p": 0.5,
            "stop": "x",
            "seed": 7,
            "n": 1,
            "tools": [],
            "logit_bias": {},
            "response_format": {"type": "text"},
            "logprobs": False,
            "presence_penalty": 0.0,
            "metadata": {"any": "thing"},
            "store": True,
        }
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    assert reply.json()["usage"]["completion_tokens"] == 5
    (turn,) = served.peer.turns
    assert turn.messages == (
        ChatMessage("system", "be kind"),
        ChatMessage("user", "weather?", name="ada"),
        ChatMessage(
            "assistant",
            "",
            tool_calls='[{"function":{"arguments":"{\\"b\\":1}","name":"f"},"id":"c1","type":"function"}]',
        ),
        ChatMessage("tool", "sunny", tool_call_id="c1"),
    )
    sampling = turn.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0.0, 0.5)
    assert (sampling.stop, sampling.seed) == (("x",), 7)


def _events(reply: httpx.Response) -> list[str]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in reply.text.split("\n\n") if line)
    return [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]


def test_stream_has_openai_shape(served: ServedGateway) -> None:
    reply = served.post(
        {
            "model": MODEL,
            "messages": talk("hi"),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
    )
    *chunks, end = _events(reply)
    assert end == "[DONE]"
    first, *deltas, last, usage = [json.loads(chunk) for chunk in chunks]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(delta["choices"][0]["delta"]["content"] for delta in deltas) == "You said: hi ✓"
    tokens = [token for delta in deltas for token in delta["choices"][0]["token_ids"]]
    assert tokens + last["choices"][0]["token_ids"] == [*answer_to([ChatMessage("user", "hi")]), END]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["delta"] == {}
    assert last["prompt_token_ids"] == render([ChatMessage("user", "hi")])
    assert usage["choices"] == []
    assert usage["usage"]["cachedattention"]["computed"] == usage["usage"]["prompt_tokens"]
    assert all(chunk["usage"] is None for chunk in (first, *deltas, last))
    assert {chunk["id"] for chunk in (first, *deltas, last, usage)} == {first["id"]}
    assert first["object"] == "chat.completion.chunk"


def test_stream_without_extras_has_none(served: ServedGateway) -> None:
    reply = served.post({"model": MODEL, "messages": talk("hi"), "stream": True})
    *chunks, _ = _events(reply)
    for chunk in map(json.loads, chunks):
        assert "usage" not in chunk
        assert "token_ids" not in chunk["choices"][0]
        assert chunk["choices"][0]["delta"].get("content") != "" or "role" in chunk["choices"][0]["delta"]


def test_sampling_fields_reach_inference(served: ServedGateway) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
    served.chat(
        "hi",
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={"7": -100, "8": 2.5},
        logprobs=True,
        top_logprobs=3,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}},
    )
    served.chat("hi", top_k=-1, logprobs=True, response_format={"type": "json_object"})
    served.chat("hi")
    full, some, none = (turn.sampling for turn in served.peer.turns)
    assert (full.top_k, full.min_p, full.repetition_penalty) == (5, 0.1, 1.2)
    assert (full.presence_penalty, full.frequency_penalty) == (-1, 0.5)
    assert full.logit_bias == ((7, -100), (8, 2.5))
    assert (full.logprobs, some.logprobs) == (3, 0)
    # In the client's order: it is the order in which the answer is written.
    assert full.json_schema == '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"null"}}}'
    assert json.loads(some.json_schema) == {"type": "object"}
    assert replace(none, seed=None) == Sampling()


def test_a_turn_without_a_seed_gets_its_own(served: ServedGateway) -> None:
    for text in ("one", "two"):
        served.chat(text)
    one, two = (turn.sampling.seed for turn in served.peer.turns)
    assert None not in (one, two)
    assert one != two


def _entry(token: int, top: int) -> dict[str, Any]:
    report = logprobs_of(token, top)
    shown = [
        {"token": e.bytes.decode("utf-8", "replace"), "logprob": e.logprob, "bytes": list(e.bytes)}
        for e in (report.sampled, *report.top)
    ]
    return shown[0] | {"top_logprobs": shown[1:]}


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs_are_of_the_answers_tokens(served: ServedGateway, top: int) -> None:
    """One entry for each token of the text, the end token not among them; streamed, they come with their text."""
    asked = {"model": MODEL, "messages": talk("hi"), "logprobs": True, "top_logprobs": top}
    expected = [_entry(token, top) for token in answer_to([ChatMessage("user", "hi")])]
    whole = served.post(asked).json()["choices"][0]
    assert whole["logprobs"] == {"content": expected, "refusal": None}
    *chunks, _ = _events(served.post(asked | {"stream": True}))
    found, text = [], ""
    for choice in (json.loads(chunk)["choices"][0] for chunk in chunks):
        text += choice["delta"].get("content", "")
        found += (choice["logprobs"] or {"content": []})["content"]
        assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == text
    assert found == expected
    assert served.chat("hi")["choices"][0]["logprobs"] is None


def test_openai_client_reads_logprobs(served: ServedGateway) -> None:
    with served.openai() as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": talk("hi"), "logprobs": True, "top_logprobs": 1}
        logprobs = client.chat.completions.create(**asked).choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert "".join(entry.token for entry in logprobs.content).startswith("You said: hi")
        streamed = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**asked, stream=True)]
    assert [entry for part in streamed if part for entry in part.content or ()] == logprobs.content


def test_missing_logprobs_are_a_broken_promise(served: ServedGateway) -> None:
    reply = served.post({"model": MODEL, "messages": talk("x [unsure]"), "logprobs": True})
    assert reply.status_code == 502
    assert reply.json()["error"]["code"] == "peer_protocol_error"


def test_answer_with_invalid_utf8_continues(served: ServedGateway) -> None:
    """The client sees the replacement character; sent back, it still names the same turn."""
    answer = served.chat("x [bytes]")["choices"][0]["message"]["content"]
    assert answer.endswith("✓\ufffd")
    body = served.chat("x [bytes]", answer, "more")
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert list(unpack_tokens(journaled(served.data_dir)[0].answer_tokens or b""))[-2:] == [0xFF, END]


def test_nul_survives(served: ServedGateway) -> None:
    answer = served.chat("a\x00b")["choices"][0]["message"]["content"]
    assert "a\x00b" in answer
    assert journaled(served.data_dir)[0].answer == answer


def test_openai_client_without_stream(served: ServedGateway) -> None:
    with served.openai() as client:
        reply = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
        assert reply.choices[0].message.content == "You said: hi ✓"
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 0
        # The message object as it came goes back into the history.
        again = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}, reply.choices[0].message, {"role": "user", "content": "more"}],
        )
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens == reply.usage.total_tokens - 1
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL


def test_openai_client_with_stream(served: ServedGateway) -> None:
    with served.openai() as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "You said: hi ✓"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("You said: hi ✓".encode()) + 1


def test_metrics_add_up(served: ServedGateway, directory: Path) -> None:
    first = served.chat("one")
    second = served.chat("one", first["choices"][0]["message"]["content"], "two")
    computed = sum(body["usage"]["cachedattention"]["computed"] for body in (first, second))
    assert served.metric('prompt_tokens_total{source="computed"}') == computed
    assert served.metric('prompt_tokens_total{source="dram"}') == second["usage"]["cachedattention"]["dram"]
    assert served.metric('turns_total{status="done"}') == 2
    assert served.metric('requests_total{code="200",route="/v1/chat/completions"}') == 2
    for name in ("ttft", "prefill", "tpot", "queue_wait"):
        assert served.metric(f"{name}_seconds_count") == 2
    assert served.metric("queue_depth") == 0
    assert served.metric("running_jobs") == 0
    assert served.metric("inference_connected") == 1
    assert served.metric("kvdaemon_connected") == 1


@pytest.mark.parametrize("mark", ["[bad-key]", "[bad-sum]"])
def test_a_broken_promise_is_an_internal_error(served: ServedGateway, mark: str) -> None:
    reply = served.post({"model": MODEL, "messages": talk(f"x {mark}")})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert [turn.status for turn in journaled(served.data_dir)] == ["failed"]


def test_another_answer_than_streamed_is_refused(served: ServedGateway) -> None:
    reply = served.post({"model": MODEL, "messages": talk("x [bad-text]"), "stream": True})
    events = _events(reply)
    assert json.loads(events[-1])["error"]["code"] == "peer_protocol_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_before_its_start_is_refused(served: ServedGateway, stream: bool) -> None:
    reply = served.post({"model": MODEL, "messages": talk("x [unstarted]"), "stream": stream})
    assert reply.status_code == 502
    assert reply.json()["error"]["code"] == "peer_protocol_error"


def test_one_log_line_per_turn(served: ServedGateway) -> None:
    with capture_logs() as lines:
        served.chat("hi")
        served.post({"model": MODEL, "messages": talk("x [fail context_length_exceeded]")})
    done, failed = [line for line in lines if line["event"] == "turn"]
    assert (done["status"], done["computed"], done["dram"]) == ("done", done["prompt_tokens"], 0)
    assert 0 < done["ttft_s"] <= done["duration_s"]
    assert (failed["status"], failed["code"]) == ("failed", "context_length_exceeded")
