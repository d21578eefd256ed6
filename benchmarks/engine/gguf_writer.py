"""A Llama model in transformers' format as GGUF. Run in llama.cpp's environment: gguf_writer.py MODEL DTYPE FILE.

llama.cpp's own converter knows tokenizers by a list of digests, and the made models' is not among them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

_TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
# Symbols of two bytes that text never has: the format wants a list of merges, and this tokenizer has none.
_NO_MERGE = "\u00fe \u00ff"


def rotated_in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp rotates them: dimensions i and i + d / 2 side by side."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def write(model: Path, dtype: str, path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, model, config)
    for name, weight in sorted(tensors.items()):
        projection = name.split(".")[-2]
        if projection in heads:
            weight = rotated_in_pairs(weight, heads[projection])
        kind = _TYPES[dtype] if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        called = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(called, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict) -> None:
    """Single bytes, special tokens, and words that are always one token."""
    described = json.loads((model / "tokenizer.json").read_text())
    tokens = {id_: (token, gguf.TokenType.NORMAL) for token, id_ in described["model"]["vocab"].items()}
    for added in described["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    listed = [tokens[id_] for id_ in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges([_NO_MERGE])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((model / "chat_template.jinja").read_text())


if __name__ == "__main__":
    made = Path(sys.argv[3])
    partial = made.with_suffix(".partial")
    write(Path(sys.argv[1]), sys.argv[2], partial)
    partial.rename(made)
