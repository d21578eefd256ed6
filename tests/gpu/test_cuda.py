"""What runs on CUDA alone: FlashAttention, copies on streams of their own, pinned memory. `make test-gpu`.

Everything else about working KV in pages is tested on the CPU; see test_paged_kv, test_paged_attention, test_paged.
"""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.stack import running_stack
from inference.attention.paged import Flash, PagedStep, Part, flash_for, over_gathered, through_block_table
from inference.copies import copies_for, pin
from inference.decode_graphs import cuda_graphs
from inference.model import load_model
from inference.paged_kv import PagedKv, Pages
from inference.preload import Loader, LoadTask
from inference.service import InferenceService
from inference.working_kv import KvShape, new_context
from protocol.arena import Arena, Geometry
from protocol.rpc import RpcClient
from tests.inference.harness import Conversation, Reference, config_for, make_model, run, service, tokens
from tests.inference.test_decode_graphs import begin, step
from tests.inference.test_preload import CHUNK, LAYERS, Bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
HAS_BLOCK_TABLE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 12)


def shape_of(dim: int, kv_heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> KvShape:
    return KvShape(1, kv_heads, dim, dim, dtype, CUDA)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_flash_attention_is_used_where_there_is_any(dim: int) -> None:
    """With a block table from torch 2.12 on; before, over gathered keys."""
    assert flash_for(shape_of(dim)) is (through_block_table if HAS_BLOCK_TABLE else over_gathered)
    assert flash_for(shape_of(dim, dtype=torch.float32)) is None


@pytest.mark.parametrize(
    "flash",
    [
        pytest.param(through_block_table, marks=pytest.mark.skipif(not HAS_BLOCK_TABLE, reason="torch is too old")),
        over_gathered,
    ],
)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("new", [(1, 1, 1), (64, 300, 1), (1, 500)])
@torch.inference_mode()
def test_flash_attention_agrees_with_scaled_dot_product_attention(
    flash: Flash, dim: int, group: int, window: int | None, scale: float | None, new: tuple[int, ...]
) -> None:
    """Against float32 over the same bfloat16 numbers, as close as bfloat16 itself is."""
    shape, totals = shape_of(dim), (900, 300, 5000)
    pages = Pages(shape, 256, 80 * 256 * shape.token_bytes)
    pages.keys.normal_()
    pages.values.normal_()
    parts = []
    for count, total in zip(new, totals, strict=False):
        kv = new_context(pages, total, 0)
        assert isinstance(kv, PagedKv)
        parts.append(Part(kv, total - count, count))
    query = torch.randn(shape.kv_heads * group, sum(new), dim, device=CUDA, dtype=shape.dtype)
    found = PagedStep(parts, flash).attend(0, query, scale, window, None, None)
    exact = Pages(shape_of(dim, dtype=torch.float32), 256, 80 * 256 * 2 * shape.token_bytes)
    exact.keys.copy_(pages.keys)
    exact.values.copy_(pages.values)
    for part in parts:
        part.kv.pages = exact
    expected = PagedStep(parts, None).attend(0, query.float(), scale, window, None, None)
    for part in parts:
        part.kv.pages = pages
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


@torch.inference_mode()
def test_decoding_does_not_depend_on_the_batch() -> None:
    """To the bit: one job alone, and beside others, longer ones and prompts."""
    shape = shape_of(128)
    pages = Pages(shape, 256, 80 * 256 * shape.token_bytes)
    pages.keys.normal_()
    pages.values.normal_()
    parts = []
    for new, total in ((1, 900), (1, 5000), (300, 600)):
        kv = new_context(pages, total, 0)
        assert isinstance(kv, PagedKv)
        parts.append(Part(kv, total - new, new))
    query = torch.randn(8, 302, 128, device=CUDA, dtype=shape.dtype)
    flash = flash_for(shape)
    alone = PagedStep(parts[:1], flash).attend(0, query[:, :1], None, None, None, None)
    together = PagedStep(parts, flash).attend(0, query, None, None, None, None)
    assert torch.equal(alone, together[:1])


def arena_of(directory: Path) -> Arena:
    return Arena.create(directory / "arena", Geometry(4, 4096, 4096, 256), 64 << 20)


def test_the_arena_is_pinned_while_it_lives(tmp_path: Path) -> None:
    arena = arena_of(tmp_path)
    keys = torch.from_numpy(arena.keys)
    assert not keys.is_pinned()
    assert pin(arena, CUDA)
    assert keys.is_pinned()
    assert torch.from_numpy(arena.values).is_pinned()
    del arena
    gc.collect()
    assert not keys.is_pinned()
    again = Arena.open(tmp_path / "arena")
    assert pin(again, CUDA)


@pytest.mark.parametrize("history", [40, 33, 16, 1])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, history: int) -> None:
    """Values and raw keys bit by bit; keys as the model's own rotation turns them on this device."""
    bench = Bench(tmp_path)
    bench.loader.stop()
    shape = KvShape(LAYERS, 2, 8, 8, torch.float32, CUDA)
    for table in bench.tables:
        table._cos, table._sin = table._cos.to(CUDA), table._sin.to(CUDA)
        table._whole_cos, table._turning_sin = table._whole_cos.to(CUDA), table._turning_sin.to(CUDA)
        table._scratch = table._scratch.to(CUDA)
    refs = [bench.chunk(16), bench.chunk(16), bench.chunk(8)]
    assert pin(bench.arena, CUDA)
    kv = new_context(Pages(shape, 256, 8 * 256 * shape.token_bytes), 128, history // CHUNK * CHUNK, history)
    ended = threading.Event()
    loader = Loader(bench.rotary, lambda: None, copies=copies_for(CUDA))
    loader.start()
    try:
        task = LoadTask(kv, bench.arena, refs, time.monotonic() + 20, ended.set)
        loader.submit(task)
        task.wait_layer(LAYERS - 1)
        assert ended.wait(10)
    finally:
        loader.stop()
    raw, values = torch.cat(bench.keys, 1)[:, :history], torch.cat(bench.values, 1)[:, :history]
    assert torch.equal(torch.stack([kv.values_at(layer, 0, history) for layer in range(shape.layers)]).cpu(), values)
    base = history // CHUNK * CHUNK
    if base < history:
        assert torch.equal(kv.raw.span(slice(None), base, history).cpu(), raw[:, base:])
    for layer, table in enumerate(bench.tables[:-1]):
        rows = table.at(torch.arange(history, device=CUDA))
        key = raw[layer].to(CUDA).transpose(0, 1).unsqueeze(0)
        expected = table.rotate(key, key, rows)[1][0].transpose(0, 1)
        torch.testing.assert_close(kv.keys_at(layer, 0, history), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(kv.keys_at(shape.layers - 1, 0, history).cpu(), raw[-1])


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "gemma2", "gpt_oss"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), request.param, max_context=1024, end_token=259)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_passes(model: Path, tmp_path: Path, dtype: str) -> None:
    """Ours against the stock forward on the device; FlashAttention is in it with bfloat16."""
    checked = load_model(config_for(model, tmp_path / "run", device="cuda", dtype=dtype)).checked
    assert checked.shape.device.type == "cuda"
    assert checked.difference < 0.1


