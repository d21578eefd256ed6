"""python -m benchmarks.gateway [--json FILE]: added TTFT at 50 requests/s, 1,000 open streams, memory per conversation.

The gateway is the real one, in its own process, with its journal on disk. Inference and kvdaemon are stand-ins on the
real ZeroMQ protocol (stand_in.py): the model's time would hide what is measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.gateway.load import DirectClient, HttpClients, Sample, at_rate, quantile
from benchmarks.stack import free_port

_READY_S = 60.0
_BATCHES = 4
_PACE_S = {"rate": 0.02, "streams": 1.0, "memory": 0.0}  # between tokens


class Processes:
    """The gateway and the stand-ins, with a directory of their own."""

    def __init__(self, gap_s: float) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="ca-bench-", dir="/dev/shm"))
        self._data = Path(tempfile.mkdtemp(prefix="ca-bench-"))
        self.port = free_port()
        self.inference = f"ipc://{self._home}/inference.sock"
        kvdaemon = f"ipc://{self._home}/kvdaemon.sock"
        stand_in = ["-m", "benchmarks.gateway.stand_in", "--inference", self.inference, "--kvdaemon", kvdaemon]
        settings = {"port": self.port, "data_dir": self._data, "run_dir": self._home, "log_level": "warning"}
        self._log = (self._data / "gateway.log").open("wb")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CACHEDATTENTION_")}
        environment |= {f"CACHEDATTENTION_{key.upper()}": str(value) for key, value in settings.items()}
        self._stand_in = subprocess.Popen([sys.executable, *stand_in, "--gap-s", str(gap_s)])
        self._gateway = subprocess.Popen(
            [sys.executable, "-m", "cli", "gateway"], env=environment, stdout=self._log, stderr=self._log
        )

    def wait_ready(self) -> None:
        """Raises RuntimeError: it is not, in time."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self.port}/ready").json()["state"] == "ok":
                    return
            time.sleep(0.05)
        raise RuntimeError((self._data / "gateway.log").read_text()[-2000:])

    def gateway_bytes(self) -> int:
        """Resident memory."""
        return int(psutil.Process(self._gateway.pid).memory_info().rss)

    def gateway_cpu_s(self) -> float:
        times = psutil.Process(self._gateway.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        for process in (self._gateway, self._stand_in):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)
        self._log.close()
        shutil.rmtree(self._home, ignore_errors=True)
        shutil.rmtree(self._data, ignore_errors=True)


@contextlib.contextmanager
def running(gap_s: float) -> Iterator[Processes]:
    processes = Processes(gap_s)
    try:
        processes.wait_ready()
        yield processes
    finally:
        processes.stop()


async def added_ttft(processes: Processes, rate: float, seconds: float, rounds: int, tokens: int) -> dict[str, Any]:
    """Rounds straight to inference and rounds through the gateway in turn, so that both meet the same machine."""
    direct, http = DirectClient(processes.inference), HttpClients(processes.port)
    await direct.start()
    found: dict[str, list[Sample]] = {"direct": [], "gateway": []}
    cpu_s = 0.0
    try:
        for _ in range(20):  # connections, caches, compiled statements
            await http.turn(0, 1)
        for number in range(rounds):
            found["direct"] += await at_rate(lambda n: direct.turn(n, tokens), rate, seconds, seed=2 * number + 1)
            http.close()
            before_s = processes.gateway_cpu_s()
            found["gateway"] += await at_rate(lambda n: http.turn(n, tokens), rate, seconds, seed=2 * number + 2)
            cpu_s += processes.gateway_cpu_s() - before_s
    finally:
        http.close()
        await direct.stop()
    figures: dict[str, Any] = {"requests_per_s": rate, "tokens": tokens, "rounds": rounds, "seconds": seconds}
    for way, samples in found.items():
        first = [sample.first_token_s * 1e3 for sample in samples]
        figures[way] = {"requests": len(first), "p50_ms": quantile(first, 0.5), "p99_ms": quantile(first, 0.99)}
    for share in ("p50_ms", "p99_ms"):
        figures[f"added_{share}"] = figures["gateway"][share] - figures["direct"][share]
    figures["gateway_cpu_s_per_request"] = cpu_s / max(1, figures["gateway"]["requests"])
    return figures


