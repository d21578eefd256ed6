"""The inference process behind its socket, without a daemon: turns, their limits, and what must not disturb them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

import inference.save
import inference.service
from inference.kernels import attention_kernel
from inference.paged_kv import Pages
from inference.service import InferenceService
from inference.working_kv import Buffers
from protocol import ids
from protocol.codec import MAX_FRAME_BYTES, Frame, encode
from protocol.errors import CapacityError, ContextLengthExceeded, InvalidRequest
from protocol.messages import (
    ChatMessage,
    ForgetTurns,
    GetModel,
    GetWorkingKv,
    Hello,
    ModelInfo,
    RunTurn,
    TurnDelta,
    TurnsForgotten,
    WorkingKv,
)
from protocol.rpc import RpcClient
from tests.inference.harness import Conversation, Reference, make_model, stream, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_context=512)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


BOTH_KINDS = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])

# Greedy answers of the random model meet the end token soon; this one goes on for hundreds of tokens.
LONG = {"temperature": 1.0, "seed": 2, "max_tokens": 400}


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


def fresh(running: InferenceService, text: str, **sampling: Any) -> RunTurn:
    """A turn of a conversation of its own."""
    return Conversation(RpcClient("inproc://unused", "gateway"), running.model).request(text, **sampling)


@BOTH_KINDS
def test_turns_without_a_store_are_right_and_reuse_working_kv(serve: Any, reference: Reference, paged: bool) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        conversation = Conversation(client, running.model)
        history = 0
        for text in ("Tell me of the sea.", "And the wind?", "Ünïcödé 日本 🙂", "The end"):
            done = await conversation.say(text)
            assert not reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
            assert done.usage.hbm >= history
            history = done.usage.prompt_tokens + done.usage.completion_tokens - 1

    serve(test, paged=paged)


def test_no_reuse_computes_everything_and_says_so(serve: Any, reference: Reference) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        conversation = Conversation(client, running.model)
        first = await conversation.say("Tell me of the sea.")
        second = await conversation.say("And the wind?")
        assert not reference.check(tokens(second.prompt_tokens), tokens(second.tokens))
        left_behind = first.usage.prompt_tokens + first.usage.completion_tokens - 1
        assert second.usage.missed == {"reuse_off": left_behind}
        assert second.usage.hbm == 0
        assert len(running.retained) == 0

    serve(test, reuse=False)


def test_tenants_share_nothing(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        mine = Conversation(client, running.model, b"mine")
        yours = Conversation(client, running.model, b"yours")
        await mine.say("The same words. " * 8)
        done = await yours.say("The same words. " * 8)
        assert done.usage.computed == done.usage.prompt_tokens

    serve(test)


@BOTH_KINDS
def test_an_edited_history_is_a_branch(serve: Any, reference: Reference, paged: bool) -> None:
    """Regenerating keeps the prompt's KV, and the first branch goes on undisturbed."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        conversation = Conversation(client, running.model)
        await conversation.say("Tell me of the sea. " * 4)
        asked = conversation.request("And the wind?")
        first, _ = await stream(client, asked)
        again, _ = await stream(client, dataclasses.replace(asked, job_id=ids.new_id()))
        assert again.tokens == first.tokens
        assert again.usage.hbm == again.usage.prompt_tokens - 1
        conversation.accept(first)
        third = await conversation.say("Go on.")
        assert not reference.check(tokens(third.prompt_tokens), tokens(third.tokens))
        assert third.usage.hbm >= first.usage.prompt_tokens

    serve(test, paged=paged)


