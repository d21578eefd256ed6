"""What one of several workers takes of the machine. The store is shared; cores and GPUs are divided."""

from __future__ import annotations

import os

import torch


def take_share(worker: int, workers: int) -> None:
    """Workers divide the machine's cores, and of several GPUs each takes one. To be called before CUDA is in use."""
    if workers == 1:
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    if (gpus := torch.cuda.device_count()) > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = named.split(",") if named else [str(gpu) for gpu in range(gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[(worker - 1) % gpus]
