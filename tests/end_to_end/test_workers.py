"""Two inference processes behind one gateway: conversations move between them, and nothing is computed twice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stack import Service, Stack, running_stack
from protocol.messages import Manifest
from tests.cli.running import cli
from tests.end_to_end.conversations import own_scripts
from tests.end_to_end.player import Player
from tests.inference.harness import Conversation, Reference, config_for, make_model, run, service, stream, tokens
from tests.kvdaemon.client import running_daemon

_END = "256"  # the end token, as a key of logit_bias
Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama", max_context=1536)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@contextmanager
def two_workers(model: Path, **settings: Any) -> Iterator[Stack]:
    places = {"dram": "64MiB", "ssd": "256MiB", "load_or_compute": "load", **settings}
    with running_stack(model, dtype="float32", workers=2, **places) as stack:
        stack.wait_metric("gateway", "cachedattention_inference_connected", 2.0)
        yield stack


@pytest.fixture(scope="module")
def narrow(model: Path) -> Iterator[Stack]:
    """One turn at a time at each worker, so that what runs on one sends the next turn to the other."""
    with two_workers(model, max_running=1) as stack:
        yield stack


def endless(max_tokens: int) -> dict[str, Any]:
    """Greedy, and exactly so long: which answer of a random model is a long one, nobody knows."""
    return {"max_tokens": max_tokens, "logit_bias": {_END: -100}}


def say(messages: Messages, answer: dict[str, Any], text: str) -> Messages:
    """The conversation after this answer and another question."""
    return [*messages, answer["choices"][0]["message"], {"role": "user", "content": text}]


def left_behind(answer: dict[str, Any]) -> int:
    """Tokens whose KV a turn leaves behind."""
    return int(answer["usage"]["total_tokens"]) - 1


def turns_at(stack: Stack, worker: Service) -> float:
    return stack.metrics(worker)["cachedattention_inference_prefill_seconds_count"]


def wait_saved(stack: Stack, *workers: Service) -> None:
    for worker in workers or stack.workers:
        stack.wait_metric(worker, "cachedattention_store_connected", 1.0)
        stack.wait_metric(worker, "cachedattention_save_backlog", 0.0)


class Streamed:
    """An answer that comes piece by piece. Iterating gives the tokens so far after each piece."""

    def __init__(self, stack: Stack, messages: Messages, **fields: Any) -> None:
        self._stack = stack
        self._body: dict[str, Any] = {"model": "default", "messages": messages, "temperature": 0, "stream": True}
        self._body |= {"return_token_ids": True, "stream_options": {"include_usage": True}, **fields}
        self.tokens: list[int] = []
        self.text = ""
        self.usage: dict[str, Any] = {}

    def __iter__(self) -> Iterator[list[int]]:
        with self._stack.http.stream("POST", "/v1/chat/completions", json=self._body) as reply:
            assert reply.status_code == 200
            for line in reply.iter_lines():
                if line in ("", "data: [DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    self.tokens += choice.get("token_ids") or []
                    self.text += choice["delta"].get("content") or ""
                self.usage = chunk.get("usage") or self.usage
                yield self.tokens


def test_a_conversation_moves_to_the_idle_worker_and_keeps_its_history(narrow: Stack, reference: Reference) -> None:
    """While a branch of it occupies the worker that has its pages, the other one goes on from DRAM, at once."""
    messages: Messages = [{"role": "user", "content": "Tell me a story about the sea. " * 12}]
    before = {worker: turns_at(narrow, worker) for worker in narrow.workers}
    first = narrow.chat(messages, **endless(40))
    (home,) = [worker for worker in narrow.workers if turns_at(narrow, worker) > before[worker]]
    (other,) = [worker for worker in narrow.workers if worker != home]
    long = Streamed(narrow, say(messages, first, "Go on, and on."), **endless(600))
    pieces = iter(long)
    next(pieces)
    moved_messages = say(messages, first, "And the wind?")
    moved = narrow.chat(moved_messages, max_tokens=16)
    account = moved["usage"]["cachedattention"]
    assert turns_at(narrow, other) == before[other] + 1
    assert (account["dram"], account["hbm"], account["missed"]) == (left_behind(first), 0, {})
    reference.check(moved["prompt_token_ids"], moved["choices"][0]["token_ids"])
    for _ in pieces:
        pass
    assert long.usage["cachedattention"]["hbm"] == left_behind(first)
    assert len(long.tokens) == 600
    after = narrow.chat(say(moved_messages, moved, "Thank you."), max_tokens=16)
    assert after["usage"]["cachedattention"]["hbm"] >= left_behind(moved), "it lives there now"
    assert turns_at(narrow, other) == before[other] + 2
    reference.check(after["prompt_token_ids"], after["choices"][0]["token_ids"])


def test_more_conversations_than_places(narrow: Stack, reference: Reference) -> None:
    """Four conversations take turns on two workers with a place each, every follow-up at once: all history hits."""
    before = [turns_at(narrow, worker) for worker in narrow.workers]
    played = Player(narrow, reference).play(own_scripts()[:4], parallel=4)
    assert all(turns_at(narrow, worker) > 0 for worker in narrow.workers)
    assert sum(turns_at(narrow, worker) for worker in narrow.workers) - sum(before) == played.turns
    assert not played.missed


def test_the_same_turn_at_the_same_time_on_both(narrow: Stack, reference: Reference) -> None:
    """Both compute and save the same chunks: the answers are equal, the store is whole, and either goes on from it."""
    for number in range(4):
        messages: Messages = [{"role": "user", "content": f"{number}. Who wrote about the sea? " * 30}]
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: narrow.chat(messages, max_tokens=24), range(2)))  # noqa: B023
        tokens = [answer["choices"][0]["token_ids"] for answer in answers]
        assert tokens[0] == tokens[1]
        reference.check(answers[0]["prompt_token_ids"], tokens[0])
        more = narrow.chat(say(messages, answers[0], "And who else?"), max_tokens=8)
        assert more["usage"]["prompt_tokens_details"]["cached_tokens"] >= left_behind(answers[0])
        reference.check(more["prompt_token_ids"], more["choices"][0]["token_ids"])
    wait_saved(narrow)
    verified = cli("kv", "verify", "--data-dir", str(narrow.data_dir), "--run-dir", str(narrow.run_dir), "--json")
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize(("window", "died_at"), [(1536, 20), (512, 100)], ids=["fits", "truncated"])
def test_a_stream_outlives_its_worker(model: Path, reference: Reference, window: int, died_at: int) -> None:
    """kill -9 in mid-answer: it goes on at the other worker, equal to an undisturbed one, its history from DRAM.

    Also where the answer had filled the window, and lost the oldest part of its context: so does the second attempt.
    """
    with two_workers(model, max_context=window) as stack:
        messages: Messages = [{"role": "user", "content": "Tell me a story about the sea. " * 12}]
        first = stack.chat(messages, **endless(40))
        wait_saved(stack)
        question = say(messages, first, "Go on.")

        streamed = Streamed(stack, question, **endless(300))
        killed = ""
        for sampled in streamed:
            if not killed and len(sampled) >= died_at:
                jobs = {name: stack.metrics(name)["cachedattention_engine_running_jobs"] for name in stack.workers}
                (killed,) = [name for name, running in jobs.items() if running == 1.0]
                stack.kill(killed)
        assert killed
        account = streamed.usage["cachedattention"]
        assert account["dram"] >= left_behind(first) - account["dropped"]
        assert (account["hbm"], account["missed"]) == (0, {})
        assert (account["dropped"] > 0) == (window == 512)
        assert stack.metrics("gateway")["cachedattention_turn_retries_total"] == 1.0
        undisturbed = stack.chat(question, **endless(300))
        assert streamed.tokens == undisturbed["choices"][0]["token_ids"]
        assert streamed.text == undisturbed["choices"][0]["message"]["content"]
        assert account["kept"] == undisturbed["usage"]["cachedattention"]["kept"]

        # The one that is left goes on alone, and the next one that starts takes its part.
        answer = {"choices": [{"message": {"role": "assistant", "content": streamed.text}}]}
        last = stack.chat(say(question, answer, "Thank you."), max_tokens=12)
        left = streamed.usage["total_tokens"] - 1 - account["dropped"]
        assert last["usage"]["cachedattention"]["hbm"] >= left
        if not account["dropped"]:
            reference.check(last["prompt_token_ids"], last["choices"][0]["token_ids"])
        stack.start(killed)
        stack.wait_metric("gateway", "cachedattention_inference_connected", 2.0)


def _kill_workers_in_turn(stack: Stack) -> Callable[[int], None]:
    """Between turns one worker dies, then the other one; the dead one starts while turns run."""

    def between(requests: int) -> None:
        victim, other = (stack.workers[(requests + n) % 2] for n in range(2))
        stack.wait_ready(other)
        wait_saved(stack)
        stack.kill(victim)
        stack.launch(victim)

    return between


def _restart(stack: Stack, service: Service) -> Callable[[int], None]:
    def between(requests: int) -> None:
        wait_saved(stack)
        if requests % 2:
            stack.kill(service)
            stack.start(service)
            wait_saved(stack)  # connected again, too

    return between


@pytest.mark.parametrize("killed", ["worker", "kvdaemon", "gateway"])
def test_conversations_go_on_with_what_is_left(model: Path, reference: Reference, killed: str) -> None:
    """kill -9 of a process between turns: two workers still reuse all history, whoever of them had computed it."""
    with two_workers(model, retain=0) as stack:
        between = _kill_workers_in_turn(stack) if killed == "worker" else _restart(stack, killed)
        played = Player(stack, reference, between_turns=between).play(own_scripts()[:2], parallel=2)
        assert played.hits["dram"] > 0
        assert not played.missed


def test_a_rolling_restart_is_noticed_by_nobody(model: Path, reference: Reference) -> None:
    """Each worker is stopped in order and started again while turns run: all are answered, and all history hits."""
    with two_workers(model) as stack:

        def roll() -> None:
            for worker in stack.workers:
                stack.processes[worker].terminate()
                stack.processes[worker].wait(30)
                stack.start(worker)
                stack.wait_metric("gateway", "cachedattention_inference_connected", 2.0)

        with ThreadPoolExecutor(1) as pool:
            rolling = pool.submit(roll)
            while not rolling.done():
                played = Player(stack, reference).play(own_scripts()[:3], parallel=3)
                assert not played.missed
            rolling.result()


@pytest.mark.parametrize("wait_ms", [0, 20_000])
def test_a_turn_that_moves_at_once_waits_for_the_save(
    model: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_ms: int
) -> None:
    """Both workers in this process, the first one's context held back until the second one has asked for it.

    One that is not told to wait computes the history again and says why.
    """

    async def main(run_dir: Path) -> None:
        configs = [config_for(model, run_dir, endpoint=f"ipc://{run_dir}/{name}.sock") for name in "ab"]
        async with service(configs[0]) as (one, client), service(configs[1]) as (two, other_client):
            assert one.store is not None
            assert two.store is not None
            asked, may_save = asyncio.Event(), asyncio.Event()
            commit, get = one.store.commit, two.store.get_manifest

            async def commit_later(*arguments: Any) -> Any:
                await may_save.wait()
                return await commit(*arguments)

            async def get_and_tell(*arguments: Any) -> tuple[Manifest | None, str]:
                asked.set()
                return await get(*arguments)

            monkeypatch.setattr(one.store, "commit", commit_later)
            monkeypatch.setattr(two.store, "get_manifest", get_and_tell)
            conversation = Conversation(client, one.model)
            first = await conversation.say("Tell me of the sea. " * 8)
            history = first.usage.prompt_tokens + first.usage.completion_tokens - 1
            request = dataclasses.replace(conversation.request("And the wind?"), parent_wait_ms=wait_ms)
            answer = asyncio.ensure_future(stream(other_client, request))
            await asked.wait()
            if not wait_ms:
                await answer
            may_save.set()
            done, _ = await answer
            assert done.usage.dram == (history if wait_ms else 0)
            assert done.usage.missed == ({} if wait_ms else {"manifest_lost": history})
            assert not reference.check(tokens(done.prompt_tokens), tokens(done.tokens))

    with running_daemon(tmp_path, dram_bytes=32 << 20) as daemon:
        run(main(daemon.run_dir))
