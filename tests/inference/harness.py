"""Models made on the spot, an inference service in this process, and transformers' own answer to compare with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.random_model import byte_tokenizer
from inference.config import InferenceConfig
from inference.embedded.template import SPECIAL_TOKENS
from inference.model import LoadedModel, load_model
from inference.service import InferenceService
from monitoring.registry import new_registry
from protocol import ids
from protocol.messages import ChatMessage, RunTurn, Sampling, TurnDelta, TurnDone, TurnStarted
from protocol.rpc import RpcClient

T = TypeVar("T")
VOCABULARY = 256 + len(SPECIAL_TOKENS)

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


# Small random models of every supported shape; the range makes attention far from flat.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": 192}),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 160, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 160, "max_window_layers": 1}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 32, "num_experts": 4, **_EXPERTS}),
    "gemma": ("Gemma", {"head_dim": 32}),
    # Rotary tables by kind of layer.
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 160,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo3": ("Olmo3", {"sliding_window": 160, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {}),
    "granite": ("Granite", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2", {"sliding_window": 160}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 32}),
    "seed_oss": ("SeedOss", {"head_dim": 32}),
    # Layers without positions.
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "exaone4": ("Exaone4", {"sliding_window": 160, "sliding_window_pattern": 2}),
    "cohere2": ("Cohere2", {"sliding_window": 160, "sliding_window_pattern": 2}),
    # A part of each head is rotated: inside of apply_rotary_pos_emb, or in the attention module.
    "gpt_neox": ("GPTNeoX", {}),
    "glm": ("Glm", {"head_dim": 32}),
    "phi3-partial": ("Phi3", {"sliding_window": None, **_rope("default", partial_rotary_factor=0.75)}),
    "phi": ("Phi", {}),
    "stablelm": ("StableLm", {}),
    # Attention sinks; YaRN; a rotary table of half the width.
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 32,
            "sliding_window": 160,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **_rope("yarn", factor=8.0, original_max_position_embeddings=256, beta_fast=32.0, beta_slow=1.0),
        },
    ),
    # Queries scaled by their position.
    "ministral3": (
        "Ministral3",
        {"head_dim": 32, **_rope("yarn", factor=16.0, original_max_position_embeddings=128, llama_4_scaling_beta=0.5)},
    ),
    "llama-linear": ("Llama", _rope("linear", factor=4.0)),
    "llama-yarn": ("Llama", _rope("yarn", factor=8.0, original_max_position_embeddings=256)),
    "llama-llama3": (
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    ),
    # Scaling that depends on the length: equal to transformers' own where that goes by the longest context, too.
    "llama-dynamic": ("Llama", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 128}),
    "phi3-longrope": (
        "Phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            **_rope(
                "longrope",
                short_factor=[1.0] * 16,
                long_factor=[1.0 + 0.25 * i for i in range(16)],
                original_max_position_embeddings=64,
            ),
        },
    ),
}


def run(coroutine: Coroutine[Any, Any, T], timeout_s: float = 120.0) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, timeout_s)

    return asyncio.run(bounded())


def make_model(
    directory: Path, family: str, *, max_context: int = 2048, seed: int = 0, end_token: int = 256, **overrides: Any
) -> Path:
    """A random model of one family with the byte tokenizer, in transformers' format.

    end_token: ends an answer. Greedy answers meet 256 soon; some other token they hardly ever meet.
    """
    prefix, extra = SHAPES[family]
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_context,
        "initializer_range": 0.12,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
        **extra,
        **overrides,
    }
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    config = model_class.config_class(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config.eos_token_id = end_token
    model.generation_config.pad_token_id = end_token
    model.generation_config.bos_token_id = None
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


class Reference:
    """transformers' own greedy generation."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        # Conversations are played many times over; equal prompts have equal answers.
        self._known: dict[tuple[tuple[int, ...], int], tuple[list[int], list[float]]] = {}

    def check(self, prompt: Sequence[int], sampled: Sequence[int]) -> bool:
        """Assert that greedy generation from `prompt` gives `sampled`.

        Returns True where a difference had to be excused: transformers' own two best logits lie within 1e-4 there.
        """
        expected, gaps = self._generate(tuple(prompt), len(sampled))
        for at, (ours, theirs) in enumerate(zip(sampled, expected, strict=False)):
            if ours != theirs:
                assert gaps[at] < 1e-4, f"token {at}: {ours} instead of {theirs}, {gaps[at]:.3g} apart"
                return True
        assert len(sampled) == len(expected)
        return False

    @torch.inference_mode()
    def _generate(self, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        """Greedy tokens, and how far apart the two best logits lie at each."""
        if (prompt, count) not in self._known:
            out = self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=count,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = [row[0].topk(2).values for row in out.logits]
            tokens = out.sequences[0, len(prompt) :].tolist()
            self._known[prompt, count] = (tokens, [float(two[0] - two[1]) for two in best])
        return self._known[prompt, count]


def config_for(model: Path | str, run_dir: Path, **overrides: Any) -> InferenceConfig:
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "model": str(model),
        "run_dir": run_dir,
        "endpoint": f"ipc://{run_dir}/inference.sock",
        "kvdaemon_endpoint": f"ipc://{run_dir}/kvdaemon.sock",
        "dtype": "float32",
        "metrics_port": 0,
        "stream_interval_s": 0.0,  # many small deltas, which tests break off at
        **overrides,
    }
    return InferenceConfig(**values)


