"""Models made on the spot, an inference service in this process, and transformers' own answer to compare with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

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

# Small random models of every supported shape; the range makes attention far from flat.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": 192}),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 160, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3", {"sliding_window": None}),
}


def run(coroutine: Coroutine[Any, Any, T], timeout_s: float = 120.0) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, timeout_s)

    return asyncio.run(bounded())


def make_model(directory: Path, family: str, *, max_context: int = 2048, seed: int = 0, **overrides: Any) -> Path:
    """A random model of one family with the byte tokenizer, in transformers' format."""
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
    config = getattr(transformers, f"{prefix}Config")(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    model.generation_config.eos_token_id = 256
    model.generation_config.pad_token_id = 256
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
