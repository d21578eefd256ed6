"""The engines as servers: processes with an OpenAI-compatible API, started, weighed and stopped in one way."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import psutil

from benchmarks.engine import environments
from benchmarks.stack import Stack, free_port

Dtype = Literal["bfloat16", "float32"]
_READY_S = 180.0
_STOPPED_S = 30.0
_REST_S = 2.0
_AT_REST_S = 0.1  # with less than a tenth of a core


@dataclass(frozen=True)
class Setting:
    """What every engine is given.

    kv_bytes: memory for the KV of conversations that wait for their next turn; what an engine needs for the turn that
    runs may come on top. context: longest conversation in tokens. running: turns at once.
    """

    model: Path
    dtype: Dtype
    threads: int
    context: int
    kv_bytes: int
    running: int


class Server(ABC):
    """One engine on one setting. Not safe from several threads."""

    def __init__(self, setting: Setting, home: Path) -> None:
        self.setting = setting
        self.home = home
        self.url = ""

    @abstractmethod
    def launch(self) -> None:
        """Start the processes and do not wait."""

    @abstractmethod
    def processes(self) -> list[psutil.Process]:
        """Those that were started and live, without their children."""

    @abstractmethod
    def stop(self) -> None:
        """Also after a start that failed."""

    @property
    @abstractmethod
    def has_died(self) -> bool:
        """Whether a process that was started has ended."""

    @abstractmethod
    def log(self) -> str:
        """What the processes said."""

    @property
    def ready(self) -> str:
        """The path that answers 200 when the model can be asked."""
        return "/health"

    def start(self) -> float:
        """Seconds until it was ready. Raises RuntimeError: it died, or is not ready in time."""
        started = time.monotonic()
        self.launch()
        while time.monotonic() < started + _READY_S and not self.has_died:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}{self.ready}", trust_env=False).status_code == 200:
                    return time.monotonic() - started
            time.sleep(0.05)
        raise RuntimeError(f"{type(self).__name__} is not ready:\n{self.log()[-3000:]}")

    def family(self) -> list[psutil.Process]:
        """All processes of it that live."""
        return [p for started in self.processes() for p in (started, *started.children(recursive=True))]

    def memory_bytes(self) -> int:
        """Of all processes, as if no other engine were up: each page counts once, shared memory included.

        Pages of a file are counted where most of them are mapped; other engines may map the same libraries.
        """
        private, files = 0, dict[str, int]()
        for process in self.family():
            for mapped in process.memory_maps():
                if mapped.path.startswith("/"):
                    files[mapped.path] = max(files.get(mapped.path, 0), mapped.rss)
                else:
                    private += mapped.pss
        return private + sum(files.values())

    async def rest(self) -> None:
        """Wait, for a while at most, until it computes no more: threads that spin, KV that is still being saved."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it died: found out by who asks it next
            busy_s = self._cpu_s()
            for _ in range(round(_REST_S / _AT_REST_S)):
                await asyncio.sleep(_AT_REST_S)
                before_s, busy_s = busy_s, self._cpu_s()
                if busy_s - before_s <= _AT_REST_S / 10:
                    return

    def _cpu_s(self) -> float:
        times = [process.cpu_times() for process in self.family()]
        return sum(each.user + each.system for each in times)


class Ours(Server):
    """Gateway, inference and kvdaemon. The KV of finished turns lies in the DRAM tier and behind it on SSD."""

    retain_bytes = 0

    def __init__(self, setting: Setting, home: Path) -> None:
        super().__init__(setting, home)
        self._stack = Stack(
            home,
            setting.model,
            {
                "dram": setting.kv_bytes,
                "ssd": "8GiB",
                "retain": self.retain_bytes,
                "dtype": setting.dtype,
                "max_context": setting.context,
                "max_running": setting.running,
                "log_level": "warning",
            },
        )
        self.url = self._stack.url

    @property
    def ready(self) -> str:
        return "/ready"

    def launch(self) -> None:
        for service in ("kvdaemon", "inference", "gateway"):
            self._stack.launch(service)

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self._stack.processes.values() if process.poll() is None]

    @property
    def has_died(self) -> bool:
        return any(process.poll() is not None for process in self._stack.processes.values())

    def stop(self) -> None:
        self._stack.stop()

    def log(self) -> str:
        return "\n".join(self._stack.log_tail(service) for service in self._stack.processes)


