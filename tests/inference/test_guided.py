"""Guided answers: whatever a random model would say, what comes out is JSON of the schema."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from llguidance import LLTokenizer
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import inference.guided
import inference.service
from inference.guided import Guide, compile_schema
from inference.sampling import Sampler
from inference.service import InferenceService
from inference.vocabulary import Vocabulary
from protocol import ids
from protocol.errors import InternalError, InvalidRequest
from protocol.messages import RunTurn, Sampling
from protocol.rpc import RpcClient
from tests.inference.harness import Conversation, byte_tokenizer, config_for, run, service, stream, tokens

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
VOCABULARY = Vocabulary(TOKENIZER, 300, [END, END + 1])


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Colour(Enum):
    RED = "rot"
    GREEN = "grün"


class Person(Closed):
    name: Annotated[str, Field(min_length=1, max_length=12)]
    age: Annotated[int, Field(ge=0, le=150)]
    colour: Colour
    tags: Annotated[list[Annotated[str, Field(max_length=3)]], Field(max_length=3)]


class Leaf(Closed):
    kind: Literal["leaf"]
    value: bool


class Tree(Closed):
    kind: Literal["tree"]
    left: Leaf | None
    right: Leaf


SCHEMAS: dict[str, Any] = {
    "person": Person,
    "nested": Tree,
    "union": Leaf | Tree,
    "list": Annotated[list[Annotated[int, Field(ge=-5, le=5)]], Field(min_length=2, max_length=4)],
    "pattern": Annotated[str, Field(pattern=r"^[a-f]{2}-[0-9]{3}$")],
    "choice": Literal["yes", "no", "日本 🙂"],
    "nothing": None,
}


def schema_of(kind: Any) -> str:
    return json.dumps(TypeAdapter(kind).json_schema())


def compiled(schema: str) -> Guide:
    return run(compile_schema(VOCABULARY, schema))


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_logits_make_the_schema(name: str, temperature: float) -> None:
    """Logits by chance, another row for each token: the answer parses, and is valid by pydantic's own reading."""
    kind = TypeAdapter(SCHEMAS[name])
    generator = torch.Generator().manual_seed(1)
    for seed in range(5):
        sampler = Sampler(Sampling(temperature=temperature, seed=seed), 300, (), compiled(schema_of(SCHEMAS[name])))
        sampled: list[int] = []
        while not sampler.is_over:
            # White space is long by chance, and ends; letters of any script would make strings long.
            sampled.append(sampler.sample(torch.randn(300, generator=generator) * 4))
            assert len(sampled) < 5000
        kind.validate_json(TOKENIZER.decode([token for token in sampled if token < END]))


def test_every_end_token_ends_and_none_comes_early() -> None:
    guide = compiled('{"type":"integer"}')
    assert not guide.allowed(300)[END]
    guide.accept(TOKENIZER.convert_tokens_to_ids("7"))
    allowed = guide.allowed(310)  # more logits than the tokenizer has tokens
    assert allowed[END]
    assert allowed[END + 1]
    assert not allowed[300:].any()
    assert not guide.is_over
    guide.accept(END)
    assert guide.is_over


def test_what_is_not_allowed_is_not_accepted() -> None:
    with pytest.raises(InternalError, match="does not follow the schema"):
        compiled('{"type":"integer"}').accept(TOKENIZER.convert_tokens_to_ids("x"))


def test_a_copy_goes_its_own_way() -> None:
    """Another attempt begins where the answer began."""
    first = compiled('{"enum":["ab"]}')
    again = first.copy()
    for letter in '"ab':
        first.accept(TOKENIZER.convert_tokens_to_ids(letter))
    assert again.allowed(300).nonzero().flatten().tolist() == [TOKENIZER.convert_tokens_to_ids('"')]


def test_an_answer_that_outgrows_the_lexer_ends_and_harms_no_other() -> None:
    """A pattern with a million states is followed as far as the limit goes, and as far again by the next answer."""
    schema = '{"type":"string","pattern":"^(a|b)*a(a|b){20}$"}'
    letters = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "ab"]
    generator = torch.Generator().manual_seed(0)

    def follow(guide: Guide) -> None:
        guide.accept(TOKENIZER.convert_tokens_to_ids('"'))
        for bit in torch.randint(2, (200_000,), generator=generator).tolist():
            guide.allowed(300)
            guide.accept(letters[bit])

    for _ in range(2):
        with pytest.raises(InvalidRequest, match="cannot be followed"):
            follow(compiled(schema))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "cannot be read"),
        ('{"type":"wizard"}', "wizard"),
        ('{"type":"string","pattern":"(a"}', "unclosed group"),
        ('{"not":{"type":"string"}}', "not"),
        ('{"type":"array","uniqueItems":true}', "uniqueItems"),
        ('{"$ref":"http://example.com/schema"}', "example.com"),
        ('{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/a"}}}', "cannot be followed"),
        ('{"const":"\\ud800"}', "cannot be read"),
        (
            json.dumps({"allOf": [{"anyOf": [{"pattern": f"a{i}.*b"}, {"pattern": f"c{i}"}]} for i in range(60)]}),
            "large",
        ),
    ],
    ids=lambda value: value[:40],
)
def test_a_schema_that_cannot_be_followed_is_the_callers(schema: str, reason: str) -> None:
    """Refused with the reason in one line, in seconds at most."""
    with pytest.raises(InvalidRequest, match=reason) as refused:
        compiled(schema)
    assert refused.value.param == "response_format"
    assert "\n" not in refused.value.message


