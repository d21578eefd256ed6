"""Calls of tools: found in an answer as it comes, told as OpenAI tells them, and recognized when they come back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.tool_calls import Format, Piece, ToolCall, ToolCallParser, read_answer
from protocol.messages import ChatMessage, Tools
from tests.gateway.inference_peer import MODEL
from tests.gateway.serving import ServedGateway, journaled

NAMES = {"f", "g"}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}</"]}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SAID = 'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome",  "days": 2}}\n</tool_call>'


# -- the parser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "text", "said", "calls"),
    [
        ("hermes", "plain", "plain", []),
        ("hermes", CALL, "", [("f", '{"a": [1, "}</"]}')]),
        ("hermes", f" see:\n{CALL}\n{CALL}\n", " see:", [("f", '{"a": [1, "}</"]}')] * 2),
        ("hermes", f"{CALL} and then", "and then", [("f", '{"a": [1, "}</"]}')]),
        ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
        ("hermes", '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>', "", [("g", "{}")]),
        ("hermes", '<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>', []),
        ("hermes", "<tool_call>{nonsense</tool_call> x", "<tool_call>{nonsense</tool_call> x", []),
        ("hermes", "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ("hermes", 'x <tool_call>\n{"name": "f"', 'x <tool_call>\n{"name": "f"', []),
        ("hermes", "a < b and <tool", "a < b and <tool", []),
        ("hermes", "ends with space \n", "ends with space \n", []),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", None, []),
        ("llama3", '{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        ("llama3", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [("f", "{}"), ("g", "{}")]),
        ("llama3", '{"name": "f", "parameters": {}} is it', '{"name": "f", "parameters": {}} is it', []),
        ("llama3", '{"answer": 5}', '{"answer": 5}', []),
        ("llama3", " plain {", " plain {", []),
        ("llama3", "", "", []),
        ("", CALL, CALL, []),
    ],
)
def test_an_answer_is_text_and_calls(chosen: Format, text: str, said: str | None, calls: list[tuple[str, str]]) -> None:
    found, found_calls = read_answer(text, chosen, NAMES)
    assert found == (text if said is None else said)
    assert [(call.name, call.arguments) for call in found_calls] == calls


@example("llama3", 'x{"name": "f", "parameters": {}}', [1])
@given(
    st.sampled_from(["hermes", "llama3", ""]),
    st.lists(
        st.sampled_from(
            [CALL, "<tool_call>", "</tool_call>", '{"name": "f", "parameters": {}}', " \n", "x", "<", "tool_", "; "]
        ),
        max_size=6,
    ).map("".join),
    st.lists(st.integers(1, 9), max_size=40),
)
def test_it_does_not_matter_how_the_text_is_cut(chosen: Format, text: str, cuts: list[int]) -> None:
    parser, pieces, rest = ToolCallParser(chosen, NAMES), list[Piece](), text
    for cut in cuts:
        pieces += parser.feed(rest[:cut])
        rest = rest[cut:]
    pieces += [*parser.feed(rest), *parser.finish()]
    said = "".join(piece for piece in pieces if isinstance(piece, str))
    assert (said, [piece for piece in pieces if isinstance(piece, ToolCall)]) == read_answer(text, chosen, NAMES)


@given(st.text(st.sampled_from("<tol_ca>x \n"), max_size=40))
def test_text_without_a_call_is_given_out_whole(text: str) -> None:
    assert read_answer(text, "hermes", NAMES) == (text, [])


# -- the API -----------------------------------------------------------------------------------------------------


def _ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "tools": [WEATHER], **fields}


def test_a_call_is_told_as_openai_tells_it(served: ServedGateway) -> None:
    with served.openai() as client:
        answer = client.chat.completions.create(**_ask(f"Rome? [say {SAID}]"))
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome", "days": 2}
    (turn,) = served.peer.turns
    assert turn.tools is not None
    assert json.loads(turn.tools.functions) == [WEATHER]
    assert (turn.tools.choice, turn.tools.name, turn.tools.parallel) == ("auto", "", True)


def test_a_streamed_call_is_the_same(served: ServedGateway) -> None:
    with served.openai() as client:
        chunks = list(client.chat.completions.create(**_ask(f"Rome? [say {SAID} ]"), stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me look."
    (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert call.index == 0
    assert call.id
    assert call.function is not None
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments or "") == {"city": "Rome", "days": 2}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_call_that_comes_back_is_what_the_model_wrote(served: ServedGateway, streaming: bool) -> None:
    """The next turn continues the one that called, with all of its KV, though JSON was spaced otherwise."""
    with served.openai() as client:
        if streaming:
            chunks = client.chat.completions.create(**_ask(f"Rome? [say {SAID}]"), stream=True)
            (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            function: Any = call.function
            calls = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": function.name, "arguments": function.arguments},
                }
            ]
            called: Any = {"role": "assistant", "content": "Let me look.", "tool_calls": calls}
        else:
            called = client.chat.completions.create(**_ask(f"Rome? [say {SAID}]")).choices[0].message
            calls = called.model_dump()["tool_calls"]
        asked = _ask(f"Rome? [say {SAID}]")
        result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "sunny"}
        asked["messages"] = [*asked["messages"], called, result]
        again = client.chat.completions.create(**asked)
    second = served.peer.turns[1]
    assert second.messages[1:] == (
        ChatMessage("assistant", SAID),
        ChatMessage("tool", "sunny", tool_call_id=calls[0]["id"]),
    )
    one, two = journaled(served.data_dir)
    assert (two.parent_id, second.parent_turn_key) == (one.id, one.turn_key)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens


def test_a_call_that_was_changed_is_rendered_as_the_client_has_it(served: ServedGateway) -> None:
    """So is one of another tenant, and one that nobody knows."""
    call = served.post(_ask(f"Rome? [say {SAID}]")).json()["choices"][0]["message"]["tool_calls"][0]
    edited = {**call, "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    foreign = {**call, "id": "call_" + "0" * 32 + "_0"}
    for changed, token in ((edited, ""), (foreign, ""), ({**call, "id": "mine"}, ""), (call, "bob")):
        asked = _ask("Rome?")
        asked["messages"] += [
            {"role": "assistant", "content": "Let me look.", "tool_calls": [changed]},
            {"role": "tool", "tool_call_id": changed["id"], "content": "sunny"},
        ]
        reply = served.post(asked, headers={"Authorization": f"Bearer {token}"} if token else {})
        assert reply.status_code == 200, reply.text
        assert json.loads(served.peer.turns[-1].messages[1].tool_calls) == [changed]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool_choice": "required"}, ("required", "", True)),
        ({"tool_choice": "none"}, ("none", "", True)),
        ({"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, ("required", "get_weather", True)),
        ({"parallel_tool_calls": False}, ("auto", "", False)),
    ],
)
def test_choices_reach_inference(served_once: ServedGateway, fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    with served_once.openai() as client:
        answer = client.chat.completions.create(**_ask(f"[say {SAID}]", **fields))
    tools = served_once.peer.turns[-1].tools
    assert isinstance(tools, Tools)
    assert (tools.choice, tools.name, tools.parallel) == expected
    if expected[0] == "none":  # the tools stay in the prompt; the answer is text, whatever it looks like
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content == SAID


def test_a_call_of_an_undeclared_function_is_text(served_once: ServedGateway) -> None:
    body = served_once.post(_ask('[say <tool_call>{"name": "rm", "arguments": {}}</tool_call>]')).json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["message"]["content"] == '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
    assert "tool_calls" not in body["choices"][0]["message"]
