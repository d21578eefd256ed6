"""Conversations that outgrow the window, through inference and a real daemon.

In a model of one layer a key depends on its own token alone, so there, and only there, what is left of a context after
a truncation answers exactly as if it had been computed anew, and transformers can tell what is right.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.service import InferenceService
from protocol.ids import new_id, unpack_tokens
from protocol.messages import Manifest, TurnDelta, TurnDone, TurnStarted
from protocol.rpc import RpcClient
from tests.inference.harness import Conversation, Reference, config_for, make_model, run, service, stream, tokens
from tests.kvdaemon.client import (
    DaemonProcess,
    Kv,
    StoreClient,
    assert_equal,
    eventually,
    running_daemon,
    written_behind,
)

_WINDOW, _CHUNK, _ANSWER = 512, 32, 12
_STEP = _WINDOW // 2
_ROOM = _ANSWER


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_layer(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path_factory.mktemp("store"), dram_bytes=64 << 20) as daemon:
        yield daemon


def one_layer(directory: Path, family: str) -> Path:
    layers: dict[str, Any] = {"num_hidden_layers": 1}
    return make_model(directory, family, max_context=_WINDOW, seed=3, end_token=259, **layers)


def reference_of(model: Path) -> Reference:
    """Where rotary scaling depends on the length, with the table of the longest context from the first token on."""
    reference = Reference(model)
    with torch.inference_mode():
        reference.model(torch.zeros(1, _WINDOW, dtype=torch.long))
    return reference


@contextlib.asynccontextmanager
async def serving(
    model: Path, daemon: DaemonProcess, **overrides: Any
) -> AsyncIterator[tuple[InferenceService, RpcClient]]:
    # Whatever is saved is to be a hit, however busy the machine is.
    config = config_for(
        model, daemon.run_dir, chunk_tokens=_CHUNK, max_context=_WINDOW, load_or_compute="load", **overrides
    )
    async with service(config) as (running, client):
        await connected(running)
        yield running, client


async def connected(running: InferenceService) -> None:
    await eventually(lambda: running.store is not None and running.store.is_connected, "the store is there")


async def settled(running: InferenceService) -> None:
    await eventually(lambda: running.saver is not None and running.saver.backlog == 0, "all is saved")


class Plain:
    """What is left of a context by the rules alone: one flag for each token of the transcript."""

    def __init__(self, head: int = 0) -> None:
        self.head = -(-head // _CHUNK) * _CHUNK
        self.is_left: list[bool] = []

    def grow(self, length: int, room: int = 0) -> None:
        """What is new stays whole, with the chunk in which it begins."""
        old = len(self.is_left) // _CHUNK * _CHUNK
        self.is_left += [True] * (length - len(self.is_left))
        while sum(self.is_left) + room > _WINDOW:
            oldest = [t for t in range(self.head, old) if self.is_left[t]]
            assert oldest, "the turn does not fit"
            for token in oldest[:_STEP]:
                self.is_left[token] = False

    def left(self, length: int) -> list[int]:
        return [t for t in range(length) if self.is_left[t]]


class Talk:
    """A conversation whose every turn is checked: what is left, where it came from, and the answer."""

    def __init__(self, running: InferenceService, client: RpcClient, reference: Reference, system: str = "") -> None:
        self.running, self.reference = running, reference
        self.conversation = Conversation(client, running.model)
        self.plain = Plain()
        self.parent: Manifest | None = None
        self.truncated = 0
        if system:
            self.conversation.say_first("system", system)
            self.plain = Plain(len(system) + 3)  # with the template's own tokens

    def fork(self) -> Talk:
        other = copy.copy(self)
        other.conversation, other.plain = copy.copy(self.conversation), copy.deepcopy(self.plain)
        other.conversation.messages = list(self.conversation.messages)
        return other

    def move(self, running: InferenceService, client: RpcClient) -> None:
        self.running, self.conversation.client = running, client

    async def say(self, text: str) -> TurnDone:
        done = await self.conversation.say(text, max_tokens=_ANSWER)
        prompt, sampled, usage = tokens(done.prompt_tokens), tokens(done.tokens), done.usage
        manifest = self.running.manifests.get(done.turn_key)
        assert manifest is not None
        said = unpack_tokens(manifest.token_ids)
        length = done.kept[-1][1] - len(sampled) if done.kept else len(prompt)
        before = len(self.plain.left(len(self.plain.is_left)))
        self.plain.grow(length, _ROOM)
        left = self.plain.left(length)
        self.truncated += len(left) < before
        assert prompt == said[left].tolist()
        assert done.dropped_tokens == length - len(left)
        history = 0 if self.parent is None else sum(t < self.parent.kv_tokens for t in left)
        assert usage.prompt_tokens == len(left)
        assert not usage.missed
        assert usage.hbm + usage.dram + usage.ssd >= history
        self.reference.check(prompt, sampled)
        self.plain.grow(len(said))
        self.parent = manifest
        return done


def words(chance: random.Random, least: int = 20, most: int = 150) -> str:
    return "".join(chance.choice("abcdefgh ") for _ in range(chance.randint(least, most)))


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "llama-yarn", "llama-llama3", "llama-dynamic", "phi3-longrope", "gpt_neox"]
)
def test_one_layer_answers_as_if_what_is_left_had_been_computed_anew(
    family: str, tmp_path: Path, daemon: DaemonProcess
) -> None:
    """Several truncations in a row, with sliding windows, RoPE scaling of every kind, rotation of a part.

    Every kept token hits: on the device between truncations, in the store where its position changed.
    """
    model = one_layer(tmp_path / family, family)

    async def test() -> None:
        chance = random.Random(7)
        async with serving(model, daemon) as (running, client):
            talk = Talk(running, client, reference_of(model), system="Answer in a few words, and keep to facts. " * 4)
            on_device = 0
            while talk.truncated < 3:
                truncated, history = talk.truncated, talk.parent.kv_tokens if talk.parent is not None else 0
                done = await talk.say(words(chance))
                if truncated == talk.truncated and history:
                    assert done.usage.hbm == history - done.dropped_tokens
                    on_device += done.dropped_tokens > 0
                elif history:
                    assert done.usage.dram > 0
            assert on_device > 1, "truncated contexts go on on the device, too"

    run(test())


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_between_turns(seed: int, model: Path, daemon: DaemonProcess) -> None:
    """Forks, contexts let go on the device, daemons killed, DRAM lost, inference restarted: the same context again."""
    chance = random.Random(seed)
    reference = Reference(model)

    async def test() -> None:
        talks: list[Talk] = []
        for _ in range(2):
            async with serving(model, daemon) as (running, client):
                talks = talks or [Talk(running, client, reference, system=words(chance)) for _ in range(2)]
                for talk in talks:
                    talk.move(running, client)
                for _ in range(6):
                    what = chance.choice(["nothing", "nothing", "fork", "let go", "kill", "cold"])
                    if what == "fork" and len(talks) < 4:
                        talks.append(chance.choice(talks).fork())
                    elif what == "let go":
                        await settled(running)
                        while running.retained.let_go():
                            pass
                    elif what in ("kill", "cold"):
                        await settled(running)
                        await written_behind(daemon)
                        while running.retained.let_go():
                            pass
                        daemon.kill()
                        if what == "cold":
                            (daemon.run_dir / "arena").unlink()
                        daemon.start()
                        await eventually(lambda: not running.store.is_connected, "it was noticed")  # type: ignore[union-attr]
                        await connected(running)
                    await chance.choice(talks).say(words(chance, 80, 200))
                await settled(running)
                await written_behind(daemon)
        assert sum(talk.truncated for talk in talks) > 1

    run(test(), 200)


def test_what_is_left_comes_back_from_ssd_as_it_was(model: Path, tmp_path: Path) -> None:
    """In a DRAM of half of what is said, truncations and evictions together: the chunks to the bit, and the answers."""
    chance = random.Random(5)

    async def test(daemon: DaemonProcess) -> None:
        kept: dict[bytes, Kv] = {}
        from_ssd = from_ssd_truncated = 0
        async with serving(model, daemon, retain_bytes=0) as (running, client):
            geometry = running.model.geometry
            reference = Reference(model)
            talks = [Talk(running, client, reference, system=words(chance)) for _ in range(4)]
            while min(talk.truncated for talk in talks) < 2:
                for talk in talks:
                    truncated = talk.truncated
                    done = await talk.say(words(chance, 80, 200))
                    from_ssd += done.usage.ssd
                    from_ssd_truncated += done.usage.ssd if talk.truncated > truncated else 0
                    await settled(running)
                    await written_behind(daemon)
                    assert talk.parent is not None
                    manifest = (await running.store.get_manifest(talk.parent.turn_key))[0]  # type: ignore[union-attr]
                    assert manifest is not None
                    store = await StoreClient(daemon.run_dir, geometry, namespace=manifest.namespace).start()
                    try:
                        acquired = await store.acquire(manifest.chunk_ids)
                        assert len(acquired.chunks) == len(manifest.chunk_ids)
                        for ref in acquired.chunks:
                            kv = await store.read(ref)
                            assert kv is not None
                            assert_equal(kept.setdefault(kv.chunk_id, kv), kv)
                        await store.release(acquired.lease_id)
                    finally:
                        await store.stop()
        assert from_ssd > from_ssd_truncated > 0

    with running_daemon(tmp_path, dram_bytes=30 * 16 * 1024) as daemon:
        run(test(daemon))


@pytest.mark.parametrize("cut", [-100, 0, 1, 300])
def test_another_worker_goes_on_with_the_very_same_context(cut: int, model: Path, daemon: DaemonProcess) -> None:
    """An attempt dies in an answer that was truncated before and within it: the next one drops what it dropped.

    cut: tokens that were streamed, beyond those that fit the window: before a truncation, when it is due, behind two.
    """
    chance = random.Random(cut)
    reference = Reference(model)

    async def test() -> None:
        places = [{"endpoint": f"ipc://{daemon.run_dir}/{name}.sock"} for name in ("one", "two")]
        async with serving(model, daemon, **places[0]) as (one, client), serving(model, daemon, **places[1]) as there:
            two, other_client = there
            talk = Talk(one, client, reference, system=words(chance))
            while not talk.truncated:
                await talk.say(words(chance, 80, 200))
            ask = talk.conversation.request("Go on.", max_tokens=700)
            streamed, most = b"", 0
            parts = client.stream(ask, 60, 60)
            async for part in parts:
                if isinstance(part, TurnStarted):
                    most = _WINDOW - part.prompt_tokens
                if isinstance(part, TurnDelta):
                    streamed += part.tokens
                    if len(streamed) // 4 >= most + cut:
                        break
            await parts.aclose()  # type: ignore[attr-defined]
            again = dataclasses.replace(ask, job_id=new_id(), resume_tokens=streamed)
            resumed, rest = await stream(other_client, again)
            assert streamed + b"".join(delta.tokens for delta in rest) == resumed.tokens
            assert not resumed.usage.missed
            await settled(two)
            resumed_context = two.manifests.get(resumed.turn_key)
            whole, _ = await stream(client, dataclasses.replace(ask, job_id=new_id()))
            assert (resumed.tokens, resumed.text) == (whole.tokens, whole.text)
            assert (resumed.dropped_tokens, resumed.kept) == (whole.dropped_tokens, whole.kept)
            assert whole.dropped_tokens >= 3 * _STEP
            await settled(one)
            assert one.manifests.get(whole.turn_key) == resumed_context

    run(test())


def test_an_answer_that_fills_the_window_goes_on(model: Path, daemon: DaemonProcess) -> None:
    """It loses the oldest part at the window's end, as often as it takes, and the next turn finds what is left."""
    reference = Reference(model)

    async def test() -> None:
        async with serving(model, daemon) as (running, client):
            conversation = Conversation(client, running.model)
            done = await conversation.say("Hello", max_tokens=900)
            context, sampled = tokens(done.prompt_tokens), tokens(done.tokens)
            assert len(sampled) == 900
            dropped = at = 0
            while at < len(sampled):
                piece = sampled[at : at + _WINDOW + 1 - len(context)]
                reference.check(context, piece)
                context, at = (context + piece)[_STEP:], at + len(piece)
                dropped += _STEP
            assert done.dropped_tokens == dropped - _STEP
            said = len(tokens(done.prompt_tokens)) + 900
            assert done.kept == ((done.dropped_tokens, said),)
            follow_up = await conversation.say("Go on.", max_tokens=4)
            assert not follow_up.usage.missed
            assert follow_up.usage.prompt_tokens - follow_up.usage.computed == said - 1 - done.dropped_tokens
            reference.check(tokens(follow_up.prompt_tokens), tokens(follow_up.tokens))

    run(test())