@BOTH_KINDS
def test_forgotten_turns_are_off_the_device(serve: Any, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their contexts and what is known of them go, others stay, and memory that nobody uses is overwritten."""
    monkeypatch.setattr(inference.save, "GIVE_UP_S", 0.0)  # there is no store: nothing to wait for

    async def test(running: InferenceService, client: RpcClient) -> None:
        erased, kept = (Conversation(client, running.model, tenant) for tenant in (b"erased", b"kept"))
        done = await erased.say("Tell me of the sea. " * 4)
        await kept.say("Tell me of the sea. " * 4)
        held_bytes = running.retained.used_bytes
        kv = await client.request(GetWorkingKv(), WorkingKv, 5)
        assert 0 < kv.retained_bytes <= kv.used_bytes <= kv.capacity_bytes
        assert kv.retained_bytes == held_bytes
        asked = ForgetTurns((done.turn_key, ids.new_id()))
        found = await client.request(asked, TurnsForgotten, 20.0)
        assert (found.contexts, found.unsaved) == (1, 0)
        assert running.retained.used_bytes == held_bytes - found.bytes
        assert running.manifests.get(done.turn_key) is None
        if isinstance(running.buffers, Pages):
            unused = [running.buffers.keys[:, page] for page in running.buffers._free]
        else:
            assert isinstance(running.buffers, Buffers)
            unused = [buffer for held in running.buffers._spare.values() for buffer in held]
        assert unused
        assert not any(memory.any() for memory in unused)
        assert await client.request(asked, TurnsForgotten, 20.0) == TurnsForgotten()
        assert (await erased.say("And the wind?")).usage.hbm == 0
        assert (await kept.say("And the wind?")).usage.hbm > 0

    serve(test, paged=paged)


@BOTH_KINDS
def test_parallel_turns_do_not_change_each_other(serve: Any, reference: Reference, paged: bool) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        texts = [f"Conversation {i}: " + "words " * (i * 9) for i in range(6)]
        results = await asyncio.gather(*(stream(client, fresh(running, text, max_tokens=24)) for text in texts))
        for done, _ in results:
            assert not reference.check(tokens(done.prompt_tokens), tokens(done.tokens))

    serve(test, step_tokens=64, paged=paged)


def test_seeds_repeat_and_stop_strings_end(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        ask = fresh(running, "Hello", temperature=1.0, seed=11, max_tokens=40)
        whole, _ = await stream(client, ask)
        same, _ = await stream(client, dataclasses.replace(ask, job_id=ids.new_id()))
        assert same.tokens == whole.tokens
        stop = whole.text[12:14]
        cut, deltas = await stream(
            client, fresh(running, "Hello", temperature=1.0, seed=11, max_tokens=40, stop=(stop,))
        )
        assert cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert "".join(delta.text for delta in deltas) == cut.text

    serve(test)


def test_a_seed_gives_the_same_beside_others_and_from_any_history(serve: Any) -> None:
    """Drawn with every field at once: alone, in a crowd, with prefill in small pieces, with and without KV at hand."""
    fields = {
        "temperature": 1.3,
        "top_p": 0.95,
        "top_k": 200,
        "min_p": 0.001,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "seed": 17,
        "max_tokens": 40,
    }

    async def test(running: InferenceService, client: RpcClient) -> None:
        asked = [fresh(running, f"Story {i} " + "words " * (5 * i), **{**fields, "seed": i}) for i in range(5)]
        alone = [(await stream(client, turn))[0].tokens for turn in asked]
        assert len(set(alone)) == len(alone)
        for _ in range(2):
            again = (dataclasses.replace(turn, job_id=ids.new_id()) for turn in asked)
            crowd = await asyncio.gather(*(stream(client, turn) for turn in again))
            assert [done.tokens for done, _ in crowd] == alone
        assert crowd[-1][0].usage.hbm
        # A tenant of its own has nothing at hand, and computes it all.
        elsewhere = [dataclasses.replace(t, job_id=ids.new_id(), tenant_salt=b"else") for t in asked]
        assert [(await stream(client, turn))[0].tokens for turn in elsewhere] == alone

    serve(test, step_tokens=32, max_running=8)


def test_tokens_behind_a_stop_string_are_no_part_of_the_conversation(serve: Any, reference: Reference) -> None:
    """The next turn continues the text that the client saw, from the KV of the tokens that made it."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        whole = await Conversation(client, running.model).say("Hello", temperature=1.0, seed=11, max_tokens=40)
        stop = whole.text[12:15]
        conversation = Conversation(client, running.model, b"another")
        cut = await conversation.say("Hello", temperature=1.0, seed=11, max_tokens=40, stop=(stop,))
        assert stop not in cut.text
        second = await conversation.say("And the wind?")
        prompt = tokens(second.prompt_tokens)
        text = running.model.tokenizer.decode(prompt, skip_special_tokens=True)
        assert text == "Hello" + cut.text + "And the wind?"
        assert second.usage.hbm >= cut.usage.prompt_tokens
        assert not reference.check(prompt, tokens(second.tokens))

    serve(test)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_off_turn_goes_on_where_it_stopped(serve: Any, temperature: float) -> None:
    """Given the tokens sampled so far, only what follows is streamed, and the whole answer is the same."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        ask = fresh(running, "Hello", temperature=temperature, seed=5, max_tokens=30)
        whole, deltas = await stream(client, ask)
        for kept in (1, 7, len(deltas) - 1, len(deltas)):
            received = b"".join(delta.tokens for delta in deltas[:kept])
            resumed, rest = await stream(client, dataclasses.replace(ask, job_id=ids.new_id(), resume_tokens=received))
            assert resumed.tokens == whole.tokens
            assert resumed.text == whole.text
            assert received + b"".join(delta.tokens for delta in rest) == whole.tokens
            already = "".join(delta.text for delta in deltas[:kept])
            assert already + "".join(delta.text for delta in rest) == whole.text

    serve(test)


def test_a_cancelled_turn_frees_its_place(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        async with contextlib.aclosing(client.stream(fresh(running, "Hello", **LONG), 60, 60)) as parts:
            async for part in parts:
                if isinstance(part, TurnDelta):
                    break
            assert running.engine.running == 1
        await eventually(lambda: running.engine.running == 0)
        done, _ = await stream(client, fresh(running, "Hello"))
        assert done.usage.completion_tokens > 0

    serve(test, max_running=1)


def test_limits_have_their_errors(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        with pytest.raises(ContextLengthExceeded, match=r"has 6\d\d tokens of its own.* the context holds 512"):
            await stream(client, fresh(running, "x" * 600))
        with pytest.raises(ContextLengthExceeded, match=r"has 6\d\d tokens; the context holds 512"):
            await stream(client, dataclasses.replace(fresh(running, "x" * 600), truncation="disabled"))
        most, _ = await stream(
            client, dataclasses.replace(fresh(running, "x" * 480, max_tokens=0), truncation="disabled")
        )
        assert most.usage.prompt_tokens + most.usage.completion_tokens <= 512
        busy = asyncio.ensure_future(stream(client, fresh(running, "Hello", **LONG)))
        await eventually(lambda: running.engine.running == 1)
        with pytest.raises(CapacityError):
            await stream(client, fresh(running, "Hello"))
        done, _ = await busy
        assert done.usage.completion_tokens > 0

    serve(test, max_running=1)


def test_garbage_on_the_socket_disturbs_nobody(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        turn = asyncio.ensure_future(stream(client, fresh(running, "Hello", **LONG)))
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(running.config.endpoint)
        bad_role = fresh(running, "Hello")
        object.__setattr__(bad_role.messages[0], "role", "oracle")
        hello = Frame("req", 1, Hello(1, "gateway", ids.new_id()))
        for data in (b"", b"\xc1", b"\x00" * 100_000, encode(hello), encode(Frame("req", 2, bad_role))):
            await socket.send(data)
        await socket.send_multipart([b"many", b"parts"])
        await socket.send(bytes(MAX_FRAME_BYTES + 1))
        done, _ = await turn
        assert done.usage.completion_tokens > 0
        socket.close()
        info = await client.request(GetModel(), ModelInfo, 5)
        assert info.max_context == 512

    serve(test)


def test_a_template_that_refuses_is_the_callers_fault(serve: Any) -> None:
    async def test(running: InferenceService, client: RpcClient) -> None:
        turn = fresh(running, "Hello")
        wrong = dataclasses.replace(turn, messages=(ChatMessage("assistant", "x", tool_calls="not json"),))
        with pytest.raises(InvalidRequest, match="chat template refuses"):
            await stream(client, wrong)
        done, _ = await stream(client, turn)
        assert done.text or done.tokens

    serve(test)


def test_no_turn_waits_for_a_compiler(serve: Any) -> None:
    """The kernel for decoding jobs is there when the service is."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        assert attention_kernel.cache_info().currsize == 1
        await stream(client, fresh(running, "Hello"))
        assert attention_kernel.cache_info().misses == 1
        assert attention_kernel.cache_info().hits > 0

    attention_kernel.cache_clear()
    serve(test)


@BOTH_KINDS
def test_a_finished_turns_memory_is_given_back_at_once(
    serve: Any, monkeypatch: pytest.MonkeyPatch, paged: bool
) -> None:
    """No reference cycle keeps working KV alive: it is the next turn's memory."""
    monkeypatch.setattr(inference.save, "GIVE_UP_S", 0.0)

    async def test(running: InferenceService, client: RpcClient) -> None:
        gc.collect()  # what other tests left
        gc.disable()
        try:
            for _ in range(3):
                await stream(client, fresh(running, "Hello " * 20))
                await eventually(lambda: running.saver is not None and running.saver.backlog == 0)
                await eventually(lambda: len(running.retained) == 0)
                await eventually(lambda: running.buffers.used_bytes == 0)
        finally:
            gc.enable()

    serve(test, retain_bytes=0, paged=paged)
