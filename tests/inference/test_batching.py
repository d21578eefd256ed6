"""Many turns at once, in little memory: each gets the answer that it gets alone, and memory keeps to its bound."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference.memory import working_kv_bytes
from inference.paged_kv import Pages
from inference.service import InferenceService
from inference.working_kv import context_bytes
from protocol import ids
from protocol.errors import ConfigError
from protocol.messages import RunTurn, TurnDelta
from protocol.rpc import RpcClient
from tests.inference.harness import Conversation, Reference, config_for, make_model, run, service, stream, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_context=768, seed=3, end_token=259)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def mix(running: InferenceService, seed: int, count: int) -> list[RunTurn]:
    """Turns of conversations of their own: short and long prompts, short and long answers, greedy and not."""
    chance = random.Random(seed)
    turns = []
    for i in range(count):
        text = f"{i}: " + "".join(chance.choice("abcdefgh ") for _ in range(chance.choice((5, 60, 200, 320))))
        sampling: dict[str, Any] = {"max_tokens": chance.choice((1, 20, 100, 300))}
        if i % 4 == 3:
            sampling |= {"temperature": 1.1, "seed": i, "top_p": 0.9, "frequency_penalty": 0.2}
        conversation = Conversation(RpcClient("inproc://unused", "gateway"), running.model)
        turns.append(dataclasses.replace(conversation.request(text, **sampling), order=chance.randrange(5)))
    return turns


async def play(client: RpcClient, turns: list[RunTurn], seed: int) -> list[list[int]]:
    """All turns at once, arriving over a moment; each streams what it answers."""
    chance = random.Random(seed)

    async def one(turn: RunTurn, delay_s: float) -> list[int]:
        await asyncio.sleep(delay_s)
        done, deltas = await stream(client, dataclasses.replace(turn, job_id=ids.new_id(), tenant_salt=ids.new_id()))
        assert b"".join(delta.tokens for delta in deltas) == done.tokens
        assert "".join(delta.text for delta in deltas) == done.text
        return tokens(done.tokens)

    return await asyncio.gather(*(one(turn, chance.random() * 0.05) for turn in turns))


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


def contexts(running: InferenceService, count: float) -> int:
    return int(count * context_bytes(running.buffers.shape, running.model.max_context))


@pytest.mark.parametrize("room", [None, 1.6, 1.0], ids=["all fit", "some fit", "one fits"])
def test_answers_do_not_depend_on_who_else_is_there(serve: Any, reference: Reference, room: float | None) -> None:
    """Alone, in a crowd, and preempted again and again: the same tokens, and greedy ones are transformers' own."""
    excused = 0

    async def test(running: InferenceService, client: RpcClient) -> None:
        nonlocal excused
        turns = mix(running, 1, 10)
        alone = [(await stream(client, dataclasses.replace(t, tenant_salt=ids.new_id())))[0] for t in turns]
        for turn, done in zip(turns, alone, strict=True):
            if turn.sampling.temperature == 0:
                excused += reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
        if room is not None:
            while running.retained.let_go():
                pass
            running.buffers.capacity_bytes = contexts(running, room)
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, running.buffers.used_bytes)
                await asyncio.sleep(0.005)

        watching = asyncio.ensure_future(watch())
        crowd = await play(client, turns, 2)
        watching.cancel()
        assert crowd == [tokens(done.tokens) for done in alone]
        assert most > 0
        if room is not None:
            assert running.engine.stats.preemptions > 0
            assert most <= contexts(running, room)

    serve(test, step_tokens=96, retain_bytes=0, reuse=False)
    assert excused <= 1


