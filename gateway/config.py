"""The configuration of the gateway."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from gateway.api_keys import ApiKeys
from gateway.queue_policies import POLICIES, PolicyName
from protocol.errors import ConfigError
from protocol.rpc import Curve

MIB = 1024 * 1024
# A request travels on in one frame of at most 32 MiB (protocol.codec); MessagePack is never larger than its JSON.
_LARGEST_BODY = 16 * MIB


def is_loopback(host: str) -> bool:
    """Whether a server on this address is reachable from this machine only. No name is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    queue_policy: PolicyName = "fcfs"
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    api_key_file: Path | None = None  # of which they are, to be read again when it changes; and
    api_key_hashes: str = ""  # those that are not in it; see load_api_keys
    anonymous: bool = False  # without API keys, serve other machines too: something in front decides who may ask
    tls_certificate: Path | None = None  # PEM, with the chain
    tls_key: Path | None = None
    page: bool = True  # the web page at /
    cors_origins: tuple[str, ...] = ()  # whose pages may ask from a browser; "*": all
    max_body_bytes: int = 4 * MIB
    turn_timeout_s: float = 600.0  # arrival to last token
    drain_s: float = 10.0  # what running turns get at the end
    curve: Curve | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}", param="port")
        if not self.inference_endpoints:
            raise ConfigError("at least one inference endpoint is needed", param="inference_endpoints")
        if not self.api_keys and not self.anonymous and not is_loopback(self.host):
            raise ConfigError(
                f"without API keys the gateway serves this machine only, and {self.host} is reachable from others; give"
                " --api-keys FILE (`cachedattention api-key` makes one), or --anonymous if something in front of it"
                " decides who may ask",
                param="host",
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ConfigError(f"{missing} is missing: TLS needs a certificate and its key", param=missing)
        if self.queue_policy not in POLICIES:
            raise ConfigError(f"queue_policy must be one of {', '.join(POLICIES)}", param="queue_policy")
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
