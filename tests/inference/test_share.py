"""What a worker takes of the machine: its part of the cores, and one of several GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from inference.share import take_share


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "workers", "each"), [(8, 2, 4), (8, 3, 2), (2, 4, 1), (2, 1, 2)])
def test_workers_divide_the_cores(cores: int, workers: int, each: int) -> None:
    torch.set_num_threads(cores)
    take_share(1, workers)
    assert torch.get_num_threads() == each


def test_who_names_the_threads_of_each_worker_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    take_share(1, 2)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("gpus", "visible", "worker", "taken"),
    [
        (3, None, 1, "0"),
        (3, None, 2, "1"),
        (3, None, 5, "1"),
        (2, "5,7", 2, "7"),
        (2, "GPU-a,GPU-b", 1, "GPU-a"),
        (1, "4", 2, "4"),
        (1, None, 2, None),
        (0, None, 2, None),
    ],
)
def test_of_several_gpus_each_worker_sees_one(
    monkeypatch: pytest.MonkeyPatch, gpus: int, visible: str | None, worker: int, taken: str | None
) -> None:
    """By what the driver would count here; no machine with several was at hand."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    take_share(worker, 8)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == taken
