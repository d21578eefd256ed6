"""The inference process: sockets on the event loop, computation on the engine's thread, copies on two more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from inference.admission import Admission
from inference.config import InferenceConfig
from inference.engine import Engine, Job
from inference.mailbox import Mailbox
from inference.memory import free_bytes, working_kv_bytes
from inference.model import LoadedModel, load_model
from inference.preload import Loader
from inference.save import Saver
from inference.share import take_share
from inference.store import Store
from inference.turn import ManifestCache, Turn
from inference.working_kv import Buffers, RetentionPool
from monitoring.inference_metrics import InferenceMetrics
from monitoring.logs import get_logger
from monitoring.registry import Registry, new_registry
from monitoring.status_server import Readiness, StatusServer
from protocol.errors import CapacityError, ConfigError, PeerUnavailable
from protocol.ids import TokenArray
from protocol.messages import GetModel, Manifest, ModelInfo, RunTurn, TurnDone, TurnUsage
from protocol.rpc import Call, RpcServer

log = get_logger(__name__)

_MANIFEST_CACHE_BYTES = 8 * 1024 * 1024  # some two thousand short contexts; the daemon has all of them
_SPARE_BUFFER_BYTES = 128 * 1024 * 1024
_STORE_WAIT_S = 5.0  # a start waits this long for the daemon, then serves without it
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
        capacity_bytes = working_kv_bytes(
            config.working_kv_bytes,
            free_bytes(shape.device) // (config.workers if shape.device.type == "cpu" else 1),
            shape,
            model.max_context,
            config.max_running,
            config.retain_bytes,
        )
        spare_bytes = config.retain_bytes // 2 + _SPARE_BUFFER_BYTES
        self.buffers = Buffers(shape, spare_bytes, capacity_bytes, model.max_context)
        self.retained = RetentionPool(self.buffers, config.retain_bytes, config.chunk_tokens)
        self.admission = Admission(self.retained.let_go, lambda: self.engine.is_short)
        self.store: Store | None = None
        self.saver: Saver | None = None
        self._turns = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopping = False
        self._server = RpcServer(
            config.endpoint,
            "inference",
            {GetModel: self._get_model, RunTurn: self._run_turn},
            curve=config.curve,
        )
        self.loader: Loader
        self.engine: Engine
        self.mailbox: Mailbox

    async def start(self) -> None:
        """Begin to serve. Raises ConfigError: the endpoint is taken."""
        loop = asyncio.get_running_loop()
        self.mailbox = Mailbox(loop)
        checked = self.model.checked
        if self.config.reuse:
            self.store = Store(
                self.config.kvdaemon_endpoint,
                self.config.run_dir,
                self.model.geometry,
                self.model.namespace,
                self.config.curve,
            )
            self.saver = Saver(self.store, loop, self._chunk_saved)
            self.saver.start()
            await self.store.start(_STORE_WAIT_S)
        with ThreadPoolExecutor(1) as starting:
            await loop.run_in_executor(starting, self.buffers.warm, self._warm_tokens())

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
        )
        # The engine alone computes on several cores. Were there more than those in OpenMP's threads, it would put them
        # to sleep after each product.
        torch.set_num_threads(1)
        self.buffers.on_given = memory_given
        self.loader = Loader(checked.model.rotary, self.engine.poke)
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
            kv.pending_saves += 1

            def ended(saved: bool) -> None:
                loop.call_soon_threadsafe(saved_on_loop, saved)

            def saved_on_loop(saved: bool) -> None:
                kv.pending_saves -= 1
                self.retained.trim()
                self.admission.wake()  # it may be let go from now on
                if not saved:
                    self.metrics.unsaved_turns.inc()
                    return
                # Told by the daemon from now on; ours has the chunk ids, too.
                self.manifests.put(save.saved_manifest(manifest))

            saver.finish(save, manifest, ended)
        self.retained.put(namespace, computed, kv)

    def record(self, usage: TurnUsage, job: Job) -> None:
        """Metrics and the log line of a finished turn."""
        prefill_s = job.first_token_s - job.admitted_s
        self.metrics.prefill_seconds.observe(prefill_s)
        stats = self.engine.stats
        hits = usage.hbm + usage.dram + usage.ssd
        load = job.load
        load_s = 0.0
        if load is not None and load.ended_s:
            load_s = load.ended_s - load.started_s
            self.metrics.load_seconds.labels("ssd" if usage.ssd else "dram").observe(load_s)
            self.metrics.overlap_ratio.observe(load.overlap_ratio)
        if hits and stats.prefill_tokens:
            per_token_s = stats.prefill_s / stats.prefill_tokens
            self.metrics.prefill_seconds_saved.inc(max(0.0, hits * per_token_s - load_s))
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
        )

    async def _run_turn(self, call: Call, message: RunTurn) -> TurnDone:
        if self._is_stopping:
            raise PeerUnavailable("the inference process is stopping")
        if self._turns >= self.config.max_running:
            raise CapacityError(f"{self._turns} turns are running")
        self._turns += 1
        try:
            return await Turn(self, call, message).run()
        finally:
            self._turns -= 1

    @staticmethod
    async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
        for _ in range(int(timeout_s / 0.02)):
            if condition():
                return
            await asyncio.sleep(0.02)


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
