"""Layer-wise loading from a real arena: bit-equal KV, in order, and every doubt is a failure with its reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from inference.preload import Loader, LoadFailed, LoadTask
from inference.rates import PrefillRate, Rates
from inference.rotary import Rotary, RotaryTable
from inference.working_kv import Buffers, KvShape, WorkingKv, as_bytes
from protocol.arena import Arena, Geometry, SlotState
from protocol.messages import SlotRef

LAYERS, HEADS, DIM, CHUNK = 4, 2, 8, 16
SHAPE = KvShape(LAYERS, HEADS, DIM, DIM, torch.float32, torch.device("cpu"))
GEOMETRY = Geometry(LAYERS, HEADS * DIM * 4, HEADS * DIM * 4, CHUNK)
WAIT_S = 10.0


class Bench:
    """An arena with chunks of known KV, and a running loader."""

    def __init__(self, directory: Path) -> None:
        self.arena = Arena.create(directory / "arena", GEOMETRY, 4 << 20)
        generator = torch.Generator().manual_seed(0)
        # A table of its own for each layer, and none for one.
        angles = torch.randn(LAYERS, 256, DIM, generator=generator)
        self.tables = [RotaryTable(apply_rotary_pos_emb, each.cos(), each.sin()) for each in angles]
        self.rotary = Rotary([*self.tables[:-1], None])
        self.generator = generator
        self.first_layers = threading.Event()
        self.loader = Loader(self.rotary, self.first_layers.set)
        self.loader.start()
        self.keys: list[torch.Tensor] = []  # per chunk [layers, tokens, heads, dim]
        self.values: list[torch.Tensor] = []

    def chunk(self, tokens: int, *, layers: int = LAYERS, verify: bool = False) -> SlotRef:
        """A chunk of random KV of which `layers` layers are ready."""
        slot = len(self.keys)
        generation = self.arena.take(slot, SlotState.LOADING, bytes(16))
        identity = bytes([slot + 1]) * 16
        self.arena.set_identity(slot, identity, bytes(16), bytes(16), tokens)
        self.keys.append(torch.randn(LAYERS, tokens, HEADS, DIM, generator=self.generator))
        self.values.append(torch.randn(LAYERS, tokens, HEADS, DIM, generator=self.generator))
        for layer in range(layers):
            self.fill(slot, layer)
        return SlotRef(slot, generation, identity, tokens, "dram", verify)

    def fill(self, slot: int, layer: int) -> None:
        keys, values = as_bytes(self.keys[slot]), as_bytes(self.values[slot])
        self.arena.write_layer(slot, layer, keys[layer], values[layer])

    def task(
        self, chunks: list[SlotRef], history: int, *, deadline_s: float = WAIT_S, shape: KvShape = SHAPE
    ) -> tuple[LoadTask, threading.Event]:
        kv = WorkingKv(Buffers(shape, 0), 128)
        kv.begin(history, history // CHUNK * CHUNK, 128)
        ended = threading.Event()
        return LoadTask(kv, self.arena, chunks, time.monotonic() + deadline_s, ended.set), ended

    def load(self, chunks: list[SlotRef], history: int) -> LoadTask:
        task, ended = self.task(chunks, history)
        self.loader.submit(task)
        assert ended.wait(WAIT_S)
        return task


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.loader.stop()


@pytest.mark.parametrize("history", [40, 39, 33, 32, 16, 1])
def test_history_is_rotated_to_its_positions(bench: Bench, history: int) -> None:
    """Keys are those of a direct rotation, bit by bit; values and the raw tail are what was stored."""
    refs = [bench.chunk(16), bench.chunk(16), bench.chunk(8)]
    kv = bench.load(refs, history).kv
    raw = torch.cat(bench.keys, dim=1)[:, :history]
    rows = [table.at(torch.arange(history)) for table in bench.tables]
    for layer in range(LAYERS):
        heads_first = raw[layer].transpose(0, 1).unsqueeze(0)
        rotated = heads_first
        if layer < LAYERS - 1:
            _, rotated = apply_rotary_pos_emb(heads_first, heads_first, *rows[layer][:2])
        assert torch.equal(kv.keys[layer, :history], rotated[0].transpose(0, 1))
        assert torch.equal(kv.values[layer, :history], torch.cat(bench.values, dim=1)[layer, :history])
        base = kv.raw.base
        assert torch.equal(kv.raw.span(layer, base, history), raw[layer, base:])


@pytest.mark.parametrize("history", [40, 39, 33, 32, 16])
def test_only_what_a_window_shows_is_loaded(bench: Bench, history: int) -> None:
    """Whole chunks that no token behind the history sees stay away; the last one may be saved again and never does."""
    windows = (None, 9, 1, 24)
    refs = [bench.chunk(16), bench.chunk(16), bench.chunk(8)]
    task, ended = bench.task(refs, history, shape=replace(SHAPE, windows=windows))
    for layer in range(LAYERS):
        task.kv.values_at(layer, 0, history).fill_(torch.nan)
    bench.loader.submit(task)
    assert ended.wait(WAIT_S)
    expected = torch.cat(bench.values, dim=1)[:, :history]
    loaded = 0
    for layer, window in enumerate(windows):
        seen = 0 if window is None else min(history - window + 1, history - 1) // CHUNK * CHUNK
        seen = max(0, seen)
        loaded += history - seen
        assert torch.equal(task.kv.values_at(layer, seen, history), expected[layer, seen:])
        assert task.kv.values_at(layer, 0, seen).isnan().all()
    assert task.loaded_bytes == loaded * SHAPE.token_bytes // LAYERS
    assert task.kv.whole_from == (history if loaded < LAYERS * history else 0)


def test_layers_are_taken_up_as_they_arrive(bench: Bench) -> None:
    """A chunk that comes from SSD: computing may begin with its first layer, long before its last."""
    ref = bench.chunk(16, layers=0)
    task, ended = bench.task([ref], 16)
    bench.loader.submit(task)
    assert not task.has_begun()
    for layer in range(LAYERS):
        bench.fill(ref.slot, layer)
        task.wait_layer(layer)
        assert task.ready_layers >= layer + 1
    assert ended.wait(WAIT_S)
    assert bench.first_layers.is_set()


def test_a_job_that_waits_for_ssd_lets_others_pass(bench: Bench) -> None:
    slow, quick = bench.chunk(16, layers=1), bench.chunk(16)
    waiting, waiting_ended = bench.task([slow], 16)
    bench.loader.submit(waiting)
    waiting.wait_layer(0)
    bench.load([quick], 16)
    assert not waiting_ended.is_set()
    for layer in range(1, LAYERS):
        bench.fill(slow.slot, layer)
    assert waiting_ended.wait(WAIT_S)


@pytest.mark.parametrize("ready_layers", [0, 2])
def test_a_revoked_slot_is_noticed(bench: Bench, ready_layers: int) -> None:
    """The daemon gives the slot away before or while it is read: the load fails, nothing foreign is kept."""
    ref = bench.chunk(16, layers=ready_layers)
    task, ended = bench.task([ref], 16)
    bench.loader.submit(task)
    if ready_layers:
        task.wait_layer(ready_layers - 1)
    bench.arena.free(ref.slot)
    with pytest.raises(LoadFailed) as failure:
        task.wait_layer(LAYERS - 1)
    assert failure.value.reason == "revoked"
    assert ended.wait(WAIT_S)


def test_a_slot_of_another_generation_is_never_read(bench: Bench) -> None:
    ref = bench.chunk(16)
    stale = SlotRef(ref.slot, ref.generation - 1, ref.chunk_id, ref.tokens, "dram")
    other = SlotRef(ref.slot, ref.generation, b"x" * 16, ref.tokens, "dram")
    for wrong in (stale, other):
        task = bench.load([wrong], 16)
        assert task.failure is not None
        assert task.failure.reason == "revoked"


def test_flipped_bits_are_noticed_where_verification_is_asked_for(bench: Bench) -> None:
    ref = bench.chunk(16, verify=True)
    key, _ = bench.arena.layer(ref.slot, 2, 16)
    key[100] ^= 4
    task = bench.load([ref], 16)
    assert task.failure is not None
    assert task.failure.reason == "corrupt"
    assert task.failure.ref == ref
    assert task.ready_layers == 2


def test_a_load_ends_by_its_deadline(bench: Bench) -> None:
    ref = bench.chunk(16, layers=1)
    task, ended = bench.task([ref], 16, deadline_s=0.2)
    bench.loader.submit(task)
    with pytest.raises(LoadFailed) as failure:
        task.wait_layer(1)
    assert failure.value.reason == "load_failed"
    assert ended.wait(WAIT_S)


def test_a_cancelled_load_ends(bench: Bench) -> None:
    ref = bench.chunk(16, layers=1)
    task, ended = bench.task([ref], 16)
    bench.loader.submit(task)
    task.wait_layer(0)
    task.cancel()
    assert ended.wait(WAIT_S)


def test_who_waits_for_a_cancelled_load_waits_no_longer(bench: Bench) -> None:
    """The engine may be in the middle of a step that waits for the layer."""
    task, ended = bench.task([bench.chunk(16, layers=1)], 16)
    bench.loader.submit(task)
    task.wait_layer(0)
    timer = threading.Timer(0.05, task.cancel)
    timer.start()
    with pytest.raises(LoadFailed, match="cancelled"):
        task.wait_layer(1)
    assert ended.wait(WAIT_S)
    timer.join()


def test_waiting_jobs_are_loaded_as_far_as_the_buffer_reaches(bench: Bench) -> None:
    """Two jobs wait: the first gets the two layers that the buffer holds, the second none until it is due."""
    loader = Loader(bench.rotary, lambda: None, read_buffer_bytes=2 * 16 * HEADS * DIM * 2 * 4)
    loader.start()
    try:
        (first, first_ended), (second, second_ended) = (bench.task([bench.chunk(16)], 16) for _ in range(2))
        loader.submit(first)
        loader.submit(second)
        while first.ready_layers < 2:
            time.sleep(0.001)
        second.make_due()  # passes the first, which has what it may have
        assert second_ended.wait(WAIT_S)
        assert (first.ready_layers, second.ready_layers) == (2, LAYERS)
        first.make_due()
        assert first_ended.wait(WAIT_S)
        assert first.ready_layers == LAYERS
    finally:
        loader.stop()


def test_whoever_is_waited_for_is_loaded(bench: Bench) -> None:
    """A step takes up three jobs of which none was said to be next, and waits for every layer of each in turn. The
    buffer, which holds two layers, is no reason to let it wait."""
    loader = Loader(bench.rotary, lambda: None, read_buffer_bytes=2 * 16 * HEADS * DIM * 2 * 4)
    loader.start()
    try:
        tasks = [bench.task([bench.chunk(16)], 16)[0] for _ in range(3)]
        for task in tasks:
            loader.submit(task)
        for layer in range(LAYERS):
            for task in tasks:
                task.wait_layer(layer)
    finally:
        loader.stop()


def test_a_waiting_history_is_loaded_to_its_end(bench: Bench) -> None:
    """Computing takes so long that one layer would do to begin with. It gets all, though: its lease ends."""
    rates = Rates(prefill=PrefillRate(token_s=1.0))
    rates.loaded("dram", 10**9, 1.0, time.monotonic())
    loader = Loader(bench.rotary, lambda: None, rates=rates)
    loader.start()
    try:
        both = [bench.task([bench.chunk(16)], 16) for _ in range(2)]
        for task, _ in both:
            task.new_tokens = 10
            assert task.wanted_bytes(rates) == 0
            loader.submit(task)
        for _, ended in both:
            assert ended.wait(WAIT_S)
    finally:
        loader.stop()


def test_a_link_that_brings_nothing_is_waited_for_until_the_deadline(bench: Bench) -> None:
    """The first piece would be on the link for minutes. Whoever looks at the load learns that there is nothing to wait
    for, also beside decoding jobs, and who waits is told."""
    loader = Loader(bench.rotary, lambda: None, link_bandwidth=1)
    loader.start()
    try:
        task, ended = bench.task([bench.chunk(16)], 16, deadline_s=0.2)
        assert not task.has_begun()
        loader.submit(task)
        task.make_due()
        while not task.has_enough(Rates(), 1):
            time.sleep(0.01)
        with pytest.raises(LoadFailed, match="load_failed"):
            task.wait_layer(0)
        task.cancel()
        assert ended.wait(WAIT_S)
    finally:
        loader.stop()


def test_a_load_cut_short_tells_how_slow_the_link_is(bench: Bench) -> None:
    """Computing was chosen before anything came: the next job need not find out again."""
    rates = Rates()
    loader = Loader(bench.rotary, lambda: None, rates=rates, link_bandwidth=1)
    loader.start()
    try:
        task, ended = bench.task([bench.chunk(16)], 16)
        task.make_due()
        loader.submit(task)
        while not task.is_requested:
            time.sleep(0.001)
        time.sleep(0.2)
        task.cancel()
        assert ended.wait(WAIT_S)
        assert 0 < rates.link["dram"].bytes_per_s <= task.lump_bytes / 0.2
    finally:
        loader.stop()


def test_nothing_is_computed_before_all_is_there_without_pre_loading(bench: Bench) -> None:
    kv = WorkingKv(Buffers(SHAPE, 0), 128)
    kv.begin(16, 16, 128)
    ref = bench.chunk(16, layers=1)
    task = LoadTask(kv, bench.arena, [ref], time.monotonic() + WAIT_S, lambda: None, is_layer_wise=False)
    bench.loader.submit(task)
    while task.ready_layers < 1:
        time.sleep(0.001)
    assert not task.has_begun()
    for layer in range(1, LAYERS):
        bench.fill(ref.slot, layer)
    task.wait_layer(0)
    assert task.ready_layers == LAYERS
    assert task.has_begun()


def test_what_is_computed_instead_is_not_written(bench: Bench) -> None:
    """The engine takes the first chunk over while the load is under way: from then on its place is the engine's."""
    refs = [bench.chunk(16, layers=1), bench.chunk(16, layers=1)]
    kv = WorkingKv(Buffers(SHAPE, 0), 128)
    kv.begin(0, 32, 128)
    task = LoadTask(kv, bench.arena, refs, time.monotonic() + WAIT_S, lambda: None, end=32, new_tokens=4)
    bench.loader.submit(task)
    task.wait_layer(0)
    rates = Rates(prefill=PrefillRate(token_s=1e-6))
    rates.loaded("dram", 1, 1.0, time.monotonic())  # a link so slow that a chunk is computed sooner
    while task.start == 0:  # until the load's own rate, which began well, is found to be as slow
        task.choose(rates)
    assert task.start in (16, 32)
    kv.keys[1:, : task.start] = kv.values[1:, : task.start] = 7.0
    for layer in range(1, LAYERS):
        for ref in refs:
            bench.fill(ref.slot, layer)
    if task.start < 32:
        task.wait_layer(LAYERS - 1)
        assert torch.equal(kv.values[:, 16:32], bench.values[1])
    assert (kv.keys[1:, : task.start] == 7.0).all()
    assert (kv.values[1:, : task.start] == 7.0).all()


