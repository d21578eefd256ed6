"""Bounded: thousands of turns, and no process grows."""

from __future__ import annotations

import os
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.stack import SERVICES, Service, Stack, running_stack
from inference.environment import cores
from tests.inference.harness import make_model

MIB = 1024 * 1024
_DRAM_MIB = 128
# Allocators and bounded caches fill during the first part; what comes on top after it is growth.
_ALLOWED_GROWTH_MIB = 24
_ALLOWED_GROWTH_SHORT_MIB = 64  # in the short form the caches are still filling; one leaked turn is about 1 MiB
_ALLOWED_OVER_DRAM_MIB = 250


def private_mib(stack: Stack, service: Service) -> float:
    """Memory that a service and its children have for themselves, without the shared arena."""
    process = psutil.Process(stack.processes[service].pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_full_info().uss for member in family) / MIB


def check_places(stack: Stack) -> None:
    """Those of inference's threads that compute together have a core each; all others run where there is room."""
    everywhere = os.sched_getaffinity(0)
    pid = stack.processes["inference"].pid
    masks = [os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{pid}/task")]
    bound = [mask for mask in masks if mask != everywhere]
    assert len(bound) > 1 or len(cores(everywhere)) == 1
    assert all(not a & b for a, b in combinations(bound, 2))


def play(stack: Stack, turns: int, rng: random.Random) -> None:
    """Conversations of up to eight turns; some are left and taken up again, some are edited."""
    open_conversations: list[list[dict[str, Any]]] = []
    for _ in range(turns):
        if not open_conversations or rng.random() < 0.15:
            open_conversations.append([])
        if len(open_conversations) > 24:
            open_conversations.pop(rng.randrange(12))
        conversation = rng.choice(open_conversations)
        if len(conversation) >= 16:
            open_conversations.remove(conversation)
            continue
        if conversation and rng.random() < 0.1:
            del conversation[-2:]
        words = " ".join(rng.choice(("sea", "ship", "harbour", "wind", "gull")) for _ in range(rng.randint(1, 30)))
        conversation.append({"role": "user", "content": f"{rng.random()} {words}"})
        answer = stack.chat(conversation, max_tokens=rng.randint(1, 10))
        account = answer["usage"]["cachedattention"]
        assert set(account["missed"]) <= {"evicted"}, account
        conversation.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much KV per token as the embedded model, one token per byte, and answers that do not end by themselves."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama", max_context=4096, **shape)


def soak(model: Path, turns: int, settle: int) -> dict[str, tuple[float, float]]:
    """Play `turns` turns; private memory of each service after `settle` turns and at the end, in MiB."""
    rng = random.Random(1)
    with running_stack(
        model, dram=f"{_DRAM_MIB}MiB", ssd="512MiB", retain="16MiB", log_level="warning", load_or_compute="load"
    ) as stack:
        play(stack, settle, rng)
        before = {service: private_mib(stack, service) for service in SERVICES}
        play(stack, turns - settle, rng)
        after = {service: private_mib(stack, service) for service in SERVICES}
        check_places(stack)
        arena_mib = (stack.run_dir / "arena").stat().st_size / MIB
        assert after["kvdaemon"] + arena_mib <= _DRAM_MIB + _ALLOWED_OVER_DRAM_MIB
        assert stack.metrics("kvdaemon")["cachedattention_leases"] == 0
        assert not list(Path(stack.home).glob("core*"))
    return {service: (before[service], after[service]) for service in SERVICES}


def check(figures: dict[str, tuple[float, float]], allowed_mib: float) -> None:
    for service, (before, after) in figures.items():
        print(f"{service}: {before:.0f} MiB, at the end {after:.0f} MiB")
        assert after - before <= allowed_mib, f"{service} grew from {before:.0f} to {after:.0f} MiB"


def test_hundreds_of_turns(model: Path) -> None:
    """The short form, for every run of the tests: after 600 turns inference's caches of products are full."""
    check(soak(model, turns=900, settle=600), _ALLOWED_GROWTH_SHORT_MIB)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_turns(model: Path) -> None:
    """`make soak`. The variable SOAK_TURNS changes the number."""
    check(soak(model, turns=int(os.environ.get("SOAK_TURNS", "10000")), settle=2500), _ALLOWED_GROWTH_MIB)
