"""Survival: kill -9 of any process between and during turns. Every conversation goes on, equal and reused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.stack import SERVICES, Service, Stack, running_stack
from gateway.turns import MAX_ATTEMPTS
from tests.end_to_end.conversations import own_scripts
from tests.end_to_end.player import Player
from tests.inference.harness import Reference, make_model

_KILLED: list[tuple[Service, ...]] = [("kvdaemon",), ("inference",), ("gateway",), SERVICES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama", max_context=1536)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def one_stack(model: Path) -> Iterator[Stack]:
    with running_stack(model, dtype="float32", retain=0, dram="64MiB", ssd="1GiB", load_or_compute="load") as running:
        yield running


@pytest.fixture
def stack(one_stack: Stack, request: pytest.FixtureRequest) -> Stack:
    """All of it running, and a tenant for each test: nobody finds what another one said."""
    for service, process in list(one_stack.processes.items()):
        if process.poll() is not None:
            one_stack.start(service)
    one_stack.http.headers["Authorization"] = f"Bearer {request.node.name}"
    return one_stack


def wait_stored(stack: Stack) -> None:
    """All that was computed is committed and written behind."""
    stack.wait_metric("inference", "cachedattention_store_connected", 1.0)
    stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)
    stack.wait_metric("kvdaemon", "cachedattention_write_behind_queue", 0.0)


def restarter(stack: Stack, killed: tuple[Service, ...], before_start: Callable[[], None]) -> Callable[[int], None]:
    def between(requests: int) -> None:
        wait_stored(stack)
        if requests % 2:
            stack.kill(*killed)
            before_start()
            stack.start(*killed)
            wait_stored(stack)

    return between


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("killed", _KILLED, ids="+".join)
def test_conversations_go_on_after_a_restart_between_turns(
    stack: Stack, reference: Reference, killed: tuple[Service, ...], parallel: int
) -> None:
    """After kill -9, the arena is adopted and the journal remembers: every turn still reuses all its history."""
    player = Player(stack, reference, between_turns=restarter(stack, killed, lambda: None))
    played = player.play(own_scripts()[: 2 if parallel == 1 else 4], parallel)
    assert played.hits["dram"] > 0


def test_the_ssd_alone_is_enough(stack: Stack, reference: Reference) -> None:
    """Everything killed and the arena gone: what was flushed to SSD hits again."""

    def lose_dram() -> None:
        (stack.run_dir / "arena").unlink()

    def between(requests: int) -> None:
        wait_stored(stack)
        if requests % 2:
            stack.wait_metric("kvdaemon", "cachedattention_manifest_queue", 0.0)
            stack.kill(*SERVICES)
            lose_dram()
            stack.start()
            wait_stored(stack)

    played = Player(stack, reference, between_turns=between).play(own_scripts()[:2])
    assert played.hits["ssd"] > 0


def test_turns_without_a_daemon_are_recomputed(stack: Stack, reference: Reference) -> None:
    """While kvdaemon is away, turns are served by recomputing, and say why."""

    def between(requests: int) -> None:
        if requests == 0:
            wait_stored(stack)
        if requests == 1:
            stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)
            stack.kill("kvdaemon")

    played = Player(stack, reference, expect_hits=False, between_turns=between).play(own_scripts()[:2])
    assert played.missed.get("daemon_unavailable", 0) > 0
    ready = httpx.get(f"http://127.0.0.1:{stack.ports['inference']}/ready").json()
    assert ready["state"] == "degraded"


@pytest.mark.parametrize("killed", _KILLED[:2], ids="+".join)
def test_a_kill_during_a_turn_does_not_lose_it(stack: Stack, reference: Reference, killed: tuple[Service, ...]) -> None:
    """kill -9 while turns run: each is still answered, right, by the same request."""
    stop = threading.Event()
    kills = 0

    def killer() -> None:
        nonlocal kills
        # As often as a turn may be begun again: on busy cores all of them may hit the same one.
        for delay in (0.05, 0.2, 0.4)[: MAX_ATTEMPTS - 1]:
            while stack.metrics("inference")["cachedattention_engine_running_jobs"] == 0:
                if stop.wait(0.01):
                    return
            time.sleep(delay)
            stack.kill(*killed)
            kills += 1
            stack.start(*killed)
            if stop.wait(0.2):
                return

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        player = Player(stack, reference, max_tokens=150, expect_hits=False)
        played = player.play(own_scripts()[:3], parallel=3)
    finally:
        stop.set()
        thread.join()
    assert played.turns == sum(len(script.turns) for script in own_scripts()[:3])
    assert kills >= 1


def test_the_journal_survives_a_gateway_killed_during_a_turn(stack: Stack, reference: Reference) -> None:
    """The client of a killed gateway asks again and gets the right answer with its history reused."""
    messages = [{"role": "user", "content": "Tell me a long story about the sea. " * 8}]
    first = stack.chat(messages, max_tokens=12)
    messages.append({"role": "assistant", "content": first["choices"][0]["message"]["content"]})
    wait_stored(stack)
    for number in range(100):  # which random answer is a long one, nobody knows
        question = {"role": "user", "content": f"Go on, part {number}."}
        if stack.chat([*messages, question], max_tokens=400)["usage"]["completion_tokens"] > 200:
            break
    else:
        pytest.fail("this model gives no long answer")
    messages.append(question)
    killer = threading.Timer(0.05, lambda: stack.kill("gateway"))
    killer.start()
    with pytest.raises(httpx.TransportError):
        stack.chat(messages, max_tokens=400)
    killer.join()
    stack.start("gateway")
    answer = stack.chat(messages, max_tokens=40)
    reference.check(answer["prompt_token_ids"], answer["choices"][0]["token_ids"])
    history = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= history
