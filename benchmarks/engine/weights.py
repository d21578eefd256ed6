"""The models that all engines run: random ones whose greedy answers are text and never end by themselves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.models import bench_88m, cache_dir
from benchmarks.random_model import make_random_model


def bench() -> Path:
    """bench-88m, speaking words."""
    return speaking_words(bench_88m())


def tiny() -> Path:
    """A model for runs that prove nothing but that they run."""
    directory = cache_dir() / "bench-tiny-2"
    if not directory.is_dir():
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,  # smaller ones are not for vLLM on CPU
            max_position_embeddings=4096,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=256,
            tie_word_embeddings=False,
        )
        make_random_model(directory, config, seed=7)
    return speaking_words(directory)


def speaking_words(model: Path) -> Path:
    """A copy of a random model whose greedy answers consist of the tokenizer's words alone.

    The output weights of single bytes and special tokens are zero, so the best of thousands of words is always above
    them. An answer then is text that gives the same tokens again: every engine finds the history that it has, also one
    that keeps text and no ids.
    """
    directory = model.with_name(f"{model.name}-words")
    if not directory.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(model)
        words = tokenizer.encode("[00000]", add_special_tokens=False)[0]
        made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            made.lm_head.weight[:words] = 0.0
        temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
        made.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            temporary.rename(directory)
        except OSError:  # another process made it meanwhile
            shutil.rmtree(temporary)
    return directory


def kv_token_bytes(model: Path, dtype: str) -> int:
    """Bytes of keys and values of one token."""
    config: Any = LlamaConfig.from_pretrained(model)
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return int(heads * config.head_dim * getattr(torch, dtype).itemsize)