async def open_streams(processes: Processes, streams: int, tokens: int) -> dict[str, Any]:
    """All open at once, each getting a token a second; the last ones begin while all others run."""
    http = HttpClients(processes.port)
    try:
        await http.turn(0, 1)
        before, cpu_s, begin_s = processes.gateway_bytes(), processes.gateway_cpu_s(), time.perf_counter()
        tasks = []
        for number in range(streams):
            tasks.append(asyncio.ensure_future(http.turn(number, tokens)))
            await asyncio.sleep(0.004)
        opening_s = time.perf_counter() - begin_s
        await asyncio.sleep(1.0)
        open_now = sum(not task.done() for task in tasks)
        held = processes.gateway_bytes() - before
        samples = await asyncio.gather(*tasks)
        wall_s = time.perf_counter() - begin_s
    finally:
        http.close()
    late = [(sample.done_s - sample.first_token_s) - (tokens - 1) for sample in samples]
    return {
        "streams": streams,
        "open_at_once": open_now,
        "opening_s": opening_s,
        "tokens_per_stream": tokens,
        "ttft_p99_ms": quantile([sample.first_token_s * 1e3 for sample in samples], 0.99),
        "late_at_end_p99_ms": quantile(late, 0.99) * 1e3,
        "bytes_per_stream": held / streams,
        "gateway_cores": (processes.gateway_cpu_s() - cpu_s) / wall_s,
    }


async def idle_memory(processes: Processes, conversations: int, warm: int) -> dict[str, Any]:
    """Memory after equal batches of conversations, which then lie idle.

    warm: so many come before, for what is bounded to be full: SQLite's pages, the turns that the page tells of, the
    allocator's arenas.
    """
    http = HttpClients(processes.port)

    async def talk(first: int, count: int) -> None:
        for start in range(first, first + count, 16):
            await asyncio.gather(*(http.turn(number, 1) for number in range(start, min(start + 16, first + count))))

    try:
        await talk(0, warm)
        sizes = [processes.gateway_bytes()]
        for batch in range(_BATCHES):
            await talk(warm + batch * conversations, conversations)
            sizes.append(processes.gateway_bytes())
    finally:
        http.close()
    return {
        "warm_conversations": warm,
        "conversations_per_batch": conversations,
        "resident_bytes": sizes,
        "bytes_per_conversation": (sizes[-1] - sizes[0]) / (_BATCHES * conversations),
    }


def measure(seconds: float, rounds: int, streams: int, conversations: int, warm: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    with running(_PACE_S["rate"]) as processes:
        figures["added_ttft"] = asyncio.run(added_ttft(processes, 50.0, seconds, rounds, tokens=16))
    with running(_PACE_S["streams"]) as processes:
        figures["open_streams"] = asyncio.run(open_streams(processes, streams, tokens=12))
    with running(_PACE_S["memory"]) as processes:
        figures["idle_memory"] = asyncio.run(idle_memory(processes, conversations, warm))
    return figures


def show(figures: dict[str, Any]) -> None:
    added, streams, memory = figures["added_ttft"], figures["open_streams"], figures["idle_memory"]
    table = Table("figure", "measured", "held to")
    for way in ("direct", "gateway"):
        table.add_row(f"TTFT {way}, p50 / p99", f"{added[way]['p50_ms']:.2f} / {added[way]['p99_ms']:.2f} ms", "")
    table.add_row("added TTFT, p50", f"{added['added_p50_ms']:.2f} ms", "3 ms")
    table.add_row("added TTFT, p99", f"{added['added_p99_ms']:.2f} ms", "15 ms")
    table.add_row("gateway's CPU per request", f"{added['gateway_cpu_s_per_request'] * 1e3:.1f} ms", "")
    table.add_row("streams open at once", f"{streams['open_at_once']:,}", f"{streams['streams']:,}")
    table.add_row("memory per open stream", f"{streams['bytes_per_stream'] / 1024:.1f} KiB", "")
    table.add_row("the gateway's share of a core then", f"{streams['gateway_cores']:.2f}", "")
    table.add_row("memory per idle conversation", f"{memory['bytes_per_conversation']:.0f} bytes", "0")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3, help="straight and through the gateway, each")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--conversations", type=int, default=1000, help="of each of four batches")
    parser.add_argument("--warm", type=int, default=5000, help="conversations before the first batch")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    figures = measure(given.seconds, given.rounds, given.streams, given.conversations, given.warm)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    show(figures)


if __name__ == "__main__":
    main()
