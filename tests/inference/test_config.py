"""What a configuration of inference refuses, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference.config import InferenceConfig
from protocol.errors import ConfigError


def config(**values: Any) -> InferenceConfig:
    return InferenceConfig("embedded", Path("run"), "ipc://inference", "ipc://kvdaemon", **values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"chunk_tokens": 15}, "chunk_tokens must be at least 16, not 15"),
        ({"chunk_tokens": 4097}, "chunk_tokens must be at most 4096, not 4097"),
        ({"max_running": 0}, "max_running must be at least 1, not 0"),
        ({"step_tokens": 32, "max_running": 32}, "step_tokens must be more than max_running, 32, not 32"),
        ({"step_stretch": 1.0}, "step_stretch must be more than 1, not 1.0"),
        ({"step_stretch": float("nan")}, "step_stretch must be more than 1, not nan"),
        ({"stream_interval_s": -0.01}, "stream_interval must not be negative, as -0.01 is"),
        ({"stream_interval_s": float("nan")}, "stream_interval must not be negative, as nan is"),
        ({"truncation_ratio": 0.0}, "truncation_ratio must be over 0 and at most 1, not 0.0"),
        ({"truncation_ratio": 1.1}, "truncation_ratio must be over 0 and at most 1, not 1.1"),
        ({"keep_first": -1}, "keep_first must be at least 0, not -1"),
        ({"max_context": 15}, "max_context must be at least 16, not 15"),
        ({"worker": 3, "workers": 2}, "worker must be between 1 and 2, not 3"),
    ],
)
def test_impossible_values_are_refused_by_name(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        config(**values)
    assert refused.value.param is not None
    assert refused.value.param in reason


def test_the_borders_are_allowed() -> None:
    config(chunk_tokens=16, max_running=1, step_tokens=17, stream_interval_s=0.0, truncation_ratio=1.0, max_context=16)
    config(chunk_tokens=4096, worker=2, workers=2)
