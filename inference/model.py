"""Load a model from a directory, from a hub or the embedded one, and take over its positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from inference.config import InferenceConfig
from inference.embedded import MODEL
from inference.linear import take_out_of_files
from inference.selfcheck import CheckedModel, take_over
from inference.tools import ToolFormat, tool_format
from inference.vocabulary import Vocabulary
from protocol.arena import Geometry
from protocol.errors import ConfigError, UnsupportedModel
from protocol.ids import digest, model_namespace

CODEC = "raw-1"  # how KV lies in a chunk: un-rotated keys, then values, in the model's dtype
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HASH_PIECE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class LoadedModel:
    name: str  # in the API
    checked: CheckedModel
    tokenizer: Any  # transformers' PreTrainedTokenizerFast
    vocabulary: Vocabulary
    eos_ids: frozenset[int]
    max_context: int  # tokens
    geometry: Geometry
    namespace: bytes  # ids.model_namespace
    template_digest: bytes
    tool_format: ToolFormat


def load_model(config: InferenceConfig) -> LoadedModel:
    """Load, check and describe the model of `config`.

    Raises ConfigError: no such model, unreadable files, an impossible --max-context or device.
    Raises UnsupportedModel: an architecture that we would get wrong.
    """
    directory, name = locate(config)
    device = _device(config.device)
    dtype = (
        _DTYPES["bfloat16" if device.type == "cuda" else "float32"] if config.dtype == "auto" else _DTYPES[config.dtype]
    )
    try:
        hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{directory} has no configuration that transformers knows: {error}", param="model"
        ) from error
    max_context = _max_context(config.max_context, hf_config)
    try:
        # Eager attention first: it is the reference that the self-check compares with, and it knows every extra.
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot load the model in {directory}: {error}", param="model") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(f"{directory} has no fast tokenizer (tokenizer.json)", param="model")
    if not tokenizer.chat_template:
        raise UnsupportedModel(f"the tokenizer in {directory} has no chat template", param="model")
    model.eval().to(device)
    take_out_of_files(model)
    vocabulary_size = hf_config.get_text_config().vocab_size
    checked = take_over(model, vocabulary_size, max_context, paged=config.paged or device.type == "cuda")
    eos_ids = _eos_ids(model, tokenizer)
    shape = checked.shape
    itemsize = shape.dtype.itemsize
    geometry = Geometry(
        layers=shape.layers,
        key_bytes=shape.kv_heads * shape.key_dim * itemsize,
        value_bytes=shape.kv_heads * shape.value_dim * itemsize,
        chunk_tokens=config.chunk_tokens,
    )
    dtype_name = str(shape.dtype).removeprefix("torch.")
    rope = f"for {max_context}" if checked.depends_on_length else ""
    return LoadedModel(
        name=name,
        checked=checked,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(tokenizer, vocabulary_size, eos_ids),
        eos_ids=eos_ids,
        max_context=max_context,
        geometry=geometry,
        namespace=model_namespace(weights_digest(directory), geometry.digest(), dtype_name, CODEC, rope),
        template_digest=digest("template", str(tokenizer.chat_template).encode()),
        tool_format=tool_format(str(tokenizer.chat_template)),
    )


def locate(config: InferenceConfig) -> tuple[Path, str]:
    """The directory of the configured model and its name in the API. A hub id is downloaded into the hub's cache."""
    if config.model == "embedded":
        if not any(MODEL.glob("*.safetensors")):
            raise ConfigError(
                f"the embedded model is not in this installation ({MODEL} has no weights); install the package again,"
                " train it (python -m inference.embedded.train), or name another model",
                param="model",
            )
        return MODEL, "embedded"
    directory = Path(config.model).expanduser()
    if directory.is_dir():
        return directory, directory.resolve().name
    if directory.is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") != 1:
        raise ConfigError(
            f"model {config.model!r} is neither a directory, a hub id (owner/name) nor 'embedded'", param="model"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Weights as safetensors only, and nothing that could be code.
        found = snapshot_download(
            config.model, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"cannot get model {config.model!r} from the hub: {error}", param="model") from error
    return Path(found), config.model


def weights_digest(directory: Path) -> bytes:
    """Identity of a model: its configuration and every byte of its weights.

    xxh3 reads at memory speed; nobody attacks us with weights that collide, as whoever writes weights owns the model.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{directory} has no *.safetensors weights", param="model")
    parts = [_canonical_config(directory / "config.json")]
    for path in weights:
        state = xxhash.xxh3_128(path.name.encode())
        for piece in _pieces(path):
            state.update(piece)
        parts.append(state.digest())
    return digest("weights", *parts)


def _canonical_config(path: Path) -> bytes:
    # What a newer transformers writes beside the model's own values must not change the identity.
    values = json.loads(path.read_text())
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(key, None)
    return json.dumps(values, sort_keys=True).encode()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_HASH_PIECE_BYTES):
            yield piece


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch finds no CUDA device", param="device")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def _max_context(wanted: int | None, hf_config: Any) -> int:
    config = hf_config.get_text_config()
    made_for = getattr(config, "max_position_embeddings", None)
    if made_for is None:
        if wanted is None:
            raise ConfigError("the model does not tell its context length; give --max-context", param="max_context")
        return wanted
    # Dynamic NTK begins where the model's own length ends.
    rope = getattr(config, "rope_parameters", None) or {}
    stretch = rope.get("factor", 1.0) if rope.get("rope_type") == "dynamic" else 1.0
    longest = int(made_for * stretch)
    if wanted is not None and wanted > longest:
        raise ConfigError(f"max_context {wanted} is over the model's own {longest}", param="max_context")
    return int(wanted or made_for)


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those that `generate` stops at, else the tokenizer's own."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())
