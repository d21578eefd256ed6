"""Configuration of the storage daemon: one frozen struct, built once at start and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protocol.errors import ConfigError
from protocol.rpc import Curve

LEAST_SSD_BYTES = 32 * 1024 * 1024

PolicyName = Literal["fifo", "lru", "scheduler-aware", "anticipating"]


@dataclass(frozen=True)
class KvDaemonConfig:
    """run_dir: a directory on tmpfs, for the arena, sockets and client locks. data_dir: a directory on disk.

    dram_bytes: size of the arena. ssd_bytes: physical bytes the SSD tier may take on the disk; 0 switches it off.
    ssd_write_budget_bytes: that may be written to the SSD in a day; None: without limit.
    policy: what stays where when the tiers are full (placement/policies.py). verify: which resident chunks readers are
    asked to check against their checksums. scrub_bytes_per_s: how fast chunks in DRAM are verified in the background;
    0: not at all.
    """

    run_dir: Path
    data_dir: Path
    endpoint: str
    dram_bytes: int
    ssd_bytes: int
    ssd_write_budget_bytes: int | None = None
    policy: PolicyName = "anticipating"
    verify: Literal["sample", "always"] = "sample"
    scrub_bytes_per_s: int = 32 * 1024 * 1024
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9102
    curve: Curve | None = None

    def __post_init__(self) -> None:
        if self.dram_bytes < 1:
            raise ConfigError(f"{self.dram_bytes} bytes of DRAM are not enough", param="dram")
        if self.ssd_bytes < 0:
            raise ConfigError(f"{self.ssd_bytes} bytes of SSD make no sense; 0 switches the tier off", param="ssd")
        if 0 < self.ssd_bytes < LEAST_SSD_BYTES:
            raise ConfigError(
                f"{self.ssd_bytes} bytes of SSD are too few for a tier, which needs {LEAST_SSD_BYTES}; "
                "0 switches the tier off",
                param="ssd",
            )
        if self.ssd_write_budget_bytes is not None and self.ssd_write_budget_bytes < 1:
            raise ConfigError(
                "nothing could ever be written to the SSD; --ssd 0 switches the tier off", param="ssd_write_budget"
            )
