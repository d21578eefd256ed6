"""Grammars of tool calls: whatever a model chooses among the tokens they allow, it reads back as calls of good form."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken

from benchmarks.random_model import byte_tokenizer
from gateway.tool_calls import read_answer
from inference.guided import compile_lark
from inference.tools import CLOSE, OPEN, Marks, ToolFormat, tool_format, tool_grammar
from inference.vocabulary import Vocabulary
from protocol.errors import InvalidRequest
from protocol.messages import Tools
from tests.inference.harness import run

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["city", "unit"],
        "additionalProperties": False,
        "$defs": {"unit": {"enum": ["C", "F"]}},
    },
}
TIME = {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
NAMES = {"get_weather", "get_time"}


def _tools(*, strict: bool = True, **choice: Any) -> Tools:
    functions = [{"type": "function", "function": {**function, "strict": strict}} for function in (WEATHER, TIME)]
    return Tools(json.dumps(functions), **choice)


@pytest.fixture(scope="module", params=["bytes", "token"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    """Tokenizers without and with a token for <tool_call>."""
    tokenizer = byte_tokenizer()
    if request.param == "token":
        tokenizer.add_tokens(
            [AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)]
        )
    return Vocabulary(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


def _marks(vocabulary: Vocabulary) -> Marks:
    return Marks(vocabulary.token_of(OPEN), vocabulary.token_of(CLOSE))


def _say(vocabulary: Vocabulary, grammar: str, text: str, chance: random.Random) -> str | None:
    """An answer that begins with `text` and goes on by chance; None: the grammar does not allow it."""
    marks = [(mark, vocabulary.token_of(mark)) for mark in (OPEN, CLOSE)]
    alphabet = {vocabulary.bytes_of(token): token for token in range(256)}
    eos = next(token for token in range(256, vocabulary.size) if vocabulary.name_of(token) == "<|end|>")
    planned: list[int] = []
    while text:
        mark, token = next((m for m in marks if m[1] is not None and text.startswith(m[0])), (text[0], None))
        planned.append(alphabet[mark.encode()] if token is None else token)
        text = text[len(mark) :]

    def is_plain(token: int) -> bool:
        return token == eos or all(32 <= byte < 127 for byte in vocabulary.bytes_of(token))

    async def walk() -> str | None:
        guide, said = await compile_lark(vocabulary, grammar, "tools"), b""
        for _ in range(600):
            allowed = guide.allowed(vocabulary.size).nonzero().flatten().tolist()
            if planned:
                token = planned.pop(0)
                if token not in allowed:
                    return None
            elif guide.is_over or (eos in allowed and (len(allowed) == 1 or chance.random() < 0.7)):
                return said.decode()
            else:
                token = chance.choice([t for t in allowed if t != eos and is_plain(t)] or allowed)
            said += vocabulary.bytes_of(token)
            guide.accept(token)
        return None

    return run(walk())


def _check(name: str, arguments: str) -> None:
    found = json.loads(arguments)
    if name == "get_weather":
        assert found["city"] in ("Oslo", "Rome")
        assert found["unit"] in ("C", "F")
        assert len(found) == 2
    else:
        assert found == {}


@pytest.mark.parametrize("chosen", ["hermes", "llama3"])
def test_a_demanded_call_is_always_one(vocabulary: Vocabulary, chosen: ToolFormat) -> None:
    """Of any function, of the one that is named, one or several: by whatever the model chooses."""
    marks = _marks(vocabulary)
    for seed in range(12):
        chance = random.Random(seed)
        for choice in ({}, {"name": "get_weather"}, {"parallel": False}):
            grammar = tool_grammar(_tools(choice="required", **choice), chosen, marks)
            said = _say(vocabulary, grammar, "", chance)
            assert said is not None
            text, calls = read_answer(said, chosen, NAMES)
            assert text == ""
            assert calls
            assert len(calls) == 1 or not choice
            for call in calls:
                _check(call.name, call.arguments)
                assert call.name == choice.get("name", call.name)


def test_a_strict_function_is_called_by_its_schema_or_not_at_all(vocabulary: Vocabulary) -> None:
    marks = _marks(vocabulary)
    grammar = tool_grammar(_tools(), "hermes", marks)
    for seed in range(12):
        said = _say(vocabulary, grammar, "Let me <b>see</b>.\n<tool_call>", random.Random(seed))
        assert said is not None
        _, calls = read_answer(said, "hermes", NAMES)
        assert calls
        for call in calls:
            _check(call.name, call.arguments)
    assert (
        _say(
            vocabulary, grammar, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"', random.Random(1)
        )
        is None
    )
    assert _say(vocabulary, grammar, "Just text, even with {braces}.", random.Random(1)) is not None
    one = tool_grammar(_tools(parallel=False), "hermes", marks)
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    assert _say(vocabulary, grammar, f"{call}\n{call}", random.Random(1)) is not None
    assert _say(vocabulary, one, call, random.Random(1)) == call
    assert _say(vocabulary, one, call + "\n", random.Random(1)) is None


def test_llama_says_text_or_one_call(vocabulary: Vocabulary) -> None:
    grammar = tool_grammar(_tools(), "llama3", Marks())
    for seed in range(8):
        said = _say(vocabulary, grammar, "{", random.Random(seed))
        assert said is not None
        _, (call,) = read_answer(said, "llama3", NAMES)
        _check(call.name, call.arguments)
    assert _say(vocabulary, grammar, "It is {cold}.", random.Random(1)) is not None


def test_no_grammar_where_the_model_is_free() -> None:
    for choice in ({"strict": False}, {"choice": "none"}):
        assert tool_grammar(_tools(**choice), "hermes", Marks()) == ""


def test_a_schema_that_cannot_be_followed_is_refused(vocabulary: Vocabulary) -> None:
    bad = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {"type": "colour"}}}])
    grammar = tool_grammar(Tools(bad, choice="required"), "hermes", Marks())
    with pytest.raises(InvalidRequest) as refused:
        run(compile_lark(vocabulary, grammar, "tools"))
    assert refused.value.param == "tools"


def test_formats_are_told_by_the_template() -> None:
    assert tool_format("{{ messages }}") == ""
    assert tool_format("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert tool_format('{% if tools %}{"name": f, "parameters": d} <|python_tag|>{% endif %}') == "llama3"
    assert tool_format("{% if tools %}[TOOL_CALLS]{% endif %}") == ""
