"""Models with sliding windows in conversations of many windows: transformers' answers from memory for few tokens.

The inference service runs in this process, over contiguous and over paged working KV; the kvdaemon is a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import inference.preload
from inference.load_or_compute import Choice
from inference.memory import working_kv_bytes
from inference.model import load_model
from inference.paged_kv import NOT_HELD, PagedKv
from inference.service import InferenceService
from inference.working_kv import Kv, KvShape, WorkingKv
from protocol.ids import new_id
from protocol.messages import TurnDone
from protocol.rpc import RpcClient
from tests.inference.harness import Conversation, Reference, config_for, make_model, run, service, tokens
from tests.kvdaemon.client import DaemonProcess, eventually, running_daemon

_WINDOW, _CHUNK, _CONTEXT = 40, 32, 1024
TEXT = "Tell me of the sea and of the wind. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with a window, and one that sees everything."""
    home = tmp_path_factory.mktemp("model")
    values: dict[str, Any] = {"sliding_window": _WINDOW, "tie_word_embeddings": False}  # tied, it repeats itself
    return make_model(home, "gemma3", max_context=_CONTEXT, seed=2, end_token=259, **values)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path_factory.mktemp("store"), dram_bytes=64 << 20) as daemon:
        yield daemon


@pytest.fixture(params=[False, True], ids=["contiguous", "paged"])
def paged(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def shape_of(model: Path, daemon: DaemonProcess) -> KvShape:
    return load_model(config_for(model, daemon.run_dir)).checked.shape


@contextlib.asynccontextmanager
async def serving(
    daemon: DaemonProcess, model: Path, paged: bool, **overrides: Any
) -> AsyncIterator[tuple[InferenceService, RpcClient]]:
    values = {"chunk_tokens": _CHUNK, "max_context": _CONTEXT, "load_or_compute": "load", "paged": paged, **overrides}
    async with service(config_for(model, daemon.run_dir, **values)) as (running, client):
        await eventually(lambda: running.store is not None and running.store.is_connected, "the store is there")
        yield running, client


async def settled(running: InferenceService) -> None:
    await eventually(lambda: running.saver is not None and running.saver.backlog == 0, "all is saved")
    await eventually(lambda: not running._saving, "all is settled")


def history_of(done: TurnDone) -> int:
    return done.usage.prompt_tokens + done.usage.completion_tokens - 1


def window_bytes(kv: Kv) -> int:
    """What layers with windows take."""
    sliding = [number for number, group in enumerate(kv.shape.groups) if group.window is not None]
    if isinstance(kv, PagedKv):
        tables = [kv.tables[kv.pages.own[number]] for number in sliding]
        return sum(int((table != NOT_HELD).sum()) for table in tables) * kv.pages.page_bytes
    assert isinstance(kv, WorkingKv)
    return sum(kv.rows[number].nbytes for number in sliding)


def test_turns_that_go_on_on_the_device(daemon: DaemonProcess, model: Path, reference: Reference, paged: bool) -> None:
    """History is never loaded, and what is retained of it is the window; the gauge says so. A follow-up finds it."""

    async def test() -> None:
        async with serving(daemon, model, paged) as (running, client):
            conversation = Conversation(client, running.model, new_id())
            history = 0
            for text in (TEXT, "And the stars?", TEXT[:200], "Go on."):
                done = await conversation.say(text, max_tokens=50)
                reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                assert (done.usage.hbm, done.usage.missed) == (history, {})
                history = history_of(done)
                await settled(running)
                running.retained.trim()
                (held,) = (each.kv for each in running.retained._held.values())
                (gauge,) = (sample.value for sample in running.metrics._working_kv.collect()[0].samples)
                assert gauge == running.buffers.used_bytes == held.nbytes
                # The window with what chunks add and room to slide in; or the pages that they lie in.
                most = 3 * 256 if paged else _WINDOW + 3 * _CHUNK
                assert window_bytes(held) <= 2 * most * held.shape.token_bytes // held.shape.layers
            assert history > 15 * _WINDOW

    run(test())


def test_turns_whose_history_is_loaded(daemon: DaemonProcess, model: Path, reference: Reference, paged: bool) -> None:
    async def test() -> None:
        async with serving(daemon, model, paged, retain_bytes=0) as (running, client):
            conversation = Conversation(client, running.model, new_id())
            history = 0
            for text in (TEXT, "And the stars?", TEXT[:200]):
                done = await conversation.say(text, max_tokens=50)
                reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                assert (done.usage.dram, done.usage.missed) == (history, {})
                history = history_of(done)
                await settled(running)

    run(test())


@pytest.mark.parametrize("meet_at", [_CHUNK, 8 * _CHUNK, 13 * _CHUNK, 10_000])
def test_history_that_is_computed_from_the_front(
    daemon: DaemonProcess,
    model: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    paged: bool,
    meet_at: int,
) -> None:
    """While its end is loaded: what is computed has room of its own, whose window moves towards what was loaded."""

    def meet(borders: Sequence[int], *rest: object) -> Choice:
        return Choice(min(max(borders[0], meet_at), borders[-1]), 1.0, 2.0, 3.0)

    async def test() -> None:
        settings = {"retain_bytes": 0, "link_bandwidth": 8_000_000, "load_or_compute": "auto", "step_tokens": 96}
        async with serving(daemon, model, paged, **settings) as (running, client):
            conversation = Conversation(client, running.model, new_id())
            history = history_of(await conversation.say(TEXT))
            for text in ("And the stars?", "Go on."):
                await settled(running)
                monkeypatch.setattr(inference.preload, "choose", meet)
                done = await conversation.say(text)
                reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                computed = min(meet_at, history)
                assert done.usage.missed == {"computing_was_cheaper": computed}
                history = history_of(done)

    run(test())


def test_a_branch_from_before_the_window_comes_from_the_store(
    daemon: DaemonProcess, model: Path, reference: Reference, paged: bool
) -> None:
    """What is retained goes on at its end. Where another answer to an earlier question is asked for, the window there
    is gone from the device, and loaded."""

    async def test() -> None:
        async with serving(daemon, model, paged) as (running, client):
            conversation = Conversation(client, running.model, new_id())
            first = await conversation.say(TEXT)
            said, key, parent = list(conversation.messages), conversation._key, conversation._parent
            await conversation.say(TEXT[:300], max_tokens=60)
            await conversation.say(TEXT[300:], max_tokens=60)
            await settled(running)
            running.retained.trim()
            conversation.messages, conversation._key, conversation._parent = said, key, parent
            conversation._parent_tokens = history_of(first)
            done = await conversation.say("Go on.")
            reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
            assert done.usage.missed == {}
            assert (done.usage.dram > 0) == (done.usage.hbm == 0)
            if not paged:  # one page is longer than that window
                assert done.usage.dram >= history_of(first)

    run(test())


def test_what_a_truncation_leaves(daemon: DaemonProcess, tmp_path: Path, paged: bool) -> None:
    """Of a model of one layer, with a window: as if what is left had been computed anew, over two truncations."""
    values: dict[str, Any] = {"num_hidden_layers": 1, "seed": 5, "end_token": 259, "sliding_window": _WINDOW}
    single = make_model(tmp_path / "model", "mistral", max_context=512, **values)
    reference = Reference(single)

    async def test() -> None:
        async with serving(daemon, single, paged, max_context=512) as (running, client):
            conversation = Conversation(client, running.model, new_id())
            dropped = []
            for text in (TEXT[:350], "And the stars?", TEXT[:150], "Go on.", TEXT[:200], "And then?"):
                done = await conversation.say(text, max_tokens=40)
                assert not done.usage.missed
                reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                dropped.append(done.dropped_tokens)
                await settled(running)
            assert len(set(dropped)) >= 3

    run(test())


def test_turns_that_are_preempted_come_back(
    daemon: DaemonProcess, model: Path, reference: Reference, paged: bool
) -> None:
    """Answers outgrow memory; those that give way are saved, loaded and go on. Then all ask again."""

    async def test() -> None:
        one = working_kv_bytes(None, 1 << 40, shape_of(model, daemon), _CONTEXT, 1, 0, 256 if paged else None)
        async with serving(daemon, model, paged, working_kv_bytes=one, retain_bytes=0) as (running, client):
            conversations = [Conversation(client, running.model, new_id()) for _ in range(6)]
            for text, answer in ((TEXT[:250], 300), ("Go on.", 20)):
                said = (each.say(f"{i} {text}", max_tokens=answer) for i, each in enumerate(conversations))
                for done in await asyncio.gather(*said):
                    reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                await settled(running)
            assert running.engine.stats.preemptions > 0
            assert running.buffers.used_bytes == 0

    run(test(), 300)


@pytest.mark.parametrize("window", [None, _WINDOW])
def test_memory_admits_more_turns(daemon: DaemonProcess, tmp_path: Path, paged: bool, window: int | None) -> None:
    """Turns with long histories that wait for one another run side by side where every layer has a window."""
    values: dict[str, Any] = {"seed": 5, "end_token": 259, "sliding_window": window}
    single = make_model(tmp_path / "model", "mistral", max_context=_CONTEXT, **values)
    reference = Reference(single)

    async def test() -> None:
        one = working_kv_bytes(None, 1 << 40, shape_of(single, daemon), _CONTEXT, 1, 0, 256 if paged else None)
        async with serving(daemon, single, paged, working_kv_bytes=one, retain_bytes=0) as (running, client):
            conversations = [Conversation(client, running.model, new_id()) for _ in range(4)]
            for conversation in conversations:
                await conversation.say(TEXT + TEXT[:250], max_tokens=2)
            await settled(running)
            turns = [asyncio.ensure_future(each.say("Go on.", max_tokens=150)) for each in conversations]
            most = 0
            while not all(turn.done() for turn in turns):
                most = max(most, running.engine.running)
                await asyncio.sleep(0.001)
            for turn in turns:
                done = turn.result()
                reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
                assert done.usage.dram > 600
            assert most == 1 if window is None else most >= 2

    run(test())
