"""`cachedattention doctor`: what of this machine will be in the way, and what to change."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from cli.settings import Settings
from cli.sizes import format_size
from inference.embedded import MODEL
from protocol.arena import exclusive
from protocol.errors import ConfigError
from protocol.rpc import check_endpoint

GIB = 1024**3
_PYTHON = (3, 11)
_OPEN_FILES = 4096  # RocksDB keeps its tables open
_MODEL_ROOM = 1 * GIB  # beside the DRAM tier, for a small model and its working KV, at each worker
_OUTSIDE_THE_ARENA = 250 * 1024**2
_TMPFS_MAGIC = ("tmpfs", "ramfs")
_LOOK_AT_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.cuda.get_device_name(0) if cuda else None,
    "bytes": torch.cuda.get_device_properties(0).total_memory if cuda else 0,
}))
"""

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def run_doctor(settings: Settings, *, as_json: bool) -> int:
    """Print the findings. Returns 1 where one of them stops the system from working."""
    findings = examine(settings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        table = Table(box=None, pad_edge=False)
        for title in ("", "check", "found", "what to change"):
            table.add_column(title, overflow="fold")
        for finding in findings:
            verdict = f"[{colours[finding.verdict]}]{finding.verdict}[/]"
            table.add_row(verdict, *(_escaped(text) for text in (finding.check, finding.found, finding.advice)))
        Console(highlight=False).print(table)
    return 1 if any(finding.verdict == "fail" for finding in findings) else 0


def examine(settings: Settings) -> list[Finding]:
    """All checks. Changes nothing that stays."""
    checks: list[Callable[[Settings], Iterator[Finding]]] = [
        _python,
        _cpu,
        _memory,
        _run_dir,
        _data_dir,
        _open_files,
        _device,
        _ports,
        _sockets,
        _model,
    ]
    return [finding for check in checks for finding in check(settings)]


def _python(settings: Settings) -> Iterator[Finding]:
    good = sys.version_info >= _PYTHON
    yield Finding("Python", "ok" if good else "fail", platform.python_version(), "" if good else "3.11 or newer")
    if not sys.platform.startswith("linux"):
        yield Finding("system", "fail", platform.system(), "Linux: shared memory and process control need it")


def _cpu(settings: Settings) -> Iterator[Finding]:
    flags: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    names = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if name in flags]
    found = f"{os.cpu_count()} cores, {', '.join(names) or 'no vector features known'}"
    bf16 = {"avx512_bf16", "amx_bf16", "bf16"} & flags
    if settings.dtype == "bfloat16" and settings.device != "cuda" and not bf16:
        yield Finding("CPU", "warn", found, "this CPU computes bfloat16 slowly; --dtype float32")
    else:
        yield Finding("CPU", "ok", found)


def _memory(settings: Settings) -> Iterator[Finding]:
    free = psutil.virtual_memory().available
    needed = settings.dram + _OUTSIDE_THE_ARENA + _MODEL_ROOM * settings.workers
    found = f"{format_size(free)} available, --dram {format_size(settings.dram)}"
    if settings.dram > free:
        yield Finding(
            "memory", "fail", found, f"lower --dram below {format_size(max(0, free - needed + settings.dram))}"
        )
    elif needed > free:
        yield Finding("memory", "warn", found, "little is left for the model; lower --dram")
    else:
        yield Finding("memory", "ok", found)


def _run_dir(settings: Settings) -> Iterator[Finding]:
    place = _nearest(settings.run_dir)
    kind, mount = _filesystem(place)
    if kind not in _TMPFS_MAGIC:
        yield Finding(
            "shared memory", "warn", f"{settings.run_dir} is on {kind}", "a --run-dir on tmpfs: DRAM tier at disk speed"
        )
    usage = shutil.disk_usage(place)
    free = usage.free + _size_of(settings.run_dir / "arena")  # an arena that is there is adopted or replaced
    found = f"{format_size(free)} free on {mount}, --dram {format_size(settings.dram)}"
    if settings.dram > free:
        advice = f"mount -o remount,size={int(1.1 * settings.dram) >> 20}m {mount}, or lower --dram"
        yield Finding("room for --dram", "fail", found, advice)
    else:
        yield Finding("room for --dram", "ok", found)
    if not os.access(place, os.W_OK):
        yield Finding("run-dir", "fail", f"{place} cannot be written", "another --run-dir")


