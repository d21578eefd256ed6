"""Models of any size and context with random weights, a byte-level tokenizer and a chat template.

They speak nonsense, deterministically, and hardly ever end an answer by themselves: what measurements and tests need.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inference.embedded.template import SPECIAL_TOKENS

# Content is never trimmed: the rendered answer must be the generated one, or its KV would be lost.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|{{ message['role'] }}|>{{ message['content'] or '' }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def byte_tokenizer(vocabulary: int = 0) -> PreTrainedTokenizerFast:
    """One token per byte, the special tokens of the chat template, and words up to `vocabulary` ids in all.

    Every sampled id has a text, and the text of a word gives the same id again: a baseline that tokenizes the
    whole history anew computes the same tokens as one that kept the ids.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    words = vocabulary - len(alphabet) - len(SPECIAL_TOKENS)
    if words > 0:
        tokenizer.add_tokens([AddedToken(f"[{i:05}]", normalized=False) for i in range(words)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_random_model(directory: Path, config: LlamaConfig, seed: int) -> None:
    """Write a random model of `config` with a byte tokenizer of its vocabulary. Equal arguments give equal files.

    Written beside and renamed, so that a directory that exists is whole.
    """
    tokenizer = byte_tokenizer(config.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(directory)
    except OSError:  # another process made it meanwhile
        shutil.rmtree(temporary, ignore_errors=True)
        if not directory.is_dir():
            raise
