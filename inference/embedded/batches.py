"""Training batches made in processes of their own, ahead of the training loop.

A worker is `python -m inference.embedded.batches TOKENIZER SEED`: it reads lines "step window rows" and writes the
tokens (uint16) and the answer mask (one byte each) of that batch, nothing else.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from inference.embedded.tokenizer import load_tokenizer
from inference.embedded.windows import Encoder, Mask, Tokens, training_batch


class BatchSource:
    """Batches in the order in which they were requested. Not safe for threads."""

    def __init__(self, tokenizer: Path, seed: int, workers: int = 1) -> None:
        command = [sys.executable, "-m", "inference.embedded.batches", str(tokenizer), str(seed)]
        # In sessions of their own, so that Ctrl-C reaches the training loop only; they end with their input.
        self._workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            for _ in range(workers)
        ]
        self._pending: deque[tuple[subprocess.Popen[bytes], int, int]] = deque()
        self._requested = 0

    def __enter__(self) -> BatchSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()

    def __len__(self) -> int:
        """Batches requested and not taken yet."""
        return len(self._pending)

    def request(self, step: int, window: int, rows: int) -> None:
        """Have the batch of `step` made."""
        worker = self._workers[self._requested % len(self._workers)]
        self._requested += 1
        assert worker.stdin is not None
        worker.stdin.write(f"{step} {window} {rows}\n".encode())
        worker.stdin.flush()
        self._pending.append((worker, window, rows))

    def take(self) -> tuple[Tokens, Mask]:
        """The oldest batch requested: tokens and answer mask [rows, window]. Raises EOFError: its worker died."""
        worker, window, rows = self._pending.popleft()
        assert worker.stdout is not None
        size = rows * window
        data = worker.stdout.read(3 * size)
        if len(data) < 3 * size:
            raise EOFError("a process that makes training batches ended")
        tokens = np.frombuffer(data, dtype=np.uint16, count=size).reshape(rows, window)
        answers = np.frombuffer(data, dtype=np.bool_, offset=2 * size).reshape(rows, window)
        return tokens, answers


def serve(requests: BinaryIO, replies: BinaryIO, tokenizer: Path, seed: int) -> None:
    """Answer requests until they end."""
    encoder = Encoder(load_tokenizer(tokenizer))
    for line in requests:
        step, window, rows = map(int, line.split())
        tokens, answers = training_batch(encoder, seed, step, window, rows)
        replies.write(tokens.tobytes() + answers.tobytes())
        replies.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, Path(sys.argv[1]), int(sys.argv[2]))
