"""What may be asked for by name. Apart from the rest, so that a command line knows it without loading anything."""

from __future__ import annotations

from typing import Literal

Format = Literal["agentic", "mooncake", "text"]
PolicyName = Literal[
    "fifo",
    "lru",
    "scheduler-aware",
    "anticipating",
    # It knows the future: the limit.
    "belady",
    # Other systems', of DRAM alone.
    "plain-lru",
    "arc",
    "s3-fifo",
    "tail-lru",
]
