"""/v1/responses over real HTTP, driven by the official client: histories that the server keeps."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI
from openai.types.responses import Response

from protocol.messages import ChatMessage
from tests.gateway.inference_peer import MODEL, answer_to, render
from tests.gateway.serving import ServedGateway, eventually, journaled


def create(client: OpenAI, said: Any, **fields: Any) -> Response:
    return client.responses.create(model=MODEL, input=said, **fields)


def asked(served: ServedGateway) -> list[tuple[str, str]]:
    """What the last turn's model saw."""
    return [(message.role, message.content) for message in served.peer.turns[-1].messages]


def test_a_response_has_openais_shape(served: ServedGateway) -> None:
    with served.openai() as client:
        answer = create(client, "tell me a story", metadata={"topic": "tales"}, max_output_tokens=100, temperature=0.5)
        strict = Response.model_validate(answer.model_dump(), strict=False)
    assert strict.output_text == "You said: tell me a story ✓"
    assert (answer.object, answer.status, answer.model) == ("response", "completed", MODEL)
    assert (answer.metadata, answer.max_output_tokens, answer.temperature) == ({"topic": "tales"}, 100, 0.5)
    assert answer.completed_at is not None
    assert answer.completed_at >= answer.created_at
    (item,) = answer.output
    assert (item.type, item.status) == ("message", "completed")
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens == len(render([ChatMessage("user", "tell me a story")]))
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    ours = usage.model_dump()["cachedattention"]
    assert ours["computed"] == usage.input_tokens
    assert ours["ttft_s"] > 0
    assert served.peer.turns[0].sampling.max_tokens == 100


def test_previous_response_id_brings_the_history(served: ServedGateway) -> None:
    """The client sends only what is new; everything before comes from the journal, and hits."""
    with served.openai() as client:
        first = create(client, "one")
        second = create(client, "two", previous_response_id=first.id)
        branch = create(client, "other", previous_response_id=first.id)
        assert asked(served) == [("user", "one"), ("assistant", first.output_text), ("user", "other")]
        create(client, "three", previous_response_id=second.id)
    assert [text for _, text in asked(served)] == ["one", first.output_text, "two", second.output_text, "three"]
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens - 1
    assert second.previous_response_id == first.id
    one, two, other, three = journaled(served.data_dir)
    assert two.parent_id == other.parent_id == one.id
    assert three.parent_id == two.id
    assert len({turn.conversation_id for turn in (one, two, other, three)}) == 1
    assert branch.id != second.id


def test_instructions_are_for_one_response_only(served: ServedGateway) -> None:
    with served.openai() as client:
        first = create(client, "one", instructions="be brief")
        assert asked(served)[0] == ("system", "be brief")
        second = create(client, "two", previous_response_id=first.id)
        assert asked(served)[0] == ("user", "one")
        third = create(client, "two", previous_response_id=first.id, instructions="be brief")
        assert asked(served)[0] == ("system", "be brief")
        assert client.responses.retrieve(first.id).instructions == "be brief"
    assert [len(turn.messages) for turn in journaled(served.data_dir)] == [1, 1, 1]
    assert first.usage is not None
    assert third.usage is not None
    assert third.usage.input_tokens_details.cached_tokens == first.usage.total_tokens - 1
    assert second.instructions is None


def test_retrieve_delete_and_input_items(served: ServedGateway) -> None:
    with served.openai() as client:
        first = create(client, "one")
        second = create(client, "two", previous_response_id=first.id)
        again = client.responses.retrieve(second.id)
        assert again.output_text == second.output_text
        assert again.usage == second.usage
        assert (again.status, again.previous_response_id) == ("completed", first.id)
        items = client.responses.input_items.list(second.id, order="asc", limit=2)
        assert [item.type for item in items.data] == ["message", "message"]
        assert items.has_more
        everything = [
            item.content[0].text for item in client.responses.input_items.list(second.id, limit=1, order="asc")
        ]
        assert everything == ["one", first.output_text, "two"]
        client.responses.delete(first.id)
        for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(NotFoundError):
                call(first.id)
        with pytest.raises(NotFoundError):
            create(client, "x", previous_response_id=first.id)
        # The one that continues it still knows what was said.
        create(client, "three", previous_response_id=second.id)
        assert len(asked(served)) == 5
        assert len(journaled(served.data_dir)) == 3