def test_turns_are_right_and_retained_on_the_device(model: Path, tmp_path: Path) -> None:
    """float32: transformers' own greedy tokens, each turn continuing from the pages of the one before."""
    reference = Reference(model)

    async def test() -> None:
        config = config_for(model, tmp_path / "run", device="cuda", dtype="float32")
        async with service(config) as (running, client):
            await converse(running, client, reference)

    run(test())


async def converse(running: InferenceService, client: RpcClient, reference: Reference) -> None:
    assert isinstance(running.buffers, Pages)
    conversation, history, excused = Conversation(client, running.model), 0, 0
    for text in ("Tell me of the sea. " * 20, "And the wind?", "The end"):
        done = await conversation.say(text)
        excused += reference.check(tokens(done.prompt_tokens), tokens(done.tokens))
        assert done.usage.hbm >= history
        history = done.usage.prompt_tokens + done.usage.completion_tokens - 1
    assert excused <= 1


def test_bfloat16_follows_transformers_as_far_as_rounding_lets_it(tmp_path: Path) -> None:
    """Each sampled token is one of the best three of transformers' own bfloat16 logits over the same context."""
    directory = make_model(tmp_path / "model", "llama", max_context=1024, end_token=259)
    stock: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa")
    stock.eval().to(CUDA)

    async def test() -> None:
        config = config_for(directory, tmp_path / "run", device="cuda", dtype="bfloat16")
        async with service(config) as (running, client):
            done = await Conversation(client, running.model).say("Tell me of the sea. " * 20, max_tokens=40)
        prompt, sampled = tokens(done.prompt_tokens), tokens(done.tokens)
        with torch.inference_mode():
            logits = stock(torch.tensor([prompt + sampled], device=CUDA)).logits[0]
        best = logits[len(prompt) - 1 : -1].topk(3).indices.tolist()
        assert sum(token in found for token, found in zip(sampled, best, strict=True)) >= len(sampled) - 1

    run(test())


