"""Never wrong KV, and never a failed turn: damaged DRAM, a tmpfs without room, bfloat16."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.stack import Stack, running_stack
from protocol.arena import Arena, SlotState
from tests.inference.harness import Reference, make_model

_LONG = "Tell me a long story about the sea, the wind and the harbour. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama", max_context=1536)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def saved(stack: Stack) -> None:
    stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)
    stack.wait_metric("kvdaemon", "cachedattention_write_behind_queue", 0.0)


def damage(stack: Stack, chunks: int) -> None:
    """Flip a bit in a middle layer of the first `chunks` chunks that lie in DRAM, oldest tokens first."""
    arena = Arena.open(stack.run_dir / "arena")
    ready = [slot for slot in range(arena.slots) if arena.state(slot) is SlotState.READY]
    # Full chunks first: the prompt is longer than two of them.
    for slot in sorted(ready, key=lambda slot: -arena.tokens(slot))[:chunks]:
        key, _ = arena.layer(slot, 1, 1)
        key[3] ^= 0x40
        del key
    arena.close()


def two_turns(stack: Stack, reference: Reference, chunks: int) -> dict[str, Any]:
    """A turn, damage, and the next turn's usage; both answers are checked."""
    messages = [{"role": "user", "content": _LONG}]
    first = stack.chat(messages, max_tokens=8)
    saved(stack)
    damage(stack, chunks)
    messages += [
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "Go on."},
    ]
    second = stack.chat(messages, max_tokens=8)
    for answer in (first, second):
        assert not reference.check(answer["prompt_token_ids"], answer["choices"][0]["token_ids"])
    usage: dict[str, Any] = second["usage"]
    return usage


def test_a_damaged_chunk_comes_from_ssd(model: Path, reference: Reference) -> None:
    """With --verify always, a flipped bit in DRAM is noticed, the chunk dropped, and its copy on SSD read."""
    with running_stack(
        model, dtype="float32", retain=0, dram="64MiB", ssd="1GiB", verify="always", load_or_compute="load"
    ) as stack:
        account = two_turns(stack, reference, chunks=1)["cachedattention"]
        assert account["missed"] == {}
        assert account["ssd"] >= 256
        assert stack.metrics("kvdaemon")['cachedattention_corrupt_total{where="dram"}'] == 1


def test_damage_without_a_second_copy_is_recomputed(model: Path, reference: Reference) -> None:
    """No SSD tier: the history is computed again, and the account says why."""
    with running_stack(
        model, dtype="float32", retain=0, dram="64MiB", ssd=0, verify="always", load_or_compute="load"
    ) as stack:
        account = two_turns(stack, reference, chunks=9)["cachedattention"]
        assert account["missed"].get("corrupt", 0) > 256


def test_bfloat16_serves_and_reuses(model: Path) -> None:
    with running_stack(model, dtype="bfloat16", retain=0, dram="64MiB", ssd="1GiB", load_or_compute="load") as stack:
        messages = [{"role": "user", "content": _LONG}]
        first = stack.chat(messages, max_tokens=8)
        saved(stack)
        messages += [
            {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
            {"role": "user", "content": "Go on."},
        ]
        account = stack.chat(messages, max_tokens=8)["usage"]["cachedattention"]
        assert account["dram"] == first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1


@pytest.fixture
def tiny_tmpfs() -> Iterator[Path]:
    """A tmpfs of 4 MiB of its own."""
    directory = Path(tempfile.mkdtemp(prefix="ca-", dir="/dev/shm"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(directory)], check=False)
    if mounted.returncode:
        directory.rmdir()
        pytest.skip("mounting a small tmpfs needs root")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
    shutil.rmtree(directory, ignore_errors=True)


def test_a_tmpfs_without_room_makes_turns_slower_not_failed(
    model: Path, reference: Reference, tiny_tmpfs: Path
) -> None:
    with running_stack(model, dtype="float32", retain=0, dram="64MiB", ssd="1GiB", run_dir=tiny_tmpfs) as stack:
        messages = [{"role": "user", "content": _LONG}]
        first = stack.chat(messages, max_tokens=8)
        assert not reference.check(first["prompt_token_ids"], first["choices"][0]["token_ids"])
        health = httpx.get(f"http://127.0.0.1:{stack.ports['inference']}/health").json()
        assert health["state"] == "degraded"
        assert "lower --dram" in health["reason"]
