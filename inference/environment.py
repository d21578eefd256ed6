"""The environment of a process that computes, from before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")

_ALWAYS = {
    # A thread that has nothing to do spins for a tenth of a millisecond, then it sleeps. Those that go on spinning, as
    # they do by default, starve loader and saver. Those that sleep at once wake up late for each of the many short
    # products of a decode step, which takes twice as long then.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "10000",
    # oneDNN's products made for one size each, torch's cache of them and oneDNN's own. Of their 1,024 each, 0.8 MB a
    # piece, most are of prompts' lengths that never come again; 32 sizes of a decode step need 384.
    "LRU_CACHE_CAPACITY": "384",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "384",
}
# Whoever sets one of these has ideas of his own about which threads run where.
_PLACED_BY = ("OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


@contextmanager
def for_torch(worker: int = 1, workers: int = 1) -> Iterator[None]:
    """Torch is to be imported in here, for the first time. worker: which of the `workers` on this machine, from 1.

    Each of OpenMP's threads is kept on a core. Where it is left to the system, two of them share one as soon as
    anybody else is busy on the other, and wake each other up in turn, product by product: steps of six times the time.
    What the environment says already is left as it is.
    """
    cpus = os.sched_getaffinity(0)
    placed = {}
    if not any(name in os.environ for name in _PLACED_BY):
        placed = {"OMP_PROC_BIND": "true", "OMP_PLACES": places(share(cores(cpus), worker, workers))}
    os.environ.update({**_ALWAYS, **placed, **os.environ})
    yield
    # OpenMP binds the thread that loads it to the first place, and what that one starts would be there as well. Those
    # that compute on several cores are bound when they begin to.
    os.sched_setaffinity(0, cpus)


def cores(cpus: set[int], topology: Path = _TOPOLOGY) -> list[list[int]]:
    """`cpus`, the system's numbers, those of one core together."""
    found: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        try:
            siblings = (topology / f"cpu{cpu}/topology/thread_siblings").read_text()
        except OSError:  # the system does not tell
            siblings = str(cpu)
        found.setdefault(siblings, []).append(cpu)
    return list(found.values())


def share(cores: Sequence[list[int]], worker: int, workers: int) -> list[list[int]]:
    """Those of one worker: as many for each, and where there are too few, the same for several."""
    each = max(1, len(cores) // workers)
    start = (worker - 1) * each % len(cores)
    return list(cores[start : start + each])


def places(cores: Sequence[list[int]]) -> str:
    """As OMP_PLACES wants them."""
    return ",".join(f"{{{','.join(map(str, cpus))}}}" for cpus in cores)