def test_a_schema_cannot_switch_our_bounds_off() -> None:
    """White space is bounded whatever the schema's own options say."""
    guide = compiled('{"type":"array","items":{"type":"null"},"x-guidance":{"whitespace_pattern":" +"}}')
    guide.accept(TOKENIZER.convert_tokens_to_ids("["))
    space = TOKENIZER.convert_tokens_to_ids("Ġ")
    for _ in range(40):
        guide.accept(space)
    assert not guide.allowed(300)[space]


def test_a_slow_compilation_is_refused_and_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one compiles, the loop goes on and others compile; after its deadline it is the caller's fault."""
    release = threading.Event()

    compile_now = inference.guided._compile

    def compile_when_released(trie: LLTokenizer, vocabulary: int, make_grammar: Callable[[], str], param: str) -> Guide:
        assert '"const":2' in make_grammar().replace(" ", "") or release.wait(60)
        return compile_now(trie, vocabulary, make_grammar, param)

    monkeypatch.setattr(inference.guided, "_compile", compile_when_released)

    async def both() -> None:
        slow = asyncio.ensure_future(compile_schema(VOCABULARY, '{"const":1}'))
        try:
            await compile_schema(VOCABULARY, '{"const":2}')
            assert not slow.done()
            monkeypatch.setattr(inference.guided, "_DEADLINE_S", 0.05)
            with pytest.raises(InvalidRequest, match=r"does not compile in 0\.05 s"):
                await compile_schema(VOCABULARY, '{"const":1}')
        finally:
            release.set()
        await slow

    run(both())


def test_a_tokenizer_that_llguidance_cannot_read_is_told() -> None:
    with pytest.raises(InvalidRequest, match="tokenizer cannot follow schemas"):
        run(compile_schema(Vocabulary(TOKENIZER, 300, [10**9]), '{"type":"object"}'))


# -- through the engine -------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(inference.service, "_STORE_WAIT_S", 0.0)

    def serve(test: Any) -> None:
        async def main() -> None:
            async with service(config_for("embedded", tmp_path / "run")) as (running, client):
                await test(running, client)

        run(main())

    return serve


def ask(running: InferenceService, schema: str, **sampling: Any) -> RunTurn:
    asked = {"temperature": 1.0, "seed": 3, "max_tokens": 1500, "json_schema": schema, **sampling}
    return Conversation(RpcClient("inproc://unused", "gateway"), running.model).request("Tell me of the sea.", **asked)


def test_the_embedded_model_answers_in_json(serve: Any) -> None:
    """Greedy and drawn, side by side with free text: each answer is valid and ends by itself."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        kinds = {"person": Person, "union": Leaf | Tree, "list": SCHEMAS["list"]}
        turns = [ask(running, schema_of(kind), temperature=t) for kind in kinds.values() for t in (0.0, 1.0)]
        free = ask(running, "", max_tokens=60)
        (text, _), *answers = await asyncio.gather(*(stream(client, turn) for turn in (free, *turns)))
        assert text.text
        for (done, _), kind in zip(answers, [k for k in kinds.values() for _ in range(2)], strict=True):
            assert done.finish_reason == "stop"
            TypeAdapter(kind).validate_json(done.text)

    serve(test)


def test_a_broken_off_answer_goes_on_in_the_schema(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        asked = ask(running, schema_of(Person))
        whole, deltas = await stream(client, asked)
        Person.model_validate_json(whole.text)
        for kept in (1, 7, len(deltas) - 1, len(deltas)):
            received = b"".join(delta.tokens for delta in deltas[:kept])
            done, _ = await stream(client, replace(asked, job_id=ids.new_id(), resume_tokens=received))
            assert (done.text, done.tokens, done.finish_reason) == (whole.text, whole.tokens, "stop")

    serve(test)


def test_length_cuts_json_and_says_so(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        done, _ = await stream(client, ask(running, schema_of(Person), max_tokens=5))
        assert done.finish_reason == "length"
        assert len(tokens(done.tokens)) == 5
        assert done.text.startswith("{")

    serve(test)


def test_bad_requests_are_refused_before_they_start(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        with pytest.raises(InvalidRequest, match="wizard") as refused:
            await stream(client, ask(running, '{"type":"wizard"}'))
        assert refused.value.param == "response_format"
        with pytest.raises(InvalidRequest, match="no token 1000000; the model has") as refused:
            await stream(client, ask(running, "", logit_bias=((10**6, 1.0),)))
        assert refused.value.param == "logit_bias"

    serve(test)


def test_a_schema_that_breaks_on_the_way_ends_its_turn_alone(serve: Any) -> None:
    """The engine goes on with the others."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        # An object with so many properties in any order has too many beginnings, which is found where it begins.
        many = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(3000)}}
        schema = json.dumps({"type": "object", "properties": {"first": many}, "required": ["first"]})
        broken = asyncio.ensure_future(stream(client, ask(running, schema)))
        free, _ = await stream(client, ask(running, "", max_tokens=60))
        assert free.tokens
        with pytest.raises(InvalidRequest, match=r"cannot be followed: .* items"):
            await broken
        assert running.engine.running == 0

    serve(test)