def test_a_slowed_link_is_waited_for_without_sleeping_in_the_loader(bench: Bench) -> None:
    """The first piece alone would be on the link for 20 s; cancelled, the load ends at once."""
    loader = Loader(bench.rotary, lambda: None, link_bandwidth=100)
    loader.start()
    try:
        task, ended = bench.task([bench.chunk(16)], 16)
        loader.submit(task)
        task.make_due()
        while not task.is_requested:
            time.sleep(0.001)
        task.cancel()
        assert ended.wait(WAIT_S / 2)
        assert task.loaded_bytes == 0
    finally:
        loader.stop()


@pytest.mark.parametrize(("compute_share", "layers"), [(1.0, 1), (0.75, 1), (0.5, 2), (0.25, 3), (0.0, 4)])
def test_computing_begins_when_so_much_is_there_that_it_never_waits(
    bench: Bench, compute_share: float, layers: int
) -> None:
    """compute_share: what the new tokens take, of what the load takes. The formula's part of the layers is enough, but
    one layer at least. A step that takes but one of the tokens needs nearly all."""
    task, _ = bench.task([bench.chunk(16)], 16)
    task.new_tokens = 10
    rates = Rates(prefill=PrefillRate(token_s=compute_share * 100.0 / task.new_tokens))
    rates.loaded("dram", task.layer_bytes * LAYERS, 100.0, time.monotonic())
    for layer in range(LAYERS):
        assert task.has_enough(rates, task.new_tokens) == (layer >= layers)
        assert not task.has_enough(rates, 1)
        task.layer_ready(layer)
    assert task.has_enough(rates, task.new_tokens)
