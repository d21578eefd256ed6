"""The worker's thread and torch's number of threads."""

from __future__ import annotations

import threading

import torch

from inference.worker import Worker


def test_number_of_threads_stays_what_was_asked_for() -> None:
    """What another thread sets between a worker's start and its first use of torch changes nothing for it."""
    found: list[int] = []
    is_up, is_done = threading.Event(), threading.Event()
    steps = iter((is_up.set, lambda: (found.append(torch.get_num_threads()), is_done.set())))
    before = torch.get_num_threads()

    def step() -> None:
        next(steps)()

    worker = Worker("test", step, torch_threads=1)
    worker.start()
    try:
        worker.notify()
        assert is_up.wait(10.0)
        other = threading.Thread(target=torch.set_num_threads, args=(3,))
        other.start()
        other.join(10.0)
        worker.notify()
        assert is_done.wait(10.0)
        assert found == [1]
    finally:
        worker.stop(10.0)
        torch.set_num_threads(before)
