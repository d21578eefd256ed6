"""A thread that does what there is to do and then sleeps until it is told that there is more."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


class Worker:
    """Level-triggered: `step` looks at the state of things, `notify` says that it changed. Safe from any thread."""

    def __init__(self, name: str, step: Callable[[], float | None], torch_threads: int) -> None:
        """step: does what there is to do. Returns after how many seconds to look again, None: when notified.

        torch_threads: how many threads torch's operators use in this one. OpenMP keeps the number per thread.
        """
        self._step = step
        self._torch_threads = torch_threads
        self._notified = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def notify(self) -> None:
        self._notified.set()

    def stop(self, timeout_s: float) -> None:
        """End after the current step, waiting for that no longer than timeout_s."""
        self._stopping = True
        self._notified.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        # A thread's first use of torch takes the number that was set last, in whatever thread: to be had behind us.
        torch.get_num_threads()
        torch.set_num_threads(self._torch_threads)
        # Steps are frames of their own: no name of this loop keeps a finished job's memory from the next job.
        pause_s: float | None = None
        while not self._stopping:
            if pause_s != 0.0:
                self._notified.wait(pause_s)
            # Cleared before the step: what changes during it is looked at by the next one.
            self._notified.clear()
            if not self._stopping:
                pause_s = self._step()
