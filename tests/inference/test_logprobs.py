"""Log probabilities: those of transformers' own logits, with the bytes of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pytest
import torch

import inference.service
from inference.service import InferenceService
from inference.vocabulary import Vocabulary
from protocol import ids
from protocol.messages import RunTurn, SampledLogprobs, TurnDelta, TurnDone
from protocol.rpc import RpcClient
from tests.inference.harness import (
    Conversation,
    Reference,
    byte_tokenizer,
    config_for,
    make_model,
    run,
    service,
    stream,
    tokens,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_context=512)


@pytest.fixture
def serve(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(inference.service, "_STORE_WAIT_S", 0.0)

    def serve(test: Any) -> None:
        async def main() -> None:
            async with service(config_for(model, tmp_path / "run")) as (running, client):
                await test(running, client)

        run(main())

    return serve


def ask(running: InferenceService, **sampling: Any) -> RunTurn:
    asked = {"temperature": 1.0, "seed": 3, "max_tokens": 24, "logprobs": 5, **sampling}
    return Conversation(RpcClient("inproc://unused", "gateway"), running.model).request("Tell me of the sea.", **asked)


def reports(deltas: list[TurnDelta]) -> list[SampledLogprobs]:
    return [entry for delta in deltas for entry in delta.logprobs]


def settled_by_length(deltas: list[TurnDelta], received: bytes = b"") -> dict[int, int]:
    """What is settled after so many bytes of token ids: how many tokens come together is not determined."""
    lengths = accumulate((len(delta.tokens) for delta in deltas), initial=len(received))
    return dict(zip(islice(lengths, 1, None), (delta.settled for delta in deltas), strict=True))


def check(done: TurnDone, found: list[SampledLogprobs], reference: Reference) -> None:
    """Every entry is log_softmax of the stock forward over the whole answer."""
    prompt, sampled = tokens(done.prompt_tokens), tokens(done.tokens)
    with torch.inference_mode():
        logits = reference.model(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    assert len(found) == len(sampled)
    trie = Vocabulary(byte_tokenizer(), logits.shape[1], [256])
    for row, token, entry in zip(expected, sampled, found, strict=True):
        assert entry.sampled.logprob == pytest.approx(float(row[token]), abs=2e-4)
        assert entry.sampled.bytes == trie.bytes_of(token)
        assert entry.sampled.name == ("" if entry.sampled.bytes else trie.name_of(token))
        values, best = row.topk(len(entry.top))
        assert [other.logprob for other in entry.top] == pytest.approx(values.tolist(), abs=2e-4)
        assert [other.bytes for other in entry.top] == [trie.bytes_of(int(i)) for i in best]


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 20},
        {"logprobs": 0},
        {"temperature": 0.0},
        # What is chosen changes with these; what the model thinks of it is not changed.
        {
            "temperature": 1.7,
            "top_k": 9,
            "frequency_penalty": 1.0,
            "repetition_penalty": 1.5,
            "logit_bias": ((70, 9.0),),
        },
    ],
    ids=str,
)
def test_they_are_the_models(serve: Any, model: Path, fields: dict[str, Any]) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        done, deltas = await stream(client, ask(running, **fields))
        assert len(tokens(done.tokens)) > 3
        assert all(len(entry.top) == fields.get("logprobs", 5) for entry in reports(deltas))
        check(done, reports(deltas), Reference(model))

    serve(test)


def test_they_settle_with_their_text(serve: Any) -> None:
    """What is settled has its text out, at every delta: no token that a stop string takes back is among it."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        vocabulary = running.model.vocabulary
        letters = tuple(
            (token, -100.0) for token in range(261) if token > 255 or not vocabulary.bytes_of(token).isascii()
        )
        whole, _ = await stream(client, ask(running, max_tokens=40, logit_bias=letters))
        assert len(whole.text) == 40
        for at in (3, 9, 20):
            stop = whole.text[at : at + 3]
            asked = ask(running, max_tokens=40, logit_bias=letters, stop=(stop,))
            done, deltas = await stream(client, asked)
            given = ""
            for delta in deltas:
                given += delta.text
                assert delta.settled == len(given)
            assert done.settled == len(done.text) < len(tokens(done.tokens))
            assert done.text == given == whole.text[: whole.text.index(stop)]

    serve(test)


def test_they_survive_a_broken_attempt(serve: Any, model: Path) -> None:
    """An attempt that goes on reports the tokens from there on, and what was settled stays settled."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        asked = ask(running)
        whole, deltas = await stream(client, asked)
        reference, settled = Reference(model), settled_by_length(deltas)
        for kept in (1, len(deltas) // 2, len(deltas)):
            received = b"".join(delta.tokens for delta in deltas[:kept])
            done, rest = await stream(client, replace(asked, job_id=ids.new_id(), resume_tokens=received))
            assert done.tokens == whole.tokens
            assert done.settled == whole.settled
            later = settled_by_length(rest, received)
            assert all(later[length] == settled[length] for length in later.keys() & settled.keys())
            assert (len(whole.tokens) in later) == (len(received) < len(whole.tokens))
            check(done, reports(deltas[:kept]) + reports(rest), reference)

    serve(test)


def test_they_cost_nothing_where_nobody_asks(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        _, deltas = await stream(client, ask(running, logprobs=None))
        assert not reports(deltas)

    serve(test)


def test_bytes_of_tokens() -> None:
    """Every byte that UTF-8 has is itself, a special token has a name alone, and an id without a token nothing."""
    vocabulary = Vocabulary(byte_tokenizer(), 300, [256])
    found = {vocabulary.bytes_of(token) for token in range(256)}
    assert found == {bytes([b]) for b in range(255)} | {"\ufffd".encode()}
    assert (vocabulary.bytes_of(256), vocabulary.name_of(256)) == (b"", "<|end|>")
    assert (vocabulary.bytes_of(299), vocabulary.name_of(299)) == (b"", "")


def test_a_tokenizer_that_cannot_be_read_gives_text() -> None:
    vocabulary = Vocabulary(byte_tokenizer(), 300, [10**9])  # no such end token
    with pytest.raises(ValueError):
        vocabulary.trie()
    letter = byte_tokenizer().convert_tokens_to_ids("a")
    assert vocabulary.bytes_of(letter) == b"a"