def test_answers_from_pages_do_not_depend_on_who_else_is_there(serve: Any, reference: Reference) -> None:
    """The same in pages, hardly more than one context has: who is preempted answers as alone, and as transformers."""
    excused = 0

    async def test(running: InferenceService, client: RpcClient) -> None:
        nonlocal excused
        assert isinstance(running.buffers, Pages)
        turns = [
            Conversation(client, running.model).request(f"{name * 90}?", max_tokens=330 if name < "d" else 40)
            for name in "abcdef"
        ]
        crowd = await play(client, turns, 2)
        assert running.engine.stats.preemptions > 0
        await eventually(lambda: running.buffers.used_bytes == 0)
        for turn, sampled in zip(turns, crowd, strict=True):
            done, _ = await stream(client, dataclasses.replace(turn, job_id=ids.new_id(), tenant_salt=ids.new_id()))
            assert tokens(done.tokens) == sampled
            excused += reference.check(tokens(done.prompt_tokens), sampled)

    page_bytes = 256 * 3 * 2 * 2 * 32 * 4
    serve(test, step_tokens=96, retain_bytes=0, reuse=False, paged=True, working_kv_bytes=6 * page_bytes)
    assert excused <= 1


def test_the_last_in_order_gives_way(serve: Any) -> None:
    """Two long answers that do not fit together: the one that is earlier in order never stops."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        running.buffers.capacity_bytes = contexts(running, 1.3)
        conversations = [Conversation(client, running.model, ids.new_id()) for _ in range(2)]
        late, early = (
            dataclasses.replace(conversation.request("x" * 120, max_tokens=500), order=order)
            for conversation, order in zip(conversations, (7, 3), strict=True)
        )
        finished: list[int] = []
        begun = asyncio.Event()

        async def one(turn: RunTurn) -> None:
            async for part in client.stream(turn, 100, 100):
                if isinstance(part, TurnDelta):
                    begun.set()
            finished.append(turn.order)

        tasks = [asyncio.ensure_future(one(late))]
        await begun.wait()
        tasks.append(asyncio.ensure_future(one(early)))
        await asyncio.gather(*tasks)
        assert running.engine.stats.preemptions > 0
        assert finished == [3, 7]

    serve(test, reuse=False)


def test_a_preempted_turn_may_be_cancelled(serve: Any) -> None:
    """While it waits for memory, nothing of it is left but its place."""

    async def test(running: InferenceService, client: RpcClient) -> None:
        running.buffers.capacity_bytes = contexts(running, 1.0)
        first = Conversation(client, running.model, ids.new_id()).request("x" * 120, max_tokens=600)
        second = dataclasses.replace(
            Conversation(client, running.model, ids.new_id()).request("y" * 300, max_tokens=300), order=1
        )
        running_first = asyncio.ensure_future(stream(client, first))
        running_second = asyncio.ensure_future(stream(client, second))
        await eventually(lambda: len(running.admission) == 1)
        running_second.cancel()
        await asyncio.gather(running_second, return_exceptions=True)
        done, _ = await running_first
        assert done.usage.completion_tokens == 600
        await eventually(lambda: running.buffers.used_bytes == 0)
        assert (running.engine.running, len(running.admission)) == (0, 0)

    serve(test, reuse=False)


def test_working_kv_holds_at_least_one_context(model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(ConfigError, match=r"working_kv: a context of 768 tokens takes \d+ bytes, and 100000 were"):
            async with service(config_for(model, tmp_path / "run", working_kv_bytes=100_000)):
                pass

    run(test())


def test_working_kv_is_half_of_what_is_free_unless_less_is_enough() -> None:
    from tests.inference.test_working_kv import SHAPE

    one = context_bytes(SHAPE, 1000)
    assert working_kv_bytes(None, 10 * one, SHAPE, 1000, 8, 0) == 5 * one
    assert working_kv_bytes(None, 100 * one, SHAPE, 1000, 8, one) == 9 * one
    assert working_kv_bytes(one, 0, SHAPE, 1000, 8, 0) == one
    with pytest.raises(ConfigError, match="50% of the free memory; give more, or lower max_context to about 500"):
        working_kv_bytes(None, one, SHAPE, 1000, 8, 0)
