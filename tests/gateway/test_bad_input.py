"""Bad input: a clear error in OpenAI's form, and nothing changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.inference_peer import MODEL
from tests.gateway.serving import ServedGateway, journaled, talk

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER]} | fields


def _check(reply: httpx.Response, status: int, param: str | None, code: str) -> str:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    message: str = error["message"]
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "wizard", "content": "hi"}]}, "messages[1].role"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [USER] * 8193}, "messages"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"n": 17}, "n"),
        ({"n": "1"}, "n"),
        ({"n": 0}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": 1}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"tools": "f"}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "f f"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 2**16}}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"priority": 101}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"prompt_cache_key": 5}, "prompt_cache_key"),
        ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"logit_bias": {"fifty": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1\n2": 1}}, "logit_bias"),
        ({"logit_bias": {"50": 101}}, "logit_bias"),
        ({"logit_bias": {"50": True}}, "logit_bias"),
        ({"logit_bias": [[50, 1]]}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"truncation": "none"}, "truncation"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "n", "schema": {}}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n n", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": "{}"}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"title": "x" * 2**16}},
                }
            },
            "response_format",
        ),
    ],
)
def test_bad_field_is_named(served_once: ServedGateway, fields: dict[str, Any], param: str) -> None:
    for stream in ({}, {"stream": True}):
        _check(served_once.post(_body(**(stream | fields))), 400, param, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        json.dumps(_body(seed="s")).encode().replace(b'"s"', b"9" * 5000),
        json.dumps(_body(temperature="t")).encode().replace(b'"t"', b"1e999"),
        json.dumps(_body(messages=[{"role": "user", "content": "\ud800"}])).encode(),
        json.dumps(_body(model="\udfff")).encode(),
        b'{"model": "m", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_malformed_body(served_once: ServedGateway, body: bytes) -> None:
    reply = served_once.post(body)
    error = reply.json()["error"]
    _check(reply, 400, error["param"], "invalid_request")


def test_missing_model_and_messages(served_once: ServedGateway) -> None:
    assert "required" in _check(served_once.post({"messages": [USER]}), 400, "model", "invalid_request")
    assert "required" in _check(served_once.post({"model": MODEL}), 400, "messages", "invalid_request")


def test_unknown_model(served_once: ServedGateway) -> None:
    for stream in (False, True):
        _check(served_once.post(_body(model="gpt-9", stream=stream)), 404, "model", "model_not_found")
    _check(served_once.get("/v1/models/gpt-9"), 404, "model", "model_not_found")


def test_unknown_route_and_method(served_once: ServedGateway) -> None:
    _check(served_once.get("/v1/nothing"), 404, None, "not_found")
    _check(served_once.get("/v1/chat/completions/"), 404, None, "not_found")
    _check(served_once.get("/v1/chat/completions"), 405, None, "method_not_allowed")
    _check(httpx.post(f"{served_once.url}/v1/models"), 405, None, "method_not_allowed")
    assert served_once.metric('requests_total{code="404",route="other"}') >= 1
    assert "/v1/nothing" not in served_once.get("/metrics").text


def test_other_authorization(served_once: ServedGateway) -> None:
    reply = served_once.post(_body(), headers={"Authorization": "Basic eDp5"})
    _check(reply, 401, "Authorization", "invalid_authorization")


def test_large_body(served_once: ServedGateway) -> None:
    """10 MiB with a length, and 10 MiB in chunks that announce none."""
    large = json.dumps(_body(messages=[{"role": "user", "content": "x" * (10 * 2**20)}])).encode()

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 65_536):
            yield large[start : start + 65_536]

    for content in (large, chunks()):
        reply = httpx.post(f"{served_once.url}/v1/chat/completions", content=content, timeout=30.0)
        _check(reply, 413, None, "request_too_large")
    _check(served_once.post(b"[" * (5 * 2**20)), 413, None, "request_too_large")


def test_error_of_inference_before_the_first_token(served: ServedGateway) -> None:
    """A prompt over the context is the caller's fault, and an HTTP status also where a stream was asked for."""
    for stream in (False, True):
        reply = served.post(_body(messages=talk("x [fail context_length_exceeded]"), stream=stream))
        _check(reply, 400, "messages", "context_length_exceeded")
    assert {(turn.status, turn.error_code) for turn in journaled(served.data_dir)} == {
        ("failed", "context_length_exceeded")
    }
    reply = served.post(_body(messages=talk("x [fail no_capacity]")))
    _check(reply, 503, None, "no_capacity")
    assert reply.headers["retry-after"] == "1"


def test_failure_in_the_middle_of_a_stream(served: ServedGateway) -> None:
    reply = served.post(_body(messages=talk("x [break 6]"), stream=True))
    assert reply.status_code == 200
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert json.loads(events[-1])["error"]["code"] == "internal_error"
    assert "[DONE]" not in reply.text
    (turn,) = journaled(served.data_dir)
    assert (turn.status, turn.answer) == ("failed", "You sa")
    with served.openai() as client, pytest.raises(openai.APIError, match="as scripted"):
        list(
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "x [break 6]"}], stream=True
            )
        )


def test_openai_client_sees_its_own_errors(served_once: ServedGateway) -> None:
    with served_once.openai() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], n=99)
        assert bad.value.param == "n"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
        assert missing.value.code == "model_not_found"


def test_nothing_above_left_a_trace(served_once: ServedGateway) -> None:
    """Runs last in this file, on the gateway that all the bad requests went to."""
    assert journaled(served_once.data_dir) == []
    assert served_once.peer.turns == []
    assert served_once.metric("conversations") == 0
    assert served_once.metric("queue_depth") == 0
    served_once.chat("still well")
