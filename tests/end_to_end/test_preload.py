"""Same answer whichever part of the history is loaded and which is computed, however it is loaded and saved.

The inference service runs in this process, so that a test can choose for it; the kvdaemon is a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import inference.preload
from benchmarks.stack import Stack
from inference.load_or_compute import Choice
from inference.rates import PrefillRate
from inference.service import InferenceService
from protocol.rpc import RpcClient
from tests.inference.harness import Conversation, Reference, config_for, make_model, run, service, tokens

CHUNK = 64
TEXT = "Tell me of the sea and of the wind. " * 14
Test = Callable[[InferenceService, RpcClient], Awaitable[None]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_context=1536)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture
def daemon(tmp_path: Path, model: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path, model, {"dram": "64MiB", "ssd": 0, "chunk_tokens": CHUNK})
    try:
        stack.start("kvdaemon")
        yield stack
    finally:
        stack.stop()


@contextlib.asynccontextmanager
async def serving(daemon: Stack, model: Path, **overrides: Any) -> AsyncIterator[tuple[InferenceService, RpcClient]]:
    """Nothing is retained on the device: all history comes from the daemon, or is computed."""
    values = {"retain_bytes": 0, "chunk_tokens": CHUNK, **overrides}
    async with service(config_for(model, daemon.run_dir, **values)) as both:
        yield both


async def settled(running: InferenceService) -> None:
    """Wait until all that is computed is saved."""
    assert running.saver is not None
    saver = running.saver
    await until(lambda: saver.backlog == 0)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


@pytest.mark.parametrize("meet_at", [0, CHUNK, 4 * CHUNK, 10_000])
def test_both_ends_meet_anywhere(
    daemon: Stack, model: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch, meet_at: int
) -> None:
    """Load all, both from the two ends, compute all; the account says what was done, and so do the metrics."""

    def meet(borders: Sequence[int], *rest: object) -> Choice:
        return Choice(min(max(borders[0], meet_at), borders[-1]), 1.0, 2.0, 3.0)

    async def test() -> None:
        # So slow that the first step finds most of the history still to be loaded.
        async with serving(daemon, model, link_bandwidth=4_000_000) as (running, client):
            conversation = Conversation(client, running.model)
            first = await conversation.say(TEXT)
            history = first.usage.prompt_tokens + first.usage.completion_tokens - 1
            for text in ("And the stars?", "Go on."):
                await settled(running)
                monkeypatch.setattr(inference.preload, "choose", meet)
                done = await conversation.say(text)
                assert not reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                computed = min(meet_at, history)
                assert done.usage.dram == history - computed
                assert done.usage.missed == ({"computing_was_cheaper": computed} if computed else {})
                history = done.usage.prompt_tokens + done.usage.completion_tokens - 1
            name = "load" if meet_at == 0 else "both" if meet_at < history else "compute"
            assert running.metrics.load_or_compute.labels(name)._value.get() == 2
            assert running.metrics.load_or_compute_seconds.labels("compute")._value.get() == 6.0

    run(test())


def test_a_slow_link_computes_and_a_quick_one_loads(daemon: Stack, model: Path, reference: Reference) -> None:
    """By measured rates alone: over a link of 200 kB/s hardly anything is worth loading; without a limit all of it is,
    where computing costs so much that a loader which got no core for a while is still quicker."""

    async def play(link_bandwidth: int, token_s: float) -> dict[str, int]:
        async with serving(daemon, model, link_bandwidth=link_bandwidth) as (running, client):
            running.rates.prefill = PrefillRate(token_s=token_s)  # what a larger model would take
            running.rates.prefilled = lambda *_: None  # type: ignore[method-assign]
            running.rates.decoded = lambda *_: None  # type: ignore[method-assign]
            conversation = Conversation(client, running.model, bytes([link_bandwidth % 251]))
            await conversation.say(TEXT)
            found = {"dram": 0, "computing_was_cheaper": 0}
            for text in ("And the stars?", "Go on."):
                await settled(running)
                done = await conversation.say(text)
                assert not reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                found["dram"] += done.usage.dram
                found["computing_was_cheaper"] += done.usage.missed.get("computing_was_cheaper", 0)
            return found

    async def test() -> None:
        slow, quick = await play(200_000, 1e-3), await play(0, 20e-3)
        assert slow["computing_was_cheaper"] > slow["dram"]
        assert quick["computing_was_cheaper"] == 0

    run(test())


@pytest.mark.parametrize(
    "settings",
    [{"preload": False}, {"read_buffer_bytes": 0}, {"read_buffer_bytes": 100_000}, {}],
    ids=["no pre-loading", "no buffer", "100 kB", "formula"],
)
def test_however_far_loading_reaches_ahead(
    daemon: Stack, model: Path, reference: Reference, settings: dict[str, Any]
) -> None:
    """Three conversations at once over a slow link: the later ones' histories wait, or are loaded ahead."""

    async def test() -> None:
        async with serving(daemon, model, link_bandwidth=4_000_000, load_or_compute="load", **settings) as (
            running,
            client,
        ):
            conversations = [Conversation(client, running.model, bytes([i])) for i in range(3)]
            for conversation in conversations:
                await conversation.say(TEXT)
            for text in ("And the stars?", "Go on."):
                await settled(running)
                for done in await asyncio.gather(*(each.say(text) for each in conversations)):
                    assert not reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                    assert done.usage.missed == {}
                    assert done.usage.dram > 500

    run(test())


def test_a_turn_cancelled_over_a_slow_link_leaves_nothing(daemon: Stack, model: Path) -> None:
    """Another turn waits behind it without being loaded ahead; both are cancelled, and nothing is held any more."""

    async def test() -> None:
        settings = {"link_bandwidth": 100_000, "load_or_compute": "load", "read_buffer_bytes": 0}
        async with serving(daemon, model) as (running, client):
            conversations = [Conversation(client, running.model, bytes([i])) for i in range(2)]
            for conversation in conversations:
                await conversation.say(TEXT)
            await settled(running)
        async with serving(daemon, model, **settings) as (running, client):
            asked = [asyncio.ensure_future(_again(each, client)) for each in conversations]
            await until(lambda: running.engine.running == 2)
            await asyncio.sleep(0.1)
            for turn in asked:
                turn.cancel()
            await until(lambda: running.engine.running == 0 and running._turns == 0)
            await until(lambda: not running.loader._active)
            await asyncio.to_thread(daemon.wait_metric, "kvdaemon", "cachedattention_leases", 0.0)

    async def _again(conversation: Conversation, client: RpcClient) -> None:
        conversation.client = client
        await conversation.say("And the stars?")

    run(test())


@pytest.mark.parametrize("settings", [{"save": "sync"}, {"write_buffer_bytes": 0}], ids=["sync", "no write buffer"])
def test_a_turn_that_has_no_write_buffer_is_done_when_it_is_saved(
    daemon: Stack, model: Path, settings: dict[str, Any]
) -> None:
    async def test() -> None:
        async with serving(daemon, model, link_bandwidth=4_000_000, **settings) as (running, client):
            conversation = Conversation(client, running.model)
            for text in (TEXT, "And the stars?"):
                done = await conversation.say(text)
                assert running.store is not None
                assert (await running.store.get_manifest(done.turn_key))[0] is not None
                await settled(running)  # the saver's thread lets go of it a moment after it has said so

    run(test())
