"""Random models of known shape for measurements, made once and kept in a cache directory."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.random_model import make_random_model

_VERSION = 3


def cache_dir() -> Path:
    """Where made models are kept: $XDG_CACHE_HOME/cachedattention."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cachedattention"


def bench_88m() -> Path:
    """The model of the project's speed figures: a random Llama of 88 million parameters, context 4,096.

    24.6 KB of KV per token in float32.
    """
    directory = cache_dir() / f"bench-88m-{_VERSION}"
    if not directory.is_dir():
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=256,
            tie_word_embeddings=False,
        )
        make_random_model(directory, config, seed=88)
    return directory
