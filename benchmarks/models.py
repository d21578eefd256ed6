"""Random models of known shape for measurements, made once and kept in a cache directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inference.embedded.make import CHAT_TEMPLATE, SPECIAL_TOKENS

_VERSION = 2


def cache_dir() -> Path:
    """Where made models are kept: $XDG_CACHE_HOME/cachedattention."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cachedattention"


def filled_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per byte of any text, and a word of its own for every other id.

    Every sampled id has a text, and the text gives the same id again: a baseline that tokenizes the whole history
    anew computes the same tokens as one that kept the ids.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    words = vocabulary - len(symbols) - len(SPECIAL_TOKENS)
    tokenizer.add_tokens([AddedToken(f"[{i:05}]", normalized=False) for i in range(words)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def bench_88m() -> Path:
    """The model of the project's speed figures: a random Llama of 88 million parameters, context 4,096.

    24.6 KB of KV per token in float32.
    """
    directory = cache_dir() / f"bench-88m-{_VERSION}"
    if directory.is_dir():
        return directory
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
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(88)
        model = LlamaForCausalLM(config)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # No end token: an answer has the length that is asked for.
    model.generation_config.eos_token_id = None
    model.save_pretrained(temporary)
    tokenizer = filled_tokenizer(config.vocab_size)
    tokenizer.save_pretrained(temporary)
    temporary.rename(directory)
    return directory