class OursRetaining(Ours):
    """As it is started by default: finished turns stay in working KV as well, as long as there is room."""

    retain_bytes = 512 * 2**20


class Program(Server):
    """A server that is one command."""

    def __init__(self, setting: Setting, home: Path) -> None:
        super().__init__(setting, home)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: psutil.Popen | None = None

    @abstractmethod
    def command(self) -> Sequence[str | Path]: ...

    def variables(self) -> dict[str, str]:
        """What the environment has beside that of all peers."""
        return {}

    def launch(self) -> None:
        environment = environments.environment() | self.variables()
        with (self.home / "log").open("ab") as log:
            self._process = psutil.Popen(
                [str(part) for part in self.command()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def processes(self) -> list[psutil.Process]:
        return [] if self._process is None or self.has_died else [self._process]

    @property
    def has_died(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        family = self.family()
        for process in family[:1]:
            process.terminate()
        _, alive = psutil.wait_procs(family, _STOPPED_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, _STOPPED_S)

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")


class Transformers(Program):
    """transformers' `generate` with a DynamicCache for each conversation."""

    options: tuple[str, ...] = ()

    def command(self) -> Sequence[str | Path]:
        s = self.setting
        place = ["--port", str(self.port), "--kv-bytes", str(s.kv_bytes)]
        named = ["--dtype", s.dtype, "--threads", str(s.threads)]
        return [sys.executable, "-m", "benchmarks.engine.transformers_server", s.model, *place, *named, *self.options]


class TransformersBatching(Transformers):
    """transformers' continuous batching, with its blocks and prefix sharing."""

    options = ("--continuous-batching",)


class LlamaServer(Program):
    """llama.cpp's server with as many slots as turns run at once; other conversations lie in its RAM prompt cache."""

    def command(self) -> Sequence[str | Path]:
        s = self.setting
        weights = self._weights()
        kv = "f32" if s.dtype == "float32" else "f16"
        return [
            *(environments.llama_server(), "--model", weights, "--alias", "default", "--port", str(self.port)),
            *("--threads", str(s.threads), "--threads-batch", str(s.threads), "--parallel", str(s.running)),
            *("--ctx-size", str(s.context * s.running), "--cache-type-k", kv, "--cache-type-v", kv),
            *("--cache-ram", str(s.kv_bytes // 2**20), "--jinja", "--reasoning-format", "none", "--no-webui"),
        ]

    def _weights(self) -> Path:
        """The model in llama.cpp's format, made once."""
        weights = environments.home("llama") / f"{self.setting.model.name}-{self.setting.dtype}.gguf"
        if not weights.exists():
            program = Path(__file__).with_name("gguf_writer.py")
            command = [environments.python("llama"), program, self.setting.model, self.setting.dtype, weights]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
        return weights


class Vllm(Program):
    """vLLM's CPU build with prefix caching."""

    def command(self) -> Sequence[str | Path]:
        s = self.setting
        return [
            *(environments.python("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--model", s.model),
            *("--served-model-name", "default", "--port", str(self.port), "--dtype", s.dtype),
            *("--max-model-len", str(s.context), "--max-num-seqs", str(s.running)),
            *("--kv-cache-memory-bytes", str(s.kv_bytes)),
            *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
        ]

    def variables(self) -> dict[str, str]:
        """By default it computes on all cores but one."""
        return {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


@contextlib.contextmanager
def running(kind: type[Server], setting: Setting) -> Iterator[tuple[Server, float]]:
    """A started server and the seconds that it took, stopped at the end. Raises RuntimeError: it did not start."""
    with tempfile.TemporaryDirectory(prefix="ca-engine-") as home:
        server = kind(setting, Path(home))
        try:
            yield server, server.start()
        finally:
            server.stop()
