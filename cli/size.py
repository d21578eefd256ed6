"""`cachedattention size`: how much DRAM and SSD a load needs. By Little's law: what is held is what arrives, times how
long it stays."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cli.sizes import format_size
from inference.embedded import MODEL as EMBEDDED
from protocol.errors import ConfigError

_SSD_FILL = 0.94  # of --ssd that chunks may take
_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HOUR_S, _DAY_S = 3600.0, 86_400.0


@dataclass(frozen=True)
class Load:
    """Conversations of `turns` turns, each `turn_tokens` longer (question and answer) than the one before, until the
    context is full. Between turns somebody thinks for `think_s`, exponentially distributed.

    dram_share: of the follow-ups, that shall find their history in DRAM. keep_s: how long after its last turn a
    conversation shall still be found, on SSD.
    """

    conversations_per_hour: float
    turns: int
    turn_tokens: int
    think_s: float
    dram_share: float = 0.95
    keep_s: float = _DAY_S

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for key in ("conversations_per_hour", "turns", "turn_tokens", "think_s"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"{key} must be more than 0, not {getattr(self, key)}", param=key)
        if not 0 <= self.dram_share < 1:
            raise ConfigError(f"dram_share must be at least 0 and below 1, not {self.dram_share}", param="dram_share")
        if not 0 <= self.keep_s < math.inf:
            raise ConfigError(f"keep_s must be at least 0, not {self.keep_s}", param="keep_s")


@dataclass(frozen=True)
class Need:
    """held_s: how long DRAM must hold a history to reach the share. Written bytes are KV, without RocksDB's records."""

    dram_bytes: int
    ssd_bytes: int
    ssd_written_bytes_per_day: int
    between_turns: float  # conversations, at any time
    context_tokens: int  # at the end of a conversation
    held_s: float


def plan_size(load: Load, token_bytes: int, max_context: int, chunk_tokens: int) -> Need:
    """What the tiers must hold so that the load finds its history. token_bytes: of KV, over all layers. Pure.

    DRAM lets a history go after held_s: of think times below that, all; of those above it, held_s. After the last turn,
    which nobody knows to be the last, held_s as well.
    """
    per_s = load.conversations_per_hour / _HOUR_S
    contexts = [min(turn * load.turn_tokens, max_context) for turn in range(1, load.turns + 1)]
    *between, last = contexts
    # In DRAM a chunk takes a slot, however few its tokens.
    *slots_between, slots_last = (math.ceil(tokens / chunk_tokens) * chunk_tokens for tokens in contexts)
    held_s = -load.think_s * math.log1p(-load.dram_share)
    dram_token_s = load.think_s * load.dram_share * sum(slots_between) + held_s * slots_last
    ssd_token_s = load.think_s * sum(between) + load.keep_s * last
    partial_tokens = load.turns * chunk_tokens / 2  # each turn saves its last chunk, on average half full, anew
    return Need(
        dram_bytes=round(per_s * dram_token_s * token_bytes),
        ssd_bytes=round(per_s * ssd_token_s * token_bytes / _SSD_FILL),
        ssd_written_bytes_per_day=round(per_s * _DAY_S * (last + partial_tokens) * token_bytes),
        between_turns=per_s * load.think_s * (load.turns - 1),
        context_tokens=last,
        held_s=held_s,
    )


def token_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """KV bytes per token of a model with this config.json. Layers with a sliding window count as if they had none.

    Raises ConfigError: it does not tell.
    """
    config = config.get("text_config", config)
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        layers, kv_heads = config["num_hidden_layers"], config.get("num_key_value_heads") or heads
    except KeyError as error:
        raise ConfigError(f"model: its config.json has no {error}; give --kv-bytes-per-token", param="model") from error
    head_dim = config.get("head_dim") or hidden // heads
    if dtype == "auto":
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return int(2 * layers * kv_heads * head_dim * _NUMBER_BYTES.get(dtype, 2))


def read_config(model: str) -> dict[str, Any]:
    """config.json of 'embedded' or of a directory. Raises ConfigError: neither."""
    path = (EMBEDDED if model == "embedded" else Path(model).expanduser()) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: cannot read {path}; give --kv-bytes-per-token", param="model") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model: {path} is no JSON object", param="model")
    return config


def report(load: Load, need: Need, kv_bytes: int) -> str:
    """For people."""
    rows = (
        ("KV of a token", format_size(kv_bytes)),
        ("a conversation at its end", f"{need.context_tokens:,} tokens, {format_size(need.context_tokens * kv_bytes)}"),
        ("conversations between two turns", f"{need.between_turns:,.0f} at a time"),
        ("DRAM", f"{format_size(need.dram_bytes)}: {load.dram_share:.0%} of the follow-ups, {need.held_s:,.0f} s back"),
        ("SSD", f"{format_size(need.ssd_bytes)}: whoever comes back within {load.keep_s / _HOUR_S:,.1f} h"),
        ("written to the SSD in a day", format_size(need.ssd_written_bytes_per_day)),
    )
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    dram, ssd = (max(1, math.ceil(size / 1024**3)) for size in (need.dram_bytes, need.ssd_bytes))
    return "\n".join([*lines, "", f"cachedattention up --dram {dram}GiB --ssd {ssd}GiB"])


def as_json(need: Need, kv_bytes: int) -> str:
    return json.dumps({"kv_bytes_per_token": kv_bytes, **asdict(need)})
