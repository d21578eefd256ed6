"""The embedded model before and after training: made, and written in the transformers format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from inference.embedded import checkpoint
from inference.embedded.recipe import llama_config
from inference.embedded.template import CHAT_TEMPLATE
from inference.embedded.tokenizer import load_tokenizer
from inference.embedded.windows import special_id


def make_model(tokenizer: Path, seed: int) -> LlamaForCausalLM:
    """The untrained model."""
    vocabulary = load_tokenizer(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama_config(vocabulary.get_vocab_size(), special_id(vocabulary, "<|end|>")))


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template, in the form that is saved beside the model."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def export(run: Path, output: Path) -> None:
    """The run's model in the transformers format, weights in bfloat16, written beside `output` and renamed."""
    model = make_model(run / "tokenizer.json", 0)
    checkpoint.load_weights(run / "checkpoint.safetensors", model)
    tokenizer = for_transformers(load_tokenizer(run / "tokenizer.json"))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    model.bfloat16().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if output.exists():
        shutil.rmtree(output)
    temporary.rename(output)
