"""Tools and raw prompts through a whole inference service: rendered, called, reused; tokens and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gateway.tool_calls import read_answer
from protocol import ids
from protocol.errors import InvalidRequest
from protocol.ids import pack_tokens, unpack_tokens
from protocol.messages import (
    ChatMessage,
    Detokenize,
    Detokenized,
    Prompt,
    RunTurn,
    Sampling,
    Tokenize,
    Tokenized,
    Tools,
)
from tests.inference.harness import Conversation, Reference, config_for, make_model, run, service, stream, tokens

# As Qwen's: tools in the system prompt, calls rendered anew, results of tools in a role of their own.
TEMPLATE = (
    "{%- if tools -%}<|system|>You may call: {% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "as <tool_call>.<|end|>{%- endif -%}"
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] -%}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>"
    "{%- endfor -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Weather", "parameters": SCHEMA, "strict": True}
FUNCTIONS = json.dumps([{"type": "function", "function": FUNCTION}])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model(tmp_path_factory.mktemp("tools") / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def test_a_demanded_call_and_its_result_reuse_everything(model: Path, tmp_path: Path) -> None:
    """The call is of good form; the turn with the result finds all that the turn before computed."""

    async def play() -> None:
        async with service(config_for(model, tmp_path / "run")) as (running, client):
            assert running.model.tool_format == "hermes"
            conversation = Conversation(client, running.model)
            tools = Tools(FUNCTIONS, "required", parallel=False)
            request = dataclasses.replace(conversation.request("Weather in Rome?", max_tokens=120), tools=tools)
            called, _ = await stream(client, request)
            assert called.finish_reason == "stop"
            text, (call,) = read_answer(called.text, "hermes", {"get_weather"})
            assert (text, call.name) == ("", "get_weather")
            assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
            rendered = running.model.tokenizer.decode(tokens(called.prompt_tokens))
            assert '"name": "get_weather", "description": "Weather"' in rendered
            assert "strict" not in rendered, "that is not for the model's eyes"
            conversation.accept(called)
            # As the gateway sends it: the model's own words, and the tool's.
            key = conversation._key
            result = ChatMessage("tool", "Sunny.", tool_call_id="c")
            after = ids.turn_key(key, ids.Message("tool", "Sunny.", tool_call_id="c"))
            free = dataclasses.replace(
                conversation.request("?", max_tokens=8),
                messages=(*conversation.messages[:-1], result),
                request_key=after,
                tools=dataclasses.replace(tools, choice="auto", parallel=True),
            )
            done, _ = await stream(client, free)
            assert done.usage.missed == {}
            left_behind = called.usage.prompt_tokens + called.usage.completion_tokens - 1
            assert done.usage.hbm >= left_behind - 1  # the end token is rendered, not what was sampled
            # Rendered from calls, an edited one say, it is another text, and what differs is computed.
            calls = [{"id": "c", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}]
            theirs = ChatMessage("assistant", "", tool_calls=ids.canonical_json(calls))
            told = dataclasses.replace(free, job_id=ids.new_id(), messages=(free.messages[0], theirs, result))
            rendered_done, _ = await stream(client, told)
            assert tokens(rendered_done.prompt_tokens) == tokens(done.prompt_tokens)

    run(play())


def test_impossible_tools_are_the_callers_fault(model: Path, tmp_path: Path) -> None:
    async def play() -> None:
        plain = make_model(tmp_path / "plain", "llama")
        async with service(config_for(plain, tmp_path / "run-plain")) as (running, client):
            request = Conversation(client, running.model).request("x")
            with pytest.raises(InvalidRequest, match="knows no tools"):
                await stream(client, dataclasses.replace(request, tools=Tools(FUNCTIONS)))
        async with service(config_for(model, tmp_path / "run")) as (running, client):
            request = Conversation(client, running.model).request("x")
            bad = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {"type": "colour"}}}])
            with pytest.raises(InvalidRequest) as refused:
                await stream(client, dataclasses.replace(request, tools=Tools(bad, "required")))
            assert refused.value.param == "tools"

    run(play())


def test_raw_prompts_go_on_as_transformers_would(model: Path, tmp_path: Path) -> None:
    """Text and token ids give the same answer, greedy float32, with nothing of a template around them."""
    reference = Reference(model)

    def request(prompt: Prompt, **sampling: Any) -> RunTurn:
        return RunTurn(
            job_id=ids.new_id(),
            messages=(ChatMessage("user", prompt.text),),
            request_key=ids.digest("test", prompt.text.encode(), prompt.tokens),
            tenant_salt=b"t",
            sampling=Sampling(temperature=0.0, max_tokens=12, **sampling),
            return_prompt_tokens=True,
            prompt=prompt,
        )

    async def play() -> None:
        async with service(config_for(model, tmp_path / "run")) as (running, client):
            text = "Once upon a time, " * 20
            found: list[Sequence[int]] = []
            for prompt in (Prompt(text), Prompt("ignored", pack_tokens(running.model.tokenizer(text).input_ids))):
                done, _ = await stream(client, request(prompt))
                assert tokens(done.prompt_tokens) == running.model.tokenizer(text).input_ids
                reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                found.append(tokens(done.tokens))
            assert found[0] == found[1]
            assert done.usage.hbm > len(text) - 2
            for bad in (Prompt(""), Prompt("", pack_tokens([10**6]))):
                with pytest.raises(InvalidRequest) as refused:
                    await stream(client, request(bad))
                assert refused.value.param == "prompt"

    run(play())


def test_a_turn_that_is_not_to_be_stored_is_not(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        async with service(config_for(model, tmp_path / "run")) as (running, client):
            assert running.saver is not None
            begun: list[object] = []
            begin = running.saver.begin
            monkeypatch.setattr(running.saver, "begin", lambda save: (begun.append(save), begin(save))[1])
            for save in (False, True):
                request = Conversation(client, running.model).request(f"save {save}")
                await stream(client, dataclasses.replace(request, save=save))
                assert len(begun) == save

    run(play())


def test_tokens_and_back(model: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with service(config_for(model, tmp_path / "run")) as (running, client):
            text = "Grüße ✓"
            found = await client.request(Tokenize(text, want_strings=True), Tokenized, 30)
            assert unpack_tokens(found.tokens).tolist() == running.model.tokenizer(text).input_ids
            assert len(found.strings) == len(found.tokens) // 4
            assert (await client.request(Detokenize(found.tokens), Detokenized, 30)).text == text
            request = Conversation(client, running.model).request("Hello")
            asked = Tokenize(messages=request.messages, tools=FUNCTIONS)
            rendered = await client.request(asked, Tokenized, 30)
            done, _ = await stream(client, dataclasses.replace(request, tools=Tools(FUNCTIONS, "none")))
            assert rendered.tokens == done.prompt_tokens
            with pytest.raises(InvalidRequest, match="no token"):
                await client.request(Detokenize(pack_tokens([10**6])), Detokenized, 30)

    run(play())
