"""OpenAI's chat completion and its chunks, made of a turn's events. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.turn import Finished
from protocol.ids import unpack_tokens
from protocol.messages import SampledLogprobs, TokenLogprob, TurnDelta, TurnUsage


@dataclass(frozen=True)
class CompletionShape:
    """What all objects of one answer share, and which extras its client asked for."""

    turn_id: bytes
    created_s: int
    model: str
    fingerprint: bytes  # of weights, dtype and all else that decides the answer: ids.model_namespace
    token_ids: bool = False
    logprobs: bool = False
    stream_usage: bool = False

    def completion(self, finished: Finished) -> dict[str, Any]:
        """The whole answer in one object."""
        done = finished.done
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": done.text, "refusal": None},
            "logprobs": self._logprobs(finished.logprobs),
            "finish_reason": done.finish_reason,
        }
        if self.token_ids:
            choice["token_ids"] = _token_list(done.tokens)
        body = self._head("chat.completion") | {"choices": [choice], "usage": usage(finished)}
        if self.token_ids:
            body["prompt_token_ids"] = _token_list(done.prompt_tokens)
        return body

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def delta_chunks(self, delta: TurnDelta) -> list[dict[str, Any]]:
        """One chunk, or none where the delta has nothing that this client would see."""
        if not delta.text and not (self.token_ids and delta.tokens) and not delta.logprobs:
            return []
        return [self._chunk({"content": delta.text}, tokens=delta.tokens, logprobs=delta.logprobs)]

    def last_chunks(self, finished: Finished) -> list[dict[str, Any]]:
        """The rest of the answer, the end, and the usage where it was asked for."""
        done = finished.done
        chunks = self.delta_chunks(finished.tail)
        last = self._chunk({}, finish_reason=done.finish_reason)
        if self.token_ids:
            last["prompt_token_ids"] = _token_list(done.prompt_tokens)
        chunks.append(last)
        if self.stream_usage:
            chunks.append(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(finished)})
        return chunks

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.turn_id.hex()}",
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": f"fp_{self.fingerprint.hex()[:12]}",
        }

    def _chunk(
        self,
        delta: dict[str, str],
        finish_reason: str | None = None,
        tokens: bytes = b"",
        logprobs: Sequence[SampledLogprobs] | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "delta": delta,
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        if self.token_ids:
            choice["token_ids"] = _token_list(tokens)
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        if self.stream_usage:
            chunk["usage"] = None  # as OpenAI does: there in every chunk, filled in the last one
        return chunk

    def _logprobs(self, entries: Sequence[SampledLogprobs]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [_token(e.sampled) | {"top_logprobs": [_token(other) for other in e.top]} for e in entries]
        return {"content": content, "refusal": None}


def _token(entry: TokenLogprob) -> dict[str, Any]:
    return {
        "token": entry.bytes.decode("utf-8", "replace") or entry.name,
        "logprob": entry.logprob,
        "bytes": list(entry.bytes) or None,
    }


def usage(finished: Finished) -> dict[str, Any]:
    """OpenAI's usage and ours: hbm + dram + ssd + computed + the missed ones are the prompt's tokens."""
    found: TurnUsage = finished.done.usage
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "total_tokens": found.prompt_tokens + found.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": found.hbm + found.dram + found.ssd},
        "cachedattention": {
            "hbm": found.hbm,
            "dram": found.dram,
            "ssd": found.ssd,
            "computed": found.computed,
            "missed": dict(found.missed),
            "ttft_s": finished.ttft_s,
            "prefill_s": finished.done.prefill_s,
        },
    }


def _token_list(packed: bytes) -> list[int]:
    return [int(token) for token in unpack_tokens(packed)]
