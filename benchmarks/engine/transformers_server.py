"""transformers behind an OpenAI-like API, for the comparison: greedy, streamed, /v1/chat/completions only.

    python -m benchmarks.engine.transformers_server MODEL --port N [--continuous-batching]

By default one turn at a time through `generate`, with a DynamicCache that waits for the conversation's next turn; with
--continuous-batching through transformers' own manager, its paged cache and its prefix sharing.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.engine.weights import kv_token_bytes

_STOP_S = 5.0
_PAGE_TOKENS = 256
_STEP_TOKENS = 512  # as many as ours takes
# The manager reserves a mask of a step's tokens over all of its cache: gigabytes, where a small model's KV is short.
_MOST_CACHE_TOKENS = 64 * 1024


class ChatRequest(BaseModel):
    """What the benchmark sends and this acts on."""

    messages: list[dict[str, str]]
    max_tokens: int


class Answer:
    """Tokens on their way from the thread that computes them. Made on the loop that reads it."""

    def __init__(self) -> None:
        self.cached_tokens: int | None = None  # of the prompt, if that is known; then when the first token comes
        self._loop = asyncio.get_running_loop()
        self._tokens = asyncio.Queue[int | Exception | None]()

    def put(self, token: int | Exception | None) -> None:
        """From any thread. None: that was the last one."""
        self._loop.call_soon_threadsafe(self._tokens.put_nowait, token)

    async def __aiter__(self) -> AsyncIterator[int]:
        """Raises what was put."""
        while (token := await self._tokens.get()) is not None:
            if isinstance(token, Exception):
                raise token
            yield token


class Backend(Protocol):
    def generate(self, prompt: list[int], max_tokens: int) -> Answer:
        """Raises RuntimeError: it cannot."""

    def stop(self) -> None:
        """End its threads."""


@dataclass
class Caches:
    """Caches of past turns, least recently used first, of at most `limit` tokens together. One thread at a time."""

    limit: int
    _kept: list[tuple[list[int], DynamicCache]] = field(default_factory=list)

    def take(self, prompt: list[int]) -> tuple[int, DynamicCache]:
        """The cache of the longest beginning of the prompt and its number of tokens; an empty one if there is none."""
        fitting = [kept for kept in self._kept if prompt[: len(kept[0])] == kept[0] and len(kept[0]) < len(prompt)]
        if not fitting:
            return 0, DynamicCache()
        found = max(fitting, key=lambda kept: len(kept[0]))
        self._kept = [kept for kept in self._kept if kept is not found]
        return len(found[0]), found[1]

    def keep(self, ids: list[int], cache: DynamicCache) -> None:
        self._kept.append((ids, cache))
        while sum(len(ids) for ids, _ in self._kept) > self.limit:
            self._kept.pop(0)


class _Stream(BaseStreamer):
    """What `generate` hands its tokens to; the first thing it hands over is the prompt."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self._answer.put(int(value))
        self._begun = True

    def end(self) -> None:
        self._answer.put(None)


class Sequential:
    """`generate`, one turn after another."""

    def __init__(self, model: Any, cache_tokens: int) -> None:
        self._model = model
        self._caches = Caches(cache_tokens)
        self._turn = threading.Lock()

    def generate(self, prompt: list[int], max_tokens: int) -> Answer:
        answer = Answer()
        threading.Thread(target=self._compute, args=(prompt, max_tokens, answer), daemon=True).start()
        return answer

    def stop(self) -> None:
        """They end with the process."""

    def _compute(self, prompt: list[int], max_tokens: int, answer: Answer) -> None:
        with self._turn:
            try:
                answer.cached_tokens, cache = self._caches.take(prompt)
                ids = torch.tensor([prompt])
                made = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=GenerationConfig(max_new_tokens=max_tokens, do_sample=False, pad_token_id=0),
                    past_key_values=cache,
                    streamer=_Stream(answer),
                )
                self._caches.keep(made[0, :-1].tolist(), cache)  # the last token's KV was never computed
            except Exception as error:
                answer.put(error)


class Batching:
    """transformers' continuous batching."""

    def __init__(self, model: Any, cache_tokens: int) -> None:
        """Raises MemoryError: the manager's buffers do not fit."""
        config = ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=min(cache_tokens, _MOST_CACHE_TOKENS) // _PAGE_TOKENS,
            max_batch_tokens=_STEP_TOKENS,
        )
        generation = GenerationConfig(do_sample=False, pad_token_id=0)
        self._manager = model.init_continuous_batching(generation, config)
        # Makes the buffers now: where they do not fit, the manager's thread would end later, and every request with it.
        self._manager.warmup()
        self._manager.start()
        self._asked = 0

    def generate(self, prompt: list[int], max_tokens: int) -> Answer:
        answer = Answer()
        said = 0

        def received(output: Any) -> None:
            nonlocal said
            for token in output.generated_tokens[said:]:
                answer.put(int(token))
            said = len(output.generated_tokens)
            if output.is_finished():
                answer.put(RuntimeError(output.error) if output.error else None)

        name = f"turn {self._asked}"
        self._asked += 1
        self._manager.register_result_handler(name, received)
        if self._manager.add_request(prompt, request_id=name, max_new_tokens=max_tokens, streaming=True) is None:
            raise RuntimeError("the manager's thread is dead")
        return answer

    def stop(self) -> None:
        self._manager.stop(timeout=_STOP_S, hard_stop=True)


def application(tokenizer: Any, backend: Backend) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest) -> StreamingResponse:
        text = tokenizer.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        answer = backend.generate(prompt, asked.max_tokens)

        async def events() -> AsyncIterator[str]:
            tokens = 0
            try:
                async for token in answer:
                    tokens += 1
                    yield _event({"choices": [{"delta": {"content": tokenizer.decode([token])}}]})
            except Exception as error:
                yield _event({"error": repr(error)})
                return
            details = {"cached_tokens": answer.cached_tokens}
            usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "prompt_tokens_details": details}
            yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def main(
    model: Path,
    port: Annotated[int, typer.Option()],
    dtype: Annotated[str, typer.Option()] = "float32",
    threads: Annotated[int, typer.Option()] = 2,
    kv_bytes: Annotated[int, typer.Option(help="For the caches of all conversations together.")] = 2**29,
    continuous_batching: Annotated[bool, typer.Option()] = False,
) -> None:
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    backend = (Batching if continuous_batching else Sequential)(loaded, kv_bytes // kv_token_bytes(model, dtype))
    try:
        uvicorn.run(application(tokenizer, backend), port=port, log_level="warning")
    finally:
        backend.stop()


if __name__ == "__main__":
    typer.run(main)