def test_deleted_text_goes_when_nothing_continues_it(served: ServedGateway) -> None:
    with served.openai() as client:
        first = create(client, "one")
        second = create(client, "two", previous_response_id=first.id)
        client.responses.delete(first.id)
        assert len(journaled(served.data_dir)) == 2
        client.responses.delete(second.id)
    assert journaled(served.data_dir) == []


def test_what_is_not_stored_is_not_in_the_journal(served: ServedGateway) -> None:
    """Its keys are, so that a client that sends the history itself still hits."""
    with served.openai() as client:
        first = create(client, "a secret", store=False)
        assert first.store is False
        with pytest.raises(NotFoundError):
            client.responses.retrieve(first.id)
        with pytest.raises(NotFoundError):
            create(client, "x", previous_response_id=first.id)
        history = [
            {"role": "user", "content": "a secret"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "more"},
        ]
        second = create(client, history, store=False)
        assert second.usage is not None
        assert second.usage.input_tokens_details.cached_tokens > 0
        for name in ("journal.sqlite", "journal.sqlite-wal"):
            assert b"a secret" not in (served.data_dir / name).read_bytes()
        stored = create(client, history)
    last = journaled(served.data_dir)[-1]
    assert f"resp_{last.id.hex()}" == stored.id
    assert len(last.messages) == 3  # it can be read without the ones before


def test_items_of_every_kind(served: ServedGateway) -> None:
    given = [
        {"role": "developer", "content": "be kind"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "wea"}, {"type": "input_text", "text": "ther?"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"b":1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "warm"}]},
    ]
    with served.openai() as client:
        answer = create(client, given)
        items = list(client.responses.input_items.list(answer.id, order="asc"))
    system, user, call, first, second = served.peer.turns[-1].messages
    assert (system, user) == (ChatMessage("system", "be kind"), ChatMessage("user", "weather?"))
    assert [one["id"] for one in json.loads(call.tool_calls)] == ["c1", "c2"]
    assert (first.tool_call_id, first.content) == ("c1", "sunny")
    assert (second.tool_call_id, second.content) == ("c2", "warm")
    assert [item.type for item in items] == [
        "message",
        "message",
        "function_call",
        "function_call",
        "function_call_output",
        "function_call_output",
    ]
    assert len({item.id for item in items}) == 6


def test_a_stream_has_openais_events(served: ServedGateway) -> None:
    with served.openai() as client:
        stream = client.responses.create(
            model=MODEL, input="tell", stream=True, include=["message.output_text.logprobs"], top_logprobs=1
        )
        events = list(stream)
        stored = client.responses.retrieve(events[0].response.id)  # type: ignore[union-attr]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.completed"
    assert text == last.response.output_text == stored.output_text == "You said: tell ✓"
    assert events[0].type == "response.created"
    assert (events[0].response.status, events[0].response.usage) == ("in_progress", None)
    assert {event.item_id for event in events if event.type == "response.output_text.delta"} == {
        last.response.output[0].id
    }
    found = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert len(found) == len(text.encode())


def test_the_streaming_helper_puts_the_answer_together(served: ServedGateway) -> None:
    with served.openai() as client, client.responses.stream(model=MODEL, input="tell") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "You said: tell ✓"
    assert kinds[-1] == "response.completed"


