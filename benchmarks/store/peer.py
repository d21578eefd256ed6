"""Beside LMCache's storage manager (LocalCPUBackend and LocalDiskBackend), on chunks of the same size and number.

LMCache runs in its own process and environment (lmcache_environment.py, lmcache_side.py); it holds its store in the
engine's process, ours lies behind a daemon, so our figures carry the requests that theirs need not. Both copy from and
to the engine's buffers on one thread. LMCache stores keys rotated and checks nothing; ours are verified, and shown
with and without rotating them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.stack import Stack, drop_page_cache
from benchmarks.store import lmcache_environment
from benchmarks.store.engine import CHUNK_TOKENS, Context, EngineSide, engine_side, kv_shape, running_daemon
from benchmarks.store.figures import Figure, Section, alternate, rates
from inference.preload import LoadFailed
from inference.working_kv import KvShape, WorkingKv
from protocol.ids import new_id
from protocol.messages import Acquire

_MIB = 2**20
_ANSWER_S = 120.0
_WRITTEN_S = 120.0
_FLUSHED_S = 5.0


class LmCache:
    """LMCache's side: a process, and commands to it. Not safe from several threads."""

    def __init__(self, disk: Path, ram_bytes: int, disk_bytes: int, shape: KvShape, *, direct: bool = False) -> None:
        self.disk = disk
        settings = {
            "disk": str(disk),
            "ram_gb": ram_bytes / 2**30,
            "disk_gb": disk_bytes / 2**30,
            "layers": shape.layers,
            "heads": shape.kv_heads,
            "direct": direct,
        }
        answers, theirs = os.pipe()
        program = Path(__file__).with_name("lmcache_side.py")
        self._process = subprocess.Popen(
            [lmcache_environment.python(), program, str(theirs), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs,),
            env=lmcache_environment.environment(),
            text=True,
        )
        os.close(theirs)
        self._answers = os.fdopen(answers)
        self._answer()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Raises RuntimeError: it failed, or died; TimeoutError: it does not answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        if not select.select([self._answers], [], [], _ANSWER_S)[0]:
            raise TimeoutError(f"LMCache does not answer within {_ANSWER_S:.0f} s")
        line = self._answers.readline()  # one answer for each command: nothing is left in the buffer
        if not line:
            raise RuntimeError(f"LMCache's process ended with {self._process.wait(10)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"LMCache: {answer['error']}")
        return answer

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        self._answers.close()


@contextlib.contextmanager
def _lmcache(disk: Path, ram_bytes: int, disk_bytes: int, shape: KvShape, *, direct: bool = False) -> Iterator[LmCache]:
    home = Path(tempfile.mkdtemp(prefix="ca-lmcache-", dir=disk))
    peer = LmCache(home, ram_bytes, disk_bytes, shape, direct=direct)
    try:
        yield peer
    finally:
        peer.kill()
        shutil.rmtree(home, ignore_errors=True)


def measure(disk: Path, quick: bool, step: Callable[[], None]) -> Section:
    section = Section("peer", f"Beside LMCache {lmcache_environment.LMCACHE}'s storage manager")
    problem = lmcache_environment.problem()
    if problem:
        section.facts["LMCache"] = problem
        return section
    shape = kv_shape(_MIB, 2 if quick else 8)
    chunks = 2 if quick else 16
    section.figures += _speeds(disk, shape, chunks, 6 if quick else 8, step)
    few = 4 if quick else 16
    section.facts |= _after_kill(disk, shape, few)
    step()
    section.facts |= _bit_flips(disk, shape, few)
    step()
    section.facts |= _full_disk(shape)
    step()
    return section


# -- speed ----------------------------------------------------------------------------------------------------


def _speeds(disk: Path, shape: KvShape, chunks: int, rounds: int, step: Callable[[], None]) -> list[Figure]:
    nbytes = chunks * CHUNK_TOKENS * shape.token_bytes
    tokens = chunks * CHUNK_TOKENS
    held = 3  # contexts in RAM at once, and buffers that take turns
    total = rounds + held + 1
    ram = (held + 1) * nbytes + _MIB  # fewer contexts than there are rounds
    with (
        running_daemon(disk, dram=f"{ram // _MIB}MiB", ssd="64GiB") as stack,
        engine_side(stack, shape, tokens) as ours,
        _lmcache(disk, ram, 4 * total * nbytes, shape) as theirs,
        _lmcache(disk, ram, 4 * total * nbytes, shape, direct=True) as theirs_direct,
    ):
        sources = [ours.computed(tokens, seed) for seed in range(held)]
        targets = [ours.working_kv(tokens, tokens) for _ in range(held)]
        peers = {"LMCache": theirs, "LMCache, O_DIRECT": theirs_direct}
        for peer in peers.values():
            for which in range(held):
                peer.ask("fill", which=which, first=which * chunks, chunks=chunks)
        saved: list[Context] = []
        put: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        stored: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        for turn in range(rounds):
            context = ours.new_context(chunks)
            started = time.perf_counter()
            put["ours"].append(ours.save(context, sources[turn % held]))
            wait_written(stack)
            stored["ours"].append(time.perf_counter() - started)
            saved.append(context)
            for name, peer in peers.items():
                first = turn * chunks
                started = time.perf_counter()
                put[name].append(peer.ask("put", which=turn % held, first=first, chunks=chunks)["seconds"])
                peer.ask("drain", first=first, chunks=chunks, limit_s=_WRITTEN_S)
                stored[name].append(time.perf_counter() - started)
            time.sleep(_FLUSHED_S / 2)
            step()

        def load(context: Context, which: int, rotate: bool) -> float:
            started = time.perf_counter()
            lease = ours.acquire(context)
            ours.load(lease, targets[which], rotate=rotate)
            seconds = time.perf_counter() - started
            ours.release(lease)
            return seconds

        def from_ram(i: int, rotate: bool) -> float:
            return load(saved[-1 - i % held], i % held, rotate)

        def peer_from_ram(peer: LmCache, i: int) -> float:
            first = (rounds - 1 - i % held) * chunks
            return _all(peer.ask("get", which=i % held, first=first, chunks=chunks), chunks)

        ram_found = alternate(
            rounds * 2,
            {
                "ours": lambda i: from_ram(i, False),
                "ours, keys rotated": lambda i: from_ram(i, True),
                "LMCache": lambda i: peer_from_ram(theirs, i),
            },
            step,
        )

        def from_disk(i: int) -> float:
            saved.append(saved.pop(0))  # the one that was used longest ago: no longer in DRAM
            drop_page_cache(stack.data_dir)
            return load(saved[-1], i % held, False)

        def peer_from_disk(peer: LmCache, i: int) -> float:
            first = (i // 3 % rounds) * chunks
            peer.ask("forget_ram", first=first, chunks=chunks)
            drop_page_cache(peer.disk)
            return _all(peer.ask("get", which=i % held, first=first, chunks=chunks), chunks)

        disk_found = alternate(
            rounds,
            {
                "ours": from_disk,
                "LMCache": lambda i: peer_from_disk(theirs, i),
                "LMCache, O_DIRECT": lambda i: peer_from_disk(theirs_direct, i),
            },
            step,
        )
    return [
        *_against(put, "put into RAM", nbytes),
        *_against(stored, "put until on disk", nbytes),
        *_against(ram_found, "get from RAM", nbytes),
        *_against(disk_found, "get from cold disk", nbytes),
    ]


def _all(answer: dict[str, Any], chunks: int) -> float:
    if answer["hits"] < chunks:
        raise RuntimeError(f"LMCache had {answer['hits']} of {chunks} chunks")
    return float(answer["seconds"])


def _against(found: dict[str, list[float]], what: str, nbytes: int) -> list[Figure]:
    """Each of ours against each of LMCache's."""
    median = {name: statistics.median(rates(seconds, nbytes)) for name, seconds in found.items()}
    return [
        Figure(f"{what}{name.removeprefix('ours')}", median[name], "GB/s", median[peer], peer,
               at_least=1.0 if name == "ours" else None, samples=rates(found[name], nbytes))
        for name in found if name.startswith("ours") for peer in found if not peer.startswith("ours")
    ]  # fmt: skip


# -- behaviour ------------------------------------------------------------------------------------------------


def _after_kill(disk: Path, shape: KvShape, chunks: int) -> dict[str, str]:
    """What still hits after kill -9 of everything, with DRAM kept by the kernel and with it gone."""
    facts: dict[str, str] = {}
    nbytes = chunks * CHUNK_TOKENS * shape.token_bytes
    ram = 2 * nbytes + 64 * _MIB
    with running_daemon(disk, dram=f"{ram // _MIB}MiB", ssd="64GiB") as stack, engine_side(stack, shape, 4096) as ours:
        context, source = _saved(ours, stack, chunks)
        kill_store(stack)
        stack.start("kvdaemon")
        kept = _outcomes(ours, context, source)
        kill_store(stack)
        (stack.run_dir / "arena").unlink()
        stack.start("kvdaemon")
        gone = _outcomes(ours, context, source)
        facts["kill -9, ours"] = f"{kept}; with the memory lost as well: {gone}"
    with _lmcache(disk, ram, 4 * nbytes, shape) as theirs:
        theirs.ask("fill", which=0, first=0, chunks=chunks)
        theirs.ask("put", which=0, first=0, chunks=chunks)
        theirs.ask("drain", first=0, chunks=chunks, limit_s=_WRITTEN_S)
        theirs.kill()
        left = sum(path.stat().st_size for path in theirs.disk.iterdir()) / _MIB
        again = LmCache(theirs.disk, ram, 4 * nbytes, shape)
        try:
            outcome = again.ask("check", first=0, chunks=chunks)
        finally:
            again.kill()
        facts["kill -9, LMCache"] = f"{_words(outcome)}; files of {left:.0f} MiB stay on disk and count nowhere"
    return facts


def _bit_flips(disk: Path, shape: KvShape, chunks: int) -> dict[str, str]:
    """One bit of every 16 MiB of the files that hold KV flips. What is delivered then?"""
    facts: dict[str, str] = {}
    nbytes = chunks * CHUNK_TOKENS * shape.token_bytes
    ram = 2 * nbytes + 64 * _MIB
    with running_daemon(disk, dram=f"{ram // _MIB}MiB", ssd="64GiB") as stack, engine_side(stack, shape, 4096) as ours:
        context, source = _saved(ours, stack, chunks)
        kill_store(stack)
        (stack.run_dir / "arena").unlink()
        flipped = sum(_flip(path) for path in (stack.data_dir / "ssd" / "chunks").iterdir())
        drop_page_cache(stack.data_dir)
        stack.start("kvdaemon")
        facts["bit flips on disk, ours"] = f"{flipped} bits: {_outcomes(ours, context, source)}"
    with _lmcache(disk, ram, 4 * nbytes, shape) as theirs:
        theirs.ask("fill", which=0, first=0, chunks=chunks)
        theirs.ask("put", which=0, first=0, chunks=chunks)
        theirs.ask("drain", first=0, chunks=chunks, limit_s=_WRITTEN_S)
        theirs.ask("forget_ram", first=0, chunks=chunks)
        flipped = sum(_flip(path) for path in sorted(theirs.disk.iterdir())[::2])
        drop_page_cache(theirs.disk)
        outcome = theirs.ask("check", first=0, chunks=chunks)
        facts["bit flips on disk, LMCache"] = f"{flipped} bits: {_words(outcome)}"
    return facts


def _full_disk(shape: KvShape) -> dict[str, str]:
    """A disk with room for half of what is put. What is there afterwards, and once there is room again?"""
    facts: dict[str, str] = {}
    chunk_bytes = CHUNK_TOKENS * shape.token_bytes
    in_ram = 8
    chunks = max(3 * in_ram, 320 * _MIB // chunk_bytes)
    ram = in_ram * chunk_bytes + 2 * _MIB
    room = chunks * chunk_bytes // 2
    with _small_disk(room + 2 * chunks * chunk_bytes) as small:
        if small is None:
            return {"full disk": "not tried: a small tmpfs needs root and the right to mount"}
        filler = small / "filler"
        with (
            running_daemon(small, dram=f"{ram // _MIB}MiB", ssd="64GiB") as stack,
            engine_side(stack, shape, 256) as ours,
        ):
            _fill_up(filler, room)
            source = ours.computed(CHUNK_TOKENS, 0)
            contexts = [ours.new_context(1) for _ in range(chunks)]
            lost = 0
            for context in contexts:
                try:
                    ours.save(context, source)
                except RuntimeError:
                    lost += 1
            tally = [_outcome(ours, context, 0, source) for context in contexts]
            filler.unlink()
            time.sleep(1.0)
            late = ours.new_context(1)
            ours.save(late, source)
            wait_written(stack)
            facts["full disk, ours"] = (
                f"{lost} of {chunks} saves refused; {_counted(tally)}; with room again a new one gets to disk: "
                f"{_outcome(ours, late, 0, source)}"
            )
        with _lmcache(small, ram, 64 * 2**30, shape) as theirs:
            _fill_up(filler, room)
            facts["full disk, LMCache"] = _their_full_disk(theirs, filler, chunks)
    return facts


def _their_full_disk(theirs: LmCache, filler: Path, chunks: int) -> str:
    refused = 0
    doing = "nothing"
    try:
        for chunk in range(chunks):
            doing = f"put {chunk + 1} of {chunks}"
            theirs.ask("fill", which=0, first=chunk, chunks=1)
            refused += theirs.ask("put", which=0, first=chunk, chunks=1)["refused"]
            stuck = theirs.ask("drain", first=chunk, chunks=1, limit_s=1.0)["stuck"]
        doing = "reading what is there"
        outcome = theirs.ask("check", first=0, chunks=chunks)
        filler.unlink()
        doing = "a put with room again"
        theirs.ask("fill", which=0, first=chunks, chunks=1)
        after = theirs.ask("put", which=0, first=chunks, chunks=1)["refused"]
    except TimeoutError as error:
        return f"{refused} puts refused, then stuck for good in {doing}: {error}"
    return (
        f"{refused} of {chunks} puts refused, the last write {'stuck' if stuck else 'ended'}; "
        f"{_words(outcome)}; with room again a new put is {'refused' if after else 'taken'}"
    )


@contextlib.contextmanager
def _small_disk(nbytes: int) -> Iterator[Path | None]:
    """A tmpfs of its own as the disk; None where it may not be mounted."""
    path = Path(tempfile.mkdtemp(prefix="ca-small-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield path if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)
        path.rmdir()


def _fill_up(filler: Path, room: int) -> None:
    """Leave `room` bytes of the disk free."""
    status = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_bsize - room))


def _flip(path: Path) -> int:
    """Flip one bit of every 16 MiB of a file, one at least, none near its end. Returns how many."""
    size = path.stat().st_size
    rng = np.random.default_rng(size)
    with path.open("r+b") as file:
        places = range(0, size, 16 * _MIB)
        for start in places:
            file.seek(start + int(rng.integers(0, max(1, min(16 * _MIB, size - start) - 64 * 1024))))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    return len(places)


# -- ours -----------------------------------------------------------------------------------------------------


def wait_written(stack: Stack, limit_s: float = _WRITTEN_S) -> None:
    """Wait until nothing waits to be written behind. Raises TimeoutError."""
    stack.wait_metric("kvdaemon", "cachedattention_write_behind_queue", 0.0, limit_s)


def kill_store(stack: Stack) -> None:
    """kill -9 of the daemon and its SSD worker at once."""
    daemon = psutil.Process(stack.processes["kvdaemon"].pid)
    processes = [daemon, *daemon.children(recursive=True)]
    for process in processes:
        process.kill()
    stack.processes["kvdaemon"].wait(30)
    psutil.wait_procs(processes, 30)


def _saved(ours: EngineSide, stack: Stack, chunks: int) -> tuple[list[Context], WorkingKv]:
    """Contexts of one chunk each, so that each stands for itself, on SSD for longer than a flush takes."""
    source = ours.computed(chunks * CHUNK_TOKENS, 7)
    contexts = []
    for place in range(chunks):
        part = ours.computed(CHUNK_TOKENS, 0)
        span = slice(place * CHUNK_TOKENS, (place + 1) * CHUNK_TOKENS)
        part.raw.keys[:, :CHUNK_TOKENS] = source.raw.keys[:, span]
        part.values[:, :CHUNK_TOKENS] = source.values[:, span]
        contexts.append(ours.new_context(1))
        ours.save(contexts[-1], part)
    wait_written(stack)
    time.sleep(_FLUSHED_S)
    return contexts, source


def _outcomes(ours: EngineSide, contexts: list[Context], source: WorkingKv) -> str:
    return _counted([_outcome(ours, context, place, source) for place, context in enumerate(contexts)])


def _outcome(ours: EngineSide, context: Context, place: int, source: WorkingKv) -> str:
    """Load one saved chunk and compare every byte with what was saved."""
    kv = ours.working_kv(CHUNK_TOKENS, CHUNK_TOKENS)
    asked = Acquire(new_id(), ours.namespace, tuple(context.chunk_ids))
    deadline = time.monotonic() + _ANSWER_S
    while not ours.store.is_connected:
        if time.monotonic() > deadline:
            raise TimeoutError("the daemon is not back")
        time.sleep(0.02)
    lease, *_ = ours.ask(ours.store.acquire(asked))
    if lease is None:
        return "missing"
    try:
        ours.load(lease, kv, rotate=False)
    except LoadFailed:
        return "missing"
    finally:
        ours.release(lease)
    span = slice(place * CHUNK_TOKENS, (place + 1) * CHUNK_TOKENS)
    same = all(
        torch.equal(loaded[:, :CHUNK_TOKENS].view(torch.int16), saved[:, span].view(torch.int16))
        for loaded, saved in ((kv.keys, source.raw.keys), (kv.values, source.values))
    )
    return "right" if same else "wrong"


def _counted(outcomes: list[str]) -> str:
    return _words({name: outcomes.count(name) for name in ("right", "wrong", "missing")})


def _words(outcome: dict[str, int]) -> str:
    return ", ".join(f"{outcome[name]} {name}" for name in ("right", "wrong", "missing"))