@pytest.mark.skipif(not HAS_BLOCK_TABLE, reason="torch is too old")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_recorded_decode_steps_are_the_same_steps(family: str, tmp_path: Path) -> None:
    """CUDA graphs against the operations one by one: contexts grow over pages, as many jobs as recorded, or fewer."""
    directory = make_model(tmp_path / "model", family, max_context=1024)
    checked = load_model(config_for(directory, tmp_path / "run", device="cuda", dtype="bfloat16")).checked
    model, pages = checked.model, Pages(checked.shape, 256, 400 * 256 * checked.shape.token_bytes)
    lengths = (255, 17, 600)
    ways = [begin(model, pages, lengths) for _ in range(2)]
    assert model.record_decoding(pages, 1024, (1, 2, 4), cuda_graphs(CUDA))
    recordings = model._recorded
    assert recordings is not None
    before = recordings.steps
    rounds: list[tuple[int, ...]] = [(0, 1, 2), (0, 1), (2,), (1, 2), (0, 1, 2)]
    for number, jobs in enumerate(rounds):
        tokens = [torch.tensor([7 * number + job]) for job in jobs]
        model._recorded = None
        expected = step(model, [ways[0][job] for job in jobs], tokens)
        model._recorded = recordings
        found = step(model, [ways[1][job] for job in jobs], tokens)
        apart = (found - expected).square().mean(1).sqrt() / expected.std(1)
        assert float(apart.max()) < 0.1
    assert recordings.steps - before == len(rounds)


def test_the_engine_decodes_by_recordings(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", "llama", max_context=1024, end_token=259)

    async def test() -> None:
        config = config_for(directory, tmp_path / "run", device="cuda", dtype="bfloat16")
        async with service(config) as (running, client):
            done = await Conversation(client, running.model).say("Tell me of the sea. ", max_tokens=40)
            recordings = running.model.checked.model._recorded
            assert (recordings is not None) is HAS_BLOCK_TABLE
            assert recordings is None or recordings.steps >= len(tokens(done.tokens)) - 1

    run(test())


def test_history_is_saved_and_comes_back(tmp_path: Path) -> None:
    """Through a real store, nothing retained: saved from the device beside the computation, loaded layer by layer."""
    directory = make_model(tmp_path / "model", "llama", max_context=1024, seed=3, end_token=259)
    reference, excused = Reference(directory), 0
    settings = {"dtype": "float32", "device": "cuda", "retain": 0, "chunk_tokens": 32, "load_or_compute": "load"}
    with running_stack(directory, dram="64MiB", ssd=0, **settings) as stack:
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Tell me of the sea. " * 20}]
        history = 0
        for _ in range(4):
            answer = stack.chat(messages, max_tokens=60)
            stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)
            choice, account = answer["choices"][0], answer["usage"]["cachedattention"]
            excused += reference.check(answer["prompt_token_ids"], choice["token_ids"])
            assert account["missed"] == {}
            assert account["dram"] >= history
            history = len(answer["prompt_token_ids"]) + len(choice["token_ids"]) - 1
            messages.append({"role": "assistant", "content": choice["message"]["content"]})
            messages.append({"role": "user", "content": "And the wind?"})
    assert excused <= 1


@torch.inference_mode()
def test_a_layer_is_there_before_the_rest_is_loaded(tmp_path: Path) -> None:
    """Over a link that is slowed, the engine gets layer 0 while later layers are still on their way."""
    bench = Bench(tmp_path)
    bench.loader.stop()
    shape = KvShape(LAYERS, 2, 8, 8, torch.float32, CUDA)
    bench.rotary._layers, bench.rotary._tables = (None,) * LAYERS, set()
    refs = [bench.chunk(16) for _ in range(8)]
    pin(bench.arena, CUDA)
    kv = new_context(Pages(shape, 256, 8 * 256 * shape.token_bytes), 128, 128, 128)
    loader = Loader(bench.rotary, lambda: None, copies=copies_for(CUDA), link_bandwidth=128 * shape.token_bytes)
    loader.start()
    try:
        task = LoadTask(kv, bench.arena, refs, time.monotonic() + 20, lambda: None)
        loader.submit(task)
        task.wait_layer(0)
        assert task.ready_layers < LAYERS
        assert np.array_equal(kv.values_at(0, 0, 128).cpu().numpy(), torch.cat(bench.values, 1)[0].numpy())
        task.wait_layer(LAYERS - 1)
        assert task.overlap_ratio < 1.0
    finally:
        loader.stop()
