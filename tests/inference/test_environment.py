"""Where OpenMP's threads run: each on a core of its own, and nothing else is bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inference.environment import cores, places, share

_BOUND = """
import json, os, threading
from inference.environment import for_torch
with for_torch():
    import torch

def compute(threads):
    torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.randn(600, 600) @ torch.randn(600, 600)
    found.append(sorted(os.sched_getaffinity(0)))
    masks.extend(sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task"))

found, masks = [], []
for threads in (torch.get_num_threads(), 1):
    thread = threading.Thread(target=compute, args=(threads,))
    thread.start()
    thread.join()
print(json.dumps({"main": sorted(os.sched_getaffinity(0)), "teams": found, "masks": masks}))
"""


def bound(**variables: str) -> dict[str, list[list[int]]]:
    """Which cores threads may run on in a process that has computed: see _BOUND."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", _BOUND], env=kept | variables, capture_output=True, text=True, timeout=120, check=True
    )
    found: dict[str, list[list[int]]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(len(cores(os.sched_getaffinity(0))) < 2, reason="one core")
def test_a_team_has_a_core_for_each_thread_and_nobody_else_is_bound() -> None:
    everywhere, mine = sorted(os.sched_getaffinity(0)), cores(os.sched_getaffinity(0))
    found = bound()
    assert found["main"] == everywhere
    assert found["teams"] == [mine[0], everywhere]  # the thread that led a team, and one that computed alone
    assert mine[1] in found["masks"]  # the team's other thread, which waits for more


def test_whoever_places_threads_is_left_alone() -> None:
    everywhere = sorted(os.sched_getaffinity(0))
    assert all(mask == everywhere for mask in bound(OMP_PROC_BIND="false")["masks"])


def test_the_cpus_of_a_core_belong_together(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(("11", "22", "11", "22")):
        place = tmp_path / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings").write_text(f"{siblings}\n")
    assert cores({0, 1, 2, 3}, tmp_path) == [[0, 2], [1, 3]]
    assert cores({1, 2, 3}, tmp_path) == [[1, 3], [2]]
    assert cores({3, 7, 8}, tmp_path) == [[3], [7], [8]]  # of two nothing is known


def test_workers_share_the_cores() -> None:
    four = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert share(four, 1, 1) == four
    assert [share(four, worker, 2) for worker in (1, 2)] == [four[:2], four[2:]]
    assert [share(four, worker, 3) for worker in (1, 2, 3)] == [four[:1], four[1:2], four[2:3]]
    assert [share(four[:2], worker, 3) for worker in (1, 2, 3)] == [four[:1], four[1:2], four[:1]]
    assert places(four[:2]) == "{0,4},{1,5}"