def _data_dir(settings: Settings) -> Iterator[Finding]:
    place = _nearest(settings.data_dir)
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Finding("data-dir", "fail", f"{place} cannot be written", "another --data-dir, or its permissions")
        return
    for name in ("up", "kvdaemon", "gateway"):
        path = settings.data_dir / f"{name}.lock"
        if not path.exists():
            continue
        try:
            with exclusive(path, name):
                pass
        except ConfigError as error:
            yield Finding("data-dir", "fail", error.message, "stop it, or another --data-dir")
            break
    else:
        yield Finding("data-dir", "ok", f"{settings.data_dir} is free")
    free = shutil.disk_usage(place).free + _size_of(settings.data_dir / "ssd")
    found = f"{format_size(free)} free, --ssd {format_size(settings.ssd)}"
    if settings.ssd > free:
        yield Finding("room for --ssd", "fail", found, f"lower --ssd below {format_size(free)}, or free some disk")
    else:
        yield Finding("room for --ssd", "ok", found)


def _open_files(settings: Settings) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES
    yield Finding(
        "open files",
        "ok" if enough else "warn",
        f"limit {soft} (hard {hard})",
        "" if enough else f"ulimit -n {_OPEN_FILES}",
    )


def _device(settings: Settings) -> Iterator[Finding]:
    """torch is loaded by another process: it takes seconds and hundreds of megabytes, and may crash."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK_AT_TORCH], capture_output=True, text=True, timeout=120, check=True
        )
        seen = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        yield Finding("torch", "fail", said[-1] if said else "cannot be imported", "make clean && make run")
        return
    yield Finding("torch", "ok", seen["version"])
    if seen["cuda"] is None:
        verdict: Verdict = "fail" if settings.device == "cuda" else "ok"
        yield Finding("device", verdict, "cpu", "--device cpu, or a driver for the GPU" if verdict == "fail" else "")
        return
    yield Finding("device", "ok", f"{seen['cuda']}, {format_size(seen['bytes'])}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if settings.device != "cpu" and locked not in (resource.RLIM_INFINITY, -1) and locked < settings.dram:
        yield Finding("locked memory", "warn", format_size(locked), "ulimit -l unlimited, or the arena is not pinned")


def _ports(settings: Settings) -> Iterator[Finding]:
    wanted = [
        ("port", settings.host, settings.port),
        *(("metrics-port-inference", settings.metrics_host, port) for port in settings.worker_metrics_ports()),
        ("metrics-port-kvdaemon", settings.metrics_host, settings.metrics_port_kvdaemon),
    ]
    with ExitStack() as held:
        for name, host, port in wanted:
            try:
                family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                probe = held.enter_context(socket.socket(family, kind, number))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                yield Finding(f"--{name}", "fail", f"{host}:{port}: {reason}", f"another --{name}")
            else:
                yield Finding(f"--{name}", "ok", f"{host}:{port} is free")


def _sockets(settings: Settings) -> Iterator[Finding]:
    path = f"{settings.run_dir}/inference{f'-{settings.workers}' if settings.workers > 1 else ''}.sock"
    try:
        check_endpoint(f"ipc://{path}", None)
    except ConfigError as error:
        yield Finding("socket paths", "fail", error.message, "a shorter --run-dir")
    else:
        yield Finding("socket paths", "ok", f"{len(os.fsencode(path))} of 107 bytes")


def _model(settings: Settings) -> Iterator[Finding]:
    """A directory is looked into; a hub id is judged by inference when it loads it."""
    if settings.model == "embedded" and not any(MODEL.glob("*.safetensors")):
        yield Finding("model", "fail", f"{MODEL} has no weights", "install the package again, or another --model")
        return
    place = Path(settings.model).expanduser()
    if settings.model == "embedded" or not place.is_dir():
        yield Finding("model", "ok", settings.model)
        return
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Finding(
            "model", "fail", f"{place}/config.json: {type(error).__name__}", "a directory with a model of transformers"
        )
        return
    if not list(place.glob("*.safetensors")):
        yield Finding("model", "fail", f"{place} has no *.safetensors", "convert the weights; nothing else is loaded")
        return
    rotary = any("rope" in key for key in config) or any("rope" in key for key in (config.get("text_config") or {}))
    if rotary:
        yield Finding("model", "ok", f"{kind}, {place}")
    else:
        yield Finding("model", "warn", f"{kind}: no rotary positions in its config", "a RoPE model, if it is refused")


def _nearest(path: Path) -> Path:
    """`path`, or the closest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _filesystem(path: Path) -> tuple[str, str]:
    """Type and mount point of what `path` lies on."""
    resolved = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if resolved.is_relative_to(part.mountpoint)]
    if not mounts:
        return "unknown", str(path)
    deepest = max(mounts, key=lambda part: len(part.mountpoint))
    return deepest.fstype, deepest.mountpoint


def _size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.stat().st_blocks * 512
    return total


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
