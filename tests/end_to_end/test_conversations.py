"""Conversations that the server keeps, through the whole system with the embedded model: what they reuse and forget."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from openai import OpenAI
from openai.types.responses import Response

from benchmarks.stack import Stack, running_stack

FACTS = ["My sister Anna lives in Rome.", "My door code is 48213.", "My brother Tom works as a baker."]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Nothing is retained on the device: what is reused comes from the store."""
    settings: dict[str, Any] = {"retain": 0, "dram": "64MiB", "ssd": "256MiB", "load_or_compute": "load"}
    with running_stack("embedded", dtype="float32", chunk_tokens=32, **settings) as running:
        yield running


@contextmanager
def tenant(stack: Stack, key: str) -> Iterator[OpenAI]:
    """Nobody else's KV is theirs."""
    with OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0, timeout=120.0) as made:
        yield made


@pytest.fixture
def client(stack: Stack, request: pytest.FixtureRequest) -> Iterator[OpenAI]:
    """A tenant for each test."""
    with tenant(stack, request.node.name) as made:
        yield made


def respond(client: OpenAI, said: Any, **fields: Any) -> Response:
    return client.responses.create(
        model="embedded", input=said, **({"temperature": 0, "max_output_tokens": 60} | fields)
    )


def ours(response: Response) -> dict[str, Any]:
    """Where its prompt came from. The parts add up."""
    assert response.usage is not None
    found: dict[str, Any] = response.usage.model_dump()["cachedattention"]
    hits = found["hbm"] + found["dram"] + found["ssd"]
    assert hits == response.usage.input_tokens_details.cached_tokens
    assert hits + found["computed"] + sum(found["missed"].values()) == response.usage.input_tokens
    return found


def tell(client: OpenAI, conversation: str) -> list[Response]:
    return [respond(client, fact, conversation=conversation) for fact in FACTS]


def test_a_conversation_remembers_and_hits(client: OpenAI) -> None:
    """Only what is new is sent and computed; the answer is the one that a stateless client gets."""
    conversation = client.conversations.create().id
    told = tell(client, conversation)
    asked = respond(client, "Where does Anna live?", conversation=conversation)
    assert "Rome" in asked.output_text
    assert told[-1].usage is not None
    assert ours(asked)["dram"] == told[-1].usage.total_tokens - 1
    assert ours(asked)["missed"] == {}
    messages: list[Any] = []
    for fact, answer in zip(FACTS, told, strict=True):
        messages += [{"role": "user", "content": fact}, {"role": "assistant", "content": answer.output_text}]
    messages.append({"role": "user", "content": "Where does Anna live?"})
    stateless = client.chat.completions.create(model="embedded", messages=messages, temperature=0, max_tokens=60)
    assert stateless.choices[0].message.content == asked.output_text


def test_a_question_asked_again_computes_one_token(client: OpenAI) -> None:
    """The new branch shares all of its prompt with its sibling: to the token, not to the chunk."""
    first = respond(client, FACTS[0])
    asked = respond(client, "Where does Anna live?", previous_response_id=first.id)
    again = respond(client, "Where does Anna live?", previous_response_id=first.id)
    assert again.output_text == asked.output_text
    assert again.usage is not None
    assert ours(again)["dram"] == again.usage.input_tokens - 1
    assert ours(again)["missed"] == {}


def test_an_edited_answer_reuses_everything_before_it(stack: Stack, client: OpenAI) -> None:
    """As where a client strips the reasoning: the history is the same up to the change. The answer is what somebody
    gets who has nothing to reuse."""

    def history(answer: str) -> list[Any]:
        return [
            {"role": "user", "content": " ".join(FACTS)},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Who is Tom?"},
        ]

    first = respond(client, " ".join(FACTS))
    respond(client, history(first.output_text))
    edited = respond(client, history("Noted."))
    assert first.usage is not None
    assert ours(edited)["missed"] == {}
    assert ours(edited)["dram"] >= first.usage.input_tokens  # the whole question, whatever chunks it ends in
    with tenant(stack, "somebody else") as other:
        computed = respond(other, history("Noted."))
    assert ours(computed)["dram"] == 0
    assert computed.output_text == edited.output_text


def test_changed_instructions_are_told_as_the_first_difference(client: OpenAI) -> None:
    first = respond(client, FACTS[0], instructions="Be brief.")
    changed = respond(client, "Where does Anna live?", previous_response_id=first.id, instructions="Be kind.")
    account = ours(changed)
    assert list(account["missed"]) == ["text_changed"]
    found = re.fullmatch(r"first difference at token (\d+)", account["explained"]["text_changed"])
    assert found is not None
    assert account["dram"] <= int(found[1])


def test_where_it_lies_and_that_it_is_erased(stack: Stack, client: OpenAI) -> None:
    """The receipt covers journal, DRAM and SSD; afterwards nothing hits, and a fork still does."""
    conversation = client.conversations.create().id
    told = respond(client, " ".join(FACTS), conversation=conversation)
    respond(client, "Where does Anna live?", conversation=conversation)
    headers = {"Authorization": f"Bearer {client.api_key}"}

    def ask(method: str, path: str, body: Any = None) -> dict[str, Any]:
        reply = stack.http.request(method, f"/v1/conversations/{path}", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    cache = ask("GET", f"{conversation}/cache")
    assert cache["dram"]["bytes"] > 0
    assert cache["turns"][0]["dram"] == cache["turns"][0]["context"] > 0
    assert cache["prompt_tokens"]["dram"] > 0
    assert ask("POST", f"{conversation}/anticipate")["told"]
    fork = ask("POST", f"{conversation}/fork", {"response_id": told.id})
    receipt = ask("POST", f"{conversation}/erase")
    assert receipt["complete"], receipt
    assert receipt["journal"]["turns"] == 2
    assert len(receipt["turn_keys"]) == 1  # the other one is the fork's too
    assert receipt["dram"]["chunks"] > 0
    assert receipt["dram"]["wiped_bytes"] >= receipt["dram"]["bytes"]
    kept = respond(client, "Who is Tom?", conversation=fork["id"])
    assert ours(kept)["dram"] > 0
    assert ask("POST", f"{fork['id']}/erase")["complete"]
    history = [{"role": "user", "content": " ".join(FACTS)}, {"role": "assistant", "content": told.output_text}]
    after = respond(client, [*history, {"role": "user", "content": "Who is Tom?"}])
    assert ours(after)["dram"] + ours(after)["ssd"] == 0
    assert after.output_text == kept.output_text