class Conversation:
    """A client of the inference process that keeps its history as the gateway would."""

    def __init__(self, client: RpcClient, model: LoadedModel, tenant_salt: bytes = b"tenant") -> None:
        self.client = client
        self.messages: list[ChatMessage] = []
        self._salt = tenant_salt
        self._key = ids.conversation_root(tenant_salt, model.namespace, model.template_digest)
        self._parent: bytes | None = None
        self._parent_tokens = 0

    def request(self, text: str, **sampling: Any) -> RunTurn:
        message = ChatMessage("user", text)
        self._key = ids.turn_key(self._key, ids.Message("user", text))
        self.messages.append(message)
        return RunTurn(
            job_id=ids.new_id(),
            messages=tuple(self.messages),
            request_key=self._key,
            tenant_salt=self._salt,
            sampling=Sampling(**{"temperature": 0.0, "max_tokens": 16, **sampling}),
            parent_turn_key=self._parent,
            parent_tokens=self._parent_tokens,
            return_prompt_tokens=True,
        )

    def say_first(self, role: Literal["system", "user"], text: str) -> None:
        """A message before the first turn's own."""
        self._key = ids.turn_key(self._key, ids.Message(role, text))
        self.messages.append(ChatMessage(role, text))

    def accept(self, done: TurnDone) -> None:
        self.messages.append(ChatMessage("assistant", done.text))
        self._key = self._parent = done.turn_key
        self._parent_tokens = done.usage.prompt_tokens + done.usage.completion_tokens - 1

    async def say(self, text: str, **sampling: Any) -> TurnDone:
        done, deltas = await stream(self.client, self.request(text, **sampling))
        assert "".join(delta.text for delta in deltas) == done.text
        assert b"".join(delta.tokens for delta in deltas) == done.tokens
        self.accept(done)
        return done


async def stream(client: RpcClient, request: RunTurn) -> tuple[TurnDone, list[TurnDelta]]:
    parts = [part async for part in client.stream(request, 60, 60)]
    assert isinstance(parts[0], TurnStarted)
    assert isinstance(parts[-1], TurnDone)
    deltas = parts[1:-1]
    assert all(isinstance(delta, TurnDelta) for delta in deltas)
    return parts[-1], deltas


@contextlib.asynccontextmanager
async def service(config: InferenceConfig) -> AsyncIterator[tuple[InferenceService, RpcClient]]:
    """A running service and a connected client."""
    running = InferenceService(config, load_model(config), new_registry())
    await running.start()
    client = RpcClient(config.endpoint, "gateway")
    await client.start()
    try:
        await client.wait_connected(10)
        yield running, client
    finally:
        await client.stop()
        await running.stop()


def tokens(packed: bytes) -> list[int]:
    return np.frombuffer(packed, dtype="<u4").tolist()
