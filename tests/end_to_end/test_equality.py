"""Same answer: real conversations through HTTP give transformers' own greedy tokens, wherever history comes from.

Three real processes, float32, every turn compared with `transformers` `generate` on the same prompt ids; on
every turn after the first all history is reused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.stack import Stack, running_stack
from tests.end_to_end.conversations import NO_DATA, REAL_TEXT, Script, own_scripts, real_scripts
from tests.end_to_end.player import Played, Player
from tests.inference.harness import Reference, make_model

_CONTEXT = 1536
_FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "phi3")
_PARALLEL = (1, 4)  # requests at a time
# Rotation by layer, layers without positions, half a head, sinks, a table for this context.
_FURTHER = ("gemma3", "smollm3", "stablelm", "gpt_oss", "phi3-longrope")

needs_data = pytest.mark.skipif(not REAL_TEXT.is_dir(), reason=NO_DATA)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {family: make_model(home / family, family, max_context=_CONTEXT) for family in _FAMILIES}


@pytest.fixture(scope="session")
def references(models: dict[str, Path]) -> dict[str, Reference]:
    return {family: Reference(directory) for family, directory in models.items()}


def all_scripts() -> tuple[Script, ...]:
    return real_scripts(20, _CONTEXT // 2) if REAL_TEXT.is_dir() else own_scripts()


def scripts(family: str) -> tuple[Script, ...]:
    """Twenty real conversations; half of them for the further shapes unless EQUALITY_CONVERSATIONS is 20."""
    everything = family == _FAMILIES[0] or os.environ.get("EQUALITY_CONVERSATIONS") == "20"
    return all_scripts() if everything else all_scripts()[::2]


def wait_saved(stack: Stack) -> None:
    stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)


def ways(stack: Stack) -> Iterator[int]:
    """Each number of requests at a time, as a tenant of its own: nobody finds another's history."""
    for parallel in _PARALLEL:
        stack.http.headers["Authorization"] = f"Bearer {parallel} at a time"
        yield parallel


def settle(played: Played) -> None:
    """Excuses are for rounding only: a wrong answer is wrong in more than one turn of fifty."""
    print(played)
    assert played.turns > 0
    assert played.excused <= played.turns // 50 + 1, played


@pytest.mark.parametrize("family", _FAMILIES)
def test_history_in_dram(models: dict[str, Path], references: dict[str, Reference], family: str) -> None:
    """Nothing is retained on the device: all history comes through the arena."""
    with running_stack(
        models[family], dtype="float32", retain=0, dram="256MiB", ssd="1GiB", load_or_compute="load"
    ) as stack:
        for parallel in ways(stack):
            player = Player(stack, references[family], between_turns=lambda _: wait_saved(stack))
            played = player.play(scripts(family), parallel)
            settle(played)
            assert played.hits["dram"] > 0
            assert played.hits["hbm"] == 0


@pytest.mark.parametrize("family", _FAMILIES)
def test_history_in_working_kv(models: dict[str, Path], references: dict[str, Reference], family: str) -> None:
    """Quick follow-ups find their pages on the device."""
    settings = {"retain": "256MiB", "dram": "64MiB", "ssd": "1GiB", "load_or_compute": "load"}
    with running_stack(models[family], dtype="float32", **settings) as stack:
        for parallel in ways(stack):
            played = Player(stack, references[family]).play(scripts(family), parallel)
            settle(played)
            assert played.hits["hbm"] > 0


@pytest.mark.parametrize("family", _FAMILIES)
def test_history_on_ssd(models: dict[str, Path], references: dict[str, Reference], family: str) -> None:
    """All conversations take turns and DRAM is too small for their KV: history comes from SSD."""
    with running_stack(
        models[family], dtype="float32", retain=0, dram="14MiB", ssd="1GiB", load_or_compute="load"
    ) as stack:

        def flushed(_: int) -> None:
            wait_saved(stack)
            stack.wait_metric("kvdaemon", "cachedattention_write_behind_queue", 0.0)

        for parallel in ways(stack):
            player = Player(stack, references[family], between_turns=flushed)
            played = player.play(all_scripts(), parallel, open_at_once=20)
            settle(played)
            assert played.hits["ssd"] > 0


@pytest.mark.parametrize("family", _FURTHER)
def test_history_of_further_shapes(tmp_path: Path, family: str) -> None:
    """Saved, loaded, and rotated as each layer does."""
    model = make_model(tmp_path / family, family, max_context=_CONTEXT)
    # LongRoPE: transformers takes another table for prompts within the original length, 64.
    chosen = [script for script in own_scripts() if len(script.turns[0][-1]["content"]) > 64]
    settings = {"retain": 0, "dram": "64MiB", "ssd": "256MiB", "load_or_compute": "load"}
    with running_stack(model, dtype="float32", **settings) as stack:
        player = Player(stack, Reference(model), between_turns=lambda _: wait_saved(stack))
        played = player.play(chosen, open_at_once=len(chosen))
    settle(played)
    assert played.hits["hbm"] == 0
    assert played.hits["dram"] > 0


@needs_data
def test_twenty_real_conversations_are_played() -> None:
    """The figure above stands for real data where it is there."""
    chosen = all_scripts()
    assert len(chosen) == 20
    assert sum(len(script.turns) for script in chosen) >= 60
