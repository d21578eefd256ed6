"""The configuration of the gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError
from protocol.rpc import Curve

MIB = 1024 * 1024
# A request travels on in one frame of at most 32 MiB (protocol.codec); MessagePack is never larger than its JSON.
_LARGEST_BODY = 16 * MIB


@dataclass(frozen=True)
class GatewayConfig:
    """Built once at start. Raises ConfigError on impossible values, naming the key."""

    host: str
    port: int  # 0: any free one
    data_dir: Path
    inference_endpoints: tuple[str, ...]  # of the workers
    kvdaemon_endpoint: str
    database_url: str | None = None  # an SQLAlchemy URL; None: SQLite in data_dir
    queue_limit: int = 256  # turns that may wait beside those that run
    max_body_bytes: int = 4 * MIB
    turn_timeout_s: float = 600.0  # arrival to last token
    drain_s: float = 10.0  # what running turns get at the end
    curve: Curve | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}", param="port")
        if not self.inference_endpoints:
            raise ConfigError("at least one inference endpoint is needed", param="inference_endpoints")
        if self.queue_limit < 1:
            raise ConfigError(f"queue_limit must be at least 1, not {self.queue_limit}", param="queue_limit")
        if not 1024 <= self.max_body_bytes <= _LARGEST_BODY:
            raise ConfigError(
                f"max_body_bytes must be between 1024 and {_LARGEST_BODY}, not {self.max_body_bytes}",
                param="max_body_bytes",
            )
        for key in ("turn_timeout_s", "drain_s"):
            if not 0.0 < getattr(self, key) < 1e6:
                raise ConfigError(f"{key} must be a positive number of seconds, not {getattr(self, key)}", param=key)
