"""The inference process: sockets on the event loop, computation on the engine's thread, copies on two more."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from inference.admission import Admission
from inference.attention.decode import prepare
from inference.config import InferenceConfig
from inference.copies import copies_for, pin
from inference.decode_graphs import batch_sizes, cuda_graphs
from inference.engine import Engine, Job
from inference.load_or_compute import name_of
from inference.mailbox import Mailbox
from inference.memory import free_bytes, working_kv_bytes
from inference.model import LoadedModel, load_model
from inference.paged_kv import Pages, page_tokens_for
from inference.preload import Loader, LoadTask
from inference.rates import Rates
from inference.save import GIVE_UP_S, Saver
from inference.share import take_share
from inference.store import Store
from inference.text import render, tokenize
from inference.truncation import Window
from inference.turn import ManifestCache, Turn
from inference.working_kv import Buffers, Kv, KvPool, RetentionPool
from monitoring import traces
from monitoring.inference_metrics import InferenceMetrics
from monitoring.logs import get_logger
from monitoring.registry import Registry, new_registry
from monitoring.status_server import Readiness, StatusServer
from protocol.errors import CapacityError, ConfigError, InvalidRequest, PeerUnavailable
from protocol.ids import TokenArray, pack_tokens, unpack_tokens
from protocol.messages import (
    Detokenize,
    Detokenized,
    ForgetTurns,
    GetModel,
    GetWorkingKv,
    Manifest,
    ModelInfo,
    RunTurn,
    Tokenize,
    Tokenized,
    TurnDone,
    TurnsForgotten,
    TurnUsage,
    WorkingKv,
)
from protocol.rpc import Call, RpcServer

log = get_logger(__name__)

_MANIFEST_CACHE_BYTES = 8 * 1024 * 1024  # some two thousand short contexts; the daemon has all of them
_SPARE_BUFFER_BYTES = 128 * 1024 * 1024
_STORE_WAIT_S = 5.0  # a start waits this long for the daemon, then serves without it
_FORGET_S = GIVE_UP_S + 1.0  # for turns that are being saved while they are to be forgotten
_DRAIN_S = 8.0  # running turns get this long at a stop
_SAVE_DRAIN_S = 4.0  # and what is not saved yet this long; together below what `up` allows


class InferenceService:
    """One model on one device. Built with a loaded model; start and stop on one event loop."""

    def __init__(self, config: InferenceConfig, model: LoadedModel, registry: Registry) -> None:
        """Raises ConfigError: working KV holds not even one context."""
        self.config = config
        self.model = model
        self.metrics = InferenceMetrics(registry)
        self.manifests = ManifestCache(_MANIFEST_CACHE_BYTES)
        shape = model.checked.shape
        paged = config.paged or shape.device.type == "cuda"
        page_tokens = page_tokens_for(config.chunk_tokens) if paged else None
        capacity_bytes = working_kv_bytes(
            config.working_kv_bytes,
            free_bytes(shape.device) // (config.workers if shape.device.type == "cpu" else 1),
            shape,
            model.max_context,
            config.max_running,
            config.retain_bytes,
            page_tokens,
        )
        self.buffers: KvPool
        if page_tokens is None:
            spare_bytes = config.retain_bytes // 2 + _SPARE_BUFFER_BYTES
            self.buffers = Buffers(shape, spare_bytes, capacity_bytes, model.max_context, config.chunk_tokens)
        else:
            self.buffers = Pages(shape, page_tokens, capacity_bytes)
        self.retained = RetentionPool(config.retain_bytes, config.chunk_tokens)
        self.admission = Admission(self.retained.let_go, lambda: self.engine.is_short)
        self.store: Store | None = None
        self.saver: Saver | None = None
        self.rates = Rates()
        self._unsaved_bytes = 0  # working KV of turns that are over and not saved: the write buffer
        self._saved = asyncio.Condition()
        self.window = Window(model.max_context, config.chunk_tokens, config.truncation_ratio)
        self._saving: dict[bytes, asyncio.Event] = {}  # by turn key: set when the turn is saved, or given up
        self._turns = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopping = False
        self._server = RpcServer(
            config.endpoint,
            "inference",
            {
                GetModel: self._get_model,
                RunTurn: self._run_turn,
                Tokenize: self._tokenize,
                Detokenize: self._detokenize,
                ForgetTurns: self._forget_turns,
                GetWorkingKv: self._get_working_kv,
            },
            curve=config.curve,
        )
        self.loader: Loader
        self.engine: Engine
        self.mailbox: Mailbox

    async def start(self) -> None:
        """Begin to serve. Raises ConfigError: the endpoint is taken."""
        loop = asyncio.get_running_loop()
        self.mailbox = Mailbox(loop, self.config.stream_interval_s)
        checked = self.model.checked
        device = checked.shape.device
        if self.config.reuse:
            self.store = Store(
                self.config.kvdaemon_endpoint,
                self.config.run_dir,
                self.model.geometry,
                self.model.namespace,
                self.config.curve,
                lambda arena: pin(arena, device),
            )
            self.saver = Saver(
                self.store,
                loop,
                self._chunk_saved,
                link_bandwidth=self.config.link_bandwidth,
                copies=copies_for(device),
            )
            self.saver.start()
            await self.store.start(_STORE_WAIT_S)
        with ThreadPoolExecutor(1) as starting:
            await loop.run_in_executor(starting, self.buffers.warm, self._warm_tokens())
            await loop.run_in_executor(starting, self._prepare_decoding)

        def wake_admission() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self.admission.wake)

        def memory_given() -> None:
            if self.engine.is_short:
                self.engine.poke()
            if len(self.admission):
                wake_admission()

        self.engine = Engine(
            checked.model,
            self.saver,
            self.config.step_tokens,
            self.config.step_stretch,
            reclaim=self.retained.let_go,
            on_relief=wake_admission,
            observe=self.metrics.observe_step,
            rates=self.rates,
        )
        # The engine alone computes on several cores. Were there more than those in OpenMP's threads, it would put them
        # to sleep after each product.
        torch.set_num_threads(1)
        self.buffers.on_given = memory_given
        self.loader = Loader(
            checked.model.rotary,
            self.engine.poke,
            rates=self.rates,
            read_buffer_bytes=self.config.read_buffer_bytes if self.config.preload else 0,
            link_bandwidth=self.config.link_bandwidth,
            copies=copies_for(device),
        )
        self.loader.start()
        self.engine.start()
        saver, store = self.saver, self.store
        self.metrics.watch(
            {
                "running": lambda: self._turns,
                "backlog": lambda: saver.backlog if saver is not None else 0,
                "waiting": lambda: len(self.admission),
                "working_kv_bytes": lambda: self.buffers.used_bytes,
                "working_kv_capacity_bytes": lambda: self.buffers.capacity_bytes or 0,
                "write_buffer_bytes": lambda: self._unsaved_bytes,
                "dram_bytes_per_s": lambda: self.rates.link["dram"].bytes_per_s,
                "ssd_bytes_per_s": lambda: self.rates.link["ssd"].bytes_per_s,
                "prefill_token_s": lambda: self.rates.prefill.token_s,
                "prefill_step_s": lambda: self.rates.prefill.step_s,
                "prefill_pair_s": lambda: self.rates.prefill.pair_s,
                "retained_bytes": lambda: self.retained.used_bytes,
                "spare_bytes": lambda: self.buffers.spare_bytes,
                "store_connected": lambda: float(store is not None and store.is_connected),
            }
        )
        await self._server.start()

    async def stop(self) -> None:
        """Refuse new turns, let running ones end, cancel them, save what is computed, close."""
        self._is_stopping = True
        await self._until(lambda: self._turns == 0, _DRAIN_S)
        await self._server.stop()
        if self.saver is not None and self.store is not None and self.store.is_connected:
            saver = self.saver
            await self._until(lambda: saver.backlog == 0, _SAVE_DRAIN_S)
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.loader.stop)
        if self.saver is not None:
            await asyncio.to_thread(self.saver.stop)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)
        if self.store is not None:
            await self.store.stop()

    def _prepare_decoding(self) -> None:
        """Compile its kernels, or record its steps, whichever the device has."""
        model, shape = self.model.checked.model, self.buffers.shape
        if isinstance(self.buffers, Buffers):
            prepare(shape)
        elif isinstance(self.buffers, Pages) and shape.device.type == "cuda" and self.config.cuda_graphs:
            sizes = batch_sizes(self.config.max_running)
            model.record_decoding(self.buffers, self.model.max_context, sizes, cuda_graphs(shape.device))

    def _warm_tokens(self) -> int:
        return min(self.model.max_context, _SPARE_BUFFER_BYTES // (2 * self.buffers.shape.token_bytes))

    def readiness(self) -> Readiness:
        if self._is_stopping:
            return Readiness(False, "stopping")
        if self.store is not None and not self.store.is_connected:
            return Readiness(True, "degraded", f"no KV store {self.store.last_error}".strip())
        return Readiness(True, "ok")

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run something that nobody waits for; its failure is logged by itself."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def keep(self, job: Job, namespace: bytes, computed: TokenArray, manifest: Manifest) -> None:
        """A turn is over: remember its context, retain its working KV, and have the rest saved behind it."""
        self.manifests.put(manifest)
        kv, save, saver = job.kv, job.save, self.saver
        if save is not None and saver is not None:
            loop = asyncio.get_running_loop()
            held_bytes = kv.nbytes
            kv.pending_saves += 1
            self._unsaved_bytes += held_bytes
            settled = self._saving[manifest.turn_key] = asyncio.Event()

            def ended(saved: bool) -> None:
                loop.call_soon_threadsafe(saved_on_loop, saved)
                if self.retained.capacity_bytes and not self.engine.running:  # it keeps its memory; another may begin
                    self.buffers.warm(min(kv.capacity, self._warm_tokens()))

            def saved_on_loop(saved: bool) -> None:
                kv.pending_saves -= 1
                self._unsaved_bytes -= held_bytes
                self.spawn(self._tell_saved())
                settled.set()
                if self._saving.get(manifest.turn_key) is settled:
                    del self._saving[manifest.turn_key]
                self.retained.trim()
                self.admission.wake()  # it may be let go from now on
                if not saved:
                    self.metrics.unsaved_turns.inc()
                    return
                # Told by the daemon from now on; ours has the chunk ids, too.
                self.manifests.put(save.saved_manifest(manifest))

            saver.finish(save, manifest, ended)
        self.retained.put(namespace, computed, kv, manifest.truncations, manifest.turn_key)

    async def wait_saved(self, turn_key: bytes, timeout_s: float) -> None:
        """Wait until a turn of this process is in the store, given up, or timeout_s have passed."""
        if (settled := self._saving.get(turn_key)) is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(settled.wait(), timeout_s)

    async def wait_write_buffer(self, job: Job) -> None:
        """Wait until what finished turns left unsaved fits the write buffer, this turn is saved, or its save given up.

        Without a buffer (`--save sync`) that is until it is saved. No other turn waits for this one meanwhile.
        """
        capacity = self.config.write_buffer_bytes if self.config.save == "async" else 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GIVE_UP_S + 1.0), self._saved:
                await self._saved.wait_for(lambda: self._unsaved_bytes <= capacity or not job.kv.pending_saves)

    async def _tell_saved(self) -> None:
        async with self._saved:
            self._saved.notify_all()

    def record(self, usage: TurnUsage, job: Job) -> None:
        """Metrics and the log line of a finished turn."""
        prefill_s = job.first_token_s - job.admitted_s
        self.metrics.prefill_seconds.observe(prefill_s)
        hits = usage.hbm + usage.dram + usage.ssd
        load = job.load
        load_s = load.busy_s if load is not None else 0.0
        if load is not None:
            self._record_load(load, load_s, "ssd" if usage.ssd else "dram")
        if hits:
            self.metrics.prefill_seconds_saved.inc(max(0.0, self.rates.prefill.seconds(0, hits) - load_s))
        log.info(
            "turn done",
            prompt=usage.prompt_tokens,
            completion=usage.completion_tokens,
            hbm=usage.hbm,
            dram=usage.dram,
            ssd=usage.ssd,
            computed=usage.computed,
            missed=dict(usage.missed),
            prefill_ms=round(prefill_s * 1e3, 1),
            load_ms=round(load_s * 1e3, 1),
        )

    def _record_load(self, load: LoadTask, load_s: float, tier: str) -> None:
        if load.start < load.end:
            self.metrics.load_seconds.labels(tier).observe(load_s)
            self.metrics.overlap_ratio.observe(load.overlap_ratio)
        self.metrics.load_or_compute.labels(name_of(load.start, load.end)).inc()
        if (choice := load.choice) is not None:
            for option, seconds in (
                ("chosen", choice.chosen_s),
                ("load", choice.load_s),
                ("compute", choice.compute_s),
            ):
                self.metrics.load_or_compute_seconds.labels(option).inc(seconds)

    def _chunk_saved(self, tokens: int, seconds: float) -> None:
        self.metrics.save_seconds.observe(seconds)
        self.metrics.saved_tokens.inc(tokens)

    async def _get_model(self, call: Call, message: GetModel) -> ModelInfo:
        model = self.model
        shape = model.checked.shape
        return ModelInfo(
            model=model.name,
            namespace=model.namespace,
            template_digest=model.template_digest,
            max_context=model.max_context,
            max_running=self.config.max_running,
            reuse=self.config.reuse,
            device=str(shape.device),
            dtype=str(shape.dtype).removeprefix("torch."),
            tool_format=model.tool_format,
        )

    async def _tokenize(self, call: Call, message: Tokenize) -> Tokenized:
        tokenizer = self.model.tokenizer

        def work() -> Tokenized:
            if message.messages:
                text = render(tokenizer, message.messages, message.tools, message.add_generation_prompt)
                token_ids = tokenize(tokenizer, text)
            else:
                token_ids = tokenize(tokenizer, message.text, message.add_special_tokens)
            strings = tokenizer.convert_ids_to_tokens(token_ids.tolist()) if message.want_strings else ()
            return Tokenized(pack_tokens(token_ids), tuple(strings))

        return await asyncio.to_thread(work)

    async def _detokenize(self, call: Call, message: Detokenize) -> Detokenized:
        token_ids, size = unpack_tokens(message.tokens), self.model.vocabulary.size
        if len(token_ids) and int(token_ids.max()) >= size:
            raise InvalidRequest(f"there is no token {token_ids.max()}; the model has {size}", param="tokens")
        decode = self.model.tokenizer.decode
        return Detokenized(await asyncio.to_thread(decode, token_ids.tolist(), skip_special_tokens=False))

    async def _forget_turns(self, call: Call, message: ForgetTurns) -> TurnsForgotten:
        """What is being saved is waited for: its KV would be in the store after it was erased there."""
        deadline_s = time.monotonic() + _FORGET_S
        for key in message.turn_keys:
            await self.wait_saved(key, max(0.0, deadline_s - time.monotonic()))
            self.manifests.forget(key)
        contexts = self.retained.forget(frozenset(message.turn_keys))
        held_bytes, count = sum(kv.nbytes for kv in contexts), len(contexts)
        await asyncio.to_thread(_wipe, contexts, self.buffers)
        return TurnsForgotten(count, held_bytes, sum(key in self._saving for key in message.turn_keys))

    def _get_working_kv(self, call: Call, message: GetWorkingKv) -> WorkingKv:
        return WorkingKv(self.buffers.capacity_bytes or 0, self.buffers.used_bytes, self.retained.used_bytes)

    async def _run_turn(self, call: Call, message: RunTurn) -> TurnDone:
        if self._is_stopping:
            raise PeerUnavailable("the inference process is stopping")
        if self._turns >= self.config.max_running:
            raise CapacityError(f"{self._turns} turns are running")
        self._turns += 1
        span = traces.begin("inference", message.trace, call.started_s)
        error = ""
        try:
            return await Turn(self, call, message, span).run()
        except BaseException as reason:
            error = str(reason) or type(reason).__name__
            raise
        finally:
            span.end(error=error)
            self._turns -= 1

    @staticmethod
    async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
        for _ in range(int(timeout_s / 0.02)):
            if condition():
                return
            await asyncio.sleep(0.02)


def _wipe(contexts: list[Kv], buffers: KvPool) -> None:
    """Overwrite contexts that nobody reads any more, and what others have left behind."""
    while contexts:
        contexts.pop().wipe()
    buffers.wipe()


def run(config: InferenceConfig) -> int:
    """Serve until SIGTERM or SIGINT. Raises ConfigError, UnsupportedModel before anything is served."""
    take_share(config.worker, config.workers)
    return asyncio.run(_serve(config))


async def _serve(config: InferenceConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _check_run_dir(config)
    registry = new_registry()
    service: InferenceService | None = None
    started = time.monotonic()

    def readiness() -> Readiness:
        return service.readiness() if service is not None else Readiness(False, "starting", "loading the model")

    status = StatusServer(config.metrics_host, config.metrics_port, registry, readiness)
    try:
        if torch.get_num_threads() > 2 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(torch.get_num_threads() - 1)  # loader and saver have one core
        # In a thread that ends: OpenMP keeps threads for one that lives, and puts the engine's to sleep sooner for it.
        with ThreadPoolExecutor(1) as starting:
            model = await asyncio.get_running_loop().run_in_executor(starting, load_model, config)
        fresh = InferenceService(config, model, registry)
        await fresh.start()
        gc.freeze()  # the model and what it brought along stay, too
        service = fresh
        log.info(
            "serving",
            model=model.name,
            context=model.max_context,
            kv_bytes_per_token=model.geometry.token_bytes,
            working_kv_bytes=fresh.buffers.capacity_bytes,
            selfcheck=f"{model.checked.difference:.1e}",
            threads=torch.get_num_threads(),
            start_s=round(time.monotonic() - started, 2),
        )
        await stop.wait()
        log.info("stopping")
        await service.stop()
    finally:
        status.close()
    return 0


def _check_run_dir(config: InferenceConfig) -> None:
    if not config.run_dir.is_dir():
        raise ConfigError(f"run directory {config.run_dir} does not exist", param="run_dir")
