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
    reuse: bool = True
    working_kv_bytes: int | None = None  # of running jobs and finished ones; None: half of what is free
    retain_bytes: int = 512 * MIB  # working KV of finished turns kept on the device
    max_running: int = 32  # turns here at once, those that wait for working KV included
    step_tokens: int = 512  # token budget of one step, DESIGN.md section 6
    step_stretch: float = 2.0  # while jobs decode, a step takes so many times as long with prompts as without
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9101
    curve: Curve | None = None
    worker: int = 1  # which of the `workers` on this machine that serve the model together
    workers: int = 1

    def __post_init__(self) -> None:
        for key, least in (("chunk_tokens", 16), ("max_running", 1), ("step_tokens", 16), ("retain_bytes", 0)):
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
        if self.chunk_tokens > 4096:
            raise ConfigError(f"chunk_tokens must be at most 4096, not {self.chunk_tokens}", param="chunk_tokens")
        if self.max_context is not None and self.max_context < 16:
            raise ConfigError(f"max_context must be at least 16, not {self.max_context}", param="max_context")
        if not 1 <= self.worker <= self.workers:
            raise ConfigError(f"worker must be between 1 and {self.workers}, not {self.worker}", param="worker")
