"""Sampling through the whole system, by OpenAI's own client: schemas, seeds, stop strings, log probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel, ConfigDict

from benchmarks.stack import Stack, running_stack

DRAWN: dict[str, Any] = {"temperature": 1.2, "top_p": 0.98, "frequency_penalty": 0.1, "max_tokens": 60}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(
        "embedded", dtype="float32", retain=0, dram="64MiB", ssd="1GiB", load_or_compute="load"
    ) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="sk-test", max_retries=0, timeout=120.0) as made:
        yield made


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    known: bool
    guests: Literal[0, 1, 12] | None


def test_the_clients_own_models_are_schemas(client: OpenAI) -> None:
    """OpenAI's `parse` gives an instance of the class that was asked for, greedy and drawn."""
    for temperature in (0.0, 1.0):
        reply = client.chat.completions.parse(
            model="default",
            messages=said("My sister Anna lives in Rome."),
            response_format=Place,
            temperature=temperature,
            max_tokens=2000,
            seed=1,
        )
        assert reply.choices[0].finish_reason == "stop"
        assert isinstance(reply.choices[0].message.parsed, Place)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_cannot_do_is_refused(client: OpenAI, stream: bool) -> None:
    """Found by the inference process, and yet a status 400 with the field's name, streamed or not."""
    unknown = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {"type": "string"}}}}
    for fields, param in (
        ({"response_format": unknown}, "response_format"),
        ({"logit_bias": {"4000000000": 1}}, "logit_bias"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="default", messages=said("hi"), stream=stream, **fields)
        assert refused.value.param == param


def test_a_seed_repeats_its_answer_from_anywhere(stack: Stack, client: OpenAI) -> None:
    """Alone, beside others, and with its history computed, from DRAM and from SSD."""

    def answer(_: int = 0) -> str:
        reply = client.chat.completions.create(model="default", messages=history, seed=5, **DRAWN)
        return reply.choices[0].message.content or ""

    history = said("My sister Anna lives in Rome. " * 30)
    first = client.chat.completions.create(model="default", messages=history, temperature=0, max_tokens=30)
    history += [{"role": "assistant", "content": first.choices[0].message.content}, *said("Where does Anna live?")]
    alone = answer()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(answer, range(8))) == {alone}
    stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)
    stack.wait_metric("kvdaemon", "cachedattention_write_behind_queue", 0.0)
    stack.drop_dram()
    stack.wait_metric("inference", "cachedattention_store_connected", 1.0)
    assert answer() == alone


def test_a_stop_string_ends_the_answer_and_the_conversation_goes_on(client: OpenAI) -> None:
    messages = said("My sister Anna lives in Rome.")
    whole = client.chat.completions.create(model="default", messages=messages, seed=3, **DRAWN)
    text = whole.choices[0].message.content or ""
    stop = text[7:10]
    cut = client.chat.completions.create(model="default", messages=messages, seed=3, stop=stop, **DRAWN)
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.usage is not None
    messages += [{"role": "assistant", "content": cut.choices[0].message.content}, *said("Where does Anna live?")]
    more = client.chat.completions.create(model="default", messages=messages, temperature=0, max_tokens=5)
    assert more.usage is not None
    assert more.usage.prompt_tokens_details is not None
    assert (more.usage.prompt_tokens_details.cached_tokens or 0) >= cut.usage.prompt_tokens


@pytest.mark.parametrize("seed", [7, None])
def test_a_killed_process_changes_nothing_of_a_drawn_answer(stack: Stack, client: OpenAI, seed: int | None) -> None:
    """Streamed with log probabilities, inference killed on the way: as with no kill, and with none missing."""
    end = client.chat.completions.create(
        model="default", messages=said("hi"), temperature=0, extra_body={"return_token_ids": True}
    )
    end_id = end.choices[0].token_ids[-1]  # type: ignore[attr-defined]
    asked: dict[str, Any] = {
        "model": "default",
        "messages": said("Tell me of the sea."),
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {str(end_id): -100},
        "seed": seed,
        "extra_body": {"return_token_ids": True},
        **DRAWN,
        "max_tokens": 600,
    }

    def play(kill: bool) -> tuple[str, list[int], list[Any]]:
        chunks: list[ChatCompletionChunk] = []
        for chunk in client.chat.completions.create(**asked, stream=True):
            chunks.append(chunk)
            if kill and len(chunks) == 10:
                stack.kill("inference")
                stack.launch("inference")
        choices = [chunk.choices[0] for chunk in chunks]
        assert choices[-1].finish_reason == "length"
        return (
            "".join(choice.delta.content or "" for choice in choices),
            [token for choice in choices for token in choice.token_ids],  # type: ignore[attr-defined]
            [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or ()],
        )

    text, tokens, entries = play(kill=True)
    assert stack.metrics("gateway")["cachedattention_turn_retries_total"] >= 1
    assert len(tokens) == len(entries) == 600
    assert bytes(byte for entry in entries for byte in entry.bytes or ()).decode("utf-8", "replace") == text
    if seed is not None:
        same_text, same_tokens, same_entries = play(kill=False)
        assert (same_text, same_tokens) == (text, tokens)
        assert [e.logprob for e in same_entries] == pytest.approx([e.logprob for e in entries], abs=1e-3)
