"""The configuration of one inference process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protocol.errors import ConfigError
from protocol.rpc import Curve

MIB = 1024 * 1024


@dataclass(frozen=True)
class InferenceConfig:
    """Built once at start. Raises ConfigError on impossible values, naming the key."""

    model: str  # "embedded", a directory, or a hub id
    run_dir: Path
    endpoint: str
    kvdaemon_endpoint: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_context: int | None = None  # tokens; None: what the model was made for
    chunk_tokens: int = 256
    truncation_ratio: float = 0.5  # of the longest context; so much is dropped when it is full, whole chunks
    keep_system: bool = True  # system messages at the beginning are never dropped
    keep_first: int = 0  # nor are so many tokens at the beginning
    # The KV of what is left. "recompute" is what it is measured against: a store whose keys have positions in them.
    overflow: Literal["keep", "recompute"] = "keep"
    reuse: bool = True
    working_kv_bytes: int | None = None  # of running jobs and finished ones; None: half of what is free
    paged: bool = False  # working KV in pages on the CPU, too, as on CUDA; for tests
    cuda_graphs: bool = True  # decode steps are recorded at start
    retain_bytes: int = 512 * MIB  # working KV of finished turns kept on the device
    max_running: int = 32  # turns here at once, those that wait for working KV included
    step_tokens: int = 512  # token budget of one step, DESIGN.md section 6
    step_stretch: float = 2.5  # a step with prompts takes so many times as long as one in which all jobs decode
    stream_interval_s: float = 0.02  # an answer's tokens are sent together when they come faster
    load_or_compute: Literal["auto", "load"] = "auto"  # "load": whatever is saved is loaded
    preload: bool = True  # False: all of a history is loaded before its job computes, and nothing before its turn
    read_buffer_bytes: int | None = (
        None  # of waiting jobs' histories, loaded ahead; None: by the formula of section 3.2.1
    )
    save: Literal["async", "sync"] = "async"  # "sync": a turn is saved when all of it is computed, and done when saved
    write_buffer_bytes: int = 1024 * MIB  # KV of finished turns that are not saved yet; beyond that, turns end later
    link_bandwidth: int = (
        0  # bytes per second between arena and device, in each direction, for measurements; 0: no limit
    )
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9101
    curve: Curve | None = None
    worker: int = 1  # which of the `workers` on this machine that serve the model together
    workers: int = 1

    def __post_init__(self) -> None:
        for key, least in (
            ("chunk_tokens", 16),
            ("max_running", 1),
            ("step_tokens", 16),
            ("retain_bytes", 0),
            ("write_buffer_bytes", 0),
            ("link_bandwidth", 0),
            ("keep_first", 0),
        ):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} must be at least {least}, not {getattr(self, key)}", param=key)
        if self.step_tokens <= self.max_running:
            raise ConfigError(
                f"step_tokens must be more than max_running, {self.max_running}, not {self.step_tokens}: every running"
                " turn gets a token, and a prompt the rest",
                param="step_tokens",
            )
        if not self.step_stretch > 1:
            raise ConfigError(f"step_stretch must be more than 1, not {self.step_stretch}", param="step_stretch")
        if not self.stream_interval_s >= 0:
            raise ConfigError(
                f"stream_interval must not be negative, as {self.stream_interval_s} is", param="stream_interval"
            )
        if not 0 < self.truncation_ratio <= 1:
            raise ConfigError(
                f"truncation_ratio must be over 0 and at most 1, not {self.truncation_ratio}", param="truncation_ratio"
            )
        if self.chunk_tokens > 4096:
            raise ConfigError(f"chunk_tokens must be at most 4096, not {self.chunk_tokens}", param="chunk_tokens")
        if self.max_context is not None and self.max_context < 16:
            raise ConfigError(f"max_context must be at least 16, not {self.max_context}", param="max_context")
        if not 1 <= self.worker <= self.workers:
            raise ConfigError(f"worker must be between 1 and {self.workers}, not {self.worker}", param="worker")