def test_an_answer_that_was_cut_is_incomplete(served: ServedGateway) -> None:
    with served.openai() as client:
        answer = create(client, "tell", max_output_tokens=3)
        assert (answer.status, answer.output_text) == ("incomplete", "You")
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert client.responses.retrieve(answer.id).status == "incomplete"
        *_, last = client.responses.create(model=MODEL, input="tell", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_a_stream_that_breaks_ends_with_failed(served: ServedGateway) -> None:
    with served.openai() as client:
        *_, last = client.responses.create(model=MODEL, input="tell [break 3]", stream=True)
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert last.response.output_text == "You"
        found = client.responses.retrieve(last.response.id)
    assert (found.status, found.output_text) == ("failed", "You")


def test_a_conversation_is_continued_by_its_id(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation = client.conversations.create(
            items=[{"type": "message", "role": "user", "content": "I am Ada"}], metadata={"a": "b"}
        )
        first = create(client, "hello", conversation=conversation.id)
        assert first.conversation is not None
        assert first.conversation.id == conversation.id
        second = create(client, "again", conversation={"id": conversation.id})
        assert [text for _, text in asked(served)] == ["I am Ada", "hello", first.output_text, "again"]
        said = [item.content[0].text for item in client.conversations.items.list(conversation.id, order="asc")]  # type: ignore[union-attr]
        assert said == ["I am Ada", "hello", first.output_text, "again", second.output_text]
        with pytest.raises(NotFoundError):
            create(client, "x", conversation="conv_" + "0" * 32)


def test_a_conversation_takes_one_turn_at_a_time(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation = client.conversations.create()
        served.set_hold(True)
        with client.responses.create(model=MODEL, input="one", conversation=conversation.id, stream=True) as stream:
            next(stream)
            with pytest.raises(ConflictError) as caught:
                create(client, "two", conversation=conversation.id)
            assert caught.value.code == "conversation_locked"
            with pytest.raises(ConflictError):
                client.conversations.delete(conversation.id)
            served.set_hold(False)
            list(stream)
        create(client, "two", conversation=conversation.id)
    assert len(asked(served)) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncation": "sometimes"}, "truncation"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "tools"),
        (
            {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"store": False, "conversation": "conv_" + "0" * 32}, "store"),
        ({"previous_response_id": "resp_1", "conversation": "conv_1"}, "previous_response_id"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": [{"type": "image"}]}, "input.list[tagged-union][0]"),
        ({"input": None}, "input"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ],
)
def test_bad_fields_are_named(served_once: ServedGateway, fields: dict[str, Any], param: str) -> None:
    reply = httpx.post(f"{served_once.url}/v1/responses", json={"model": MODEL, "input": "x"} | fields, timeout=30.0)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(param.split(".list")[0])


# -- tools -------------------------------------------------------------------------------------------------------

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome",  "days": 2}}\n</tool_call>'
SAID = f"Let me look.\n{CALL}"


def test_a_call_and_its_result_go_back_and_forth(served: ServedGateway) -> None:
    """The function is called as OpenAI tells it, and the turn with its result continues the model's own words."""
    with served.openai() as client:
        called = create(client, f"Rome? [say {SAID}\n{CALL}]", tools=[WEATHER], tool_choice="required")
        said, first, second = Response.model_validate(called.model_dump(), strict=False).output
        assert (said.type, called.output_text) == ("message", "Let me look.")
        assert first.type == second.type == "function_call"
        assert (first.name, json.loads(first.arguments)) == ("get_weather", {"city": "Rome", "days": 2})
        assert first.call_id != second.call_id
        assert len({said.id, first.id, second.id}) == 3
        assert (called.status, called.tool_choice, called.parallel_tool_calls) == ("completed", "required", True)
        assert [tool.model_dump(exclude_none=True) for tool in called.tools] == [WEATHER]
        assert client.responses.retrieve(called.id).output == called.output
        result = {"type": "function_call_output", "call_id": first.call_id, "output": "sunny"}
        create(client, [result], previous_response_id=called.id, tools=[WEATHER])
        items = list(client.responses.input_items.list(called.id, order="asc"))
    one, two = served.peer.turns
    assert one.tools is not None
    (function,) = json.loads(one.tools.functions)
    assert function == {"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}
    assert (one.tools.choice, two.tools and two.tools.choice) == ("required", "auto")
    assert two.messages[1:] == (
        ChatMessage("assistant", f"{SAID}\n{CALL}"),
        ChatMessage("tool", "sunny", tool_call_id=first.call_id),
    )
    assert [item.type for item in items] == ["message"]
    asked, answered = journaled(served.data_dir)
    assert (answered.parent_id, two.parent_turn_key) == (asked.id, asked.turn_key)


def test_a_streamed_call_has_openais_events(served: ServedGateway) -> None:
    with served.openai() as client:
        with client.responses.stream(model=MODEL, input=f"Rome? [say {SAID} so]", tools=[WEATHER]) as stream:
            events = list(stream)
            final = stream.get_final_response()
        stored = client.responses.retrieve(final.id)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    text = ["response.output_item.added", "response.content_part.added"]
    end = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        *text,
        *end,
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        *text,
        *end,
        "response.completed",
    ]
    told = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.model_dump(exclude={"parsed_arguments"}) for item in told] == [
        item.model_dump(exclude={"parsed_arguments"}) for item in stored.output
    ]
    assert [item.type for item in final.output] == ["message", "function_call", "message"]
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1, 2]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert (done.name, done.item_id) == ("get_weather", told[1].id)
    assert json.loads(done.arguments) == {"city": "Rome", "days": 2}
    assert final.output_text == "Let me look.so"


def test_a_call_that_comes_back_as_an_item_is_what_the_model_wrote(served: ServedGateway) -> None:
    """A client that keeps the history itself sends calls back; all of their KV is reused, however JSON was spaced."""
    question = {"role": "user", "content": f"Rome? [say {SAID}]"}
    with served.openai() as client:
        called = create(client, [question], tools=[WEATHER])
        call = called.output[-1]
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        again = create(client, [question, *called.model_dump()["output"], result], tools=[WEATHER])
    assert served.peer.turns[1].messages[1] == ChatMessage("assistant", SAID)
    one, two = journaled(served.data_dir)
    assert two.parent_id == one.id
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens


def test_none_is_called_where_none_may_be(served: ServedGateway) -> None:
    """The tools stay in the prompt; the answer is text, whatever it looks like."""
    with served.openai() as client:
        answer = create(client, f"[say {SAID}]", tools=[WEATHER], tool_choice="none", parallel_tool_calls=False)
        assert client.responses.retrieve(answer.id).output == answer.output
    assert (answer.output_text, answer.tool_choice, answer.parallel_tool_calls) == (SAID, "none", False)
    tools = served.peer.turns[-1].tools
    assert tools is not None
    assert (tools.choice, tools.parallel) == ("none", False)


def test_truncation_is_passed_on_repeated_and_told(served: ServedGateway) -> None:
    """Auto unless told otherwise; what the context has lost is reported, streamed or not."""
    with served.openai() as client:
        whole = create(client, "x", truncation="disabled")
        truncated = create(client, "x [dropped 3]")
        *_, last = create(client, "y [dropped 5]", stream=True)
        found = [whole, truncated, last.response, client.responses.retrieve(truncated.id)]
    assert [turn.truncation for turn in served.peer.turns] == ["disabled", "auto", "auto"]
    assert [response.truncation for response in found] == ["disabled", "auto", "auto", "auto"]
    told = [(response.usage.cachedattention, response.usage.total_tokens) for response in found[:3]]
    assert [(parts["dropped"], parts["kept"]) for parts, _ in told] == [
        (0, []),
        (3, [[3, told[1][1]]]),
        (5, [[5, told[2][1]]]),
    ]


def test_a_schema_reaches_inference(served: ServedGateway) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
    with served.openai() as client:
        create(client, "x", text={"format": {"type": "json_schema", "name": "s", "schema": schema}})
    assert json.loads(served.peer.turns[-1].sampling.json_schema) == schema


def test_another_tenant_finds_nothing(served: ServedGateway) -> None:
    with served.openai() as client, OpenAI(base_url=f"{served.url}/v1", api_key="sk-other", max_retries=0) as other:
        first = create(client, "one")
        conversation = client.conversations.create()
        for call in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
            with pytest.raises(NotFoundError):
                call(first.id)
        with pytest.raises(NotFoundError):
            create(other, "two", previous_response_id=first.id)
        with pytest.raises(NotFoundError):
            create(other, "two", conversation=conversation.id)
        with pytest.raises(NotFoundError):
            other.conversations.retrieve(conversation.id)


def test_a_client_that_leaves_cancels_its_response(served: ServedGateway) -> None:
    with served.openai() as client:
        with client.responses.create(model=MODEL, input="tell [slow 0.05]", stream=True) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    break
        (turn,) = eventually(lambda: [t for t in journaled(served.data_dir) if t.status == "cancelled"])
        found = client.responses.retrieve(f"resp_{turn.id.hex()}")
    assert found.status == "cancelled"
    assert answer_to([ChatMessage("user", "tell")]).decode().startswith(found.output_text)


def test_errors_before_the_start_have_a_status(served: ServedGateway) -> None:
    with served.openai() as client, pytest.raises(BadRequestError) as caught:
        create(client, "x [fail context_length_exceeded]", stream=True)
    assert caught.value.code == "context_length_exceeded"
