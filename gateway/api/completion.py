"""OpenAI's chat completion and its chunks, made of a turn's events. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.recognize import tool_call_id
from gateway.tool_calls import Format, Piece, ToolCall, ToolCallParser
from gateway.turn import Finished, Turn
from protocol.ids import unpack_tokens
from protocol.messages import SampledLogprobs, TokenLogprob, TurnDelta, TurnUsage


@dataclass(frozen=True)
class CompletionOptions:
    """What all objects of one request's answers share, and which extras its client asked for."""

    id: str
    created_s: int
    model: str
    fingerprint: bytes  # of weights, dtype and all else that decides the answer: ids.model_namespace
    token_ids: bool = False
    logprobs: bool = False
    stream_usage: bool = False
    service_tier: str | None = None

    def head(self, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": f"fp_{self.fingerprint.hex()[:12]}",
        }
        return found if self.service_tier is None else found | {"service_tier": self.service_tier}


class ChatShape:
    """Chat completions and their chunks. tools: what answers may call; where they may call nothing, they are text."""

    def __init__(self, options: CompletionOptions, turns: Sequence[Turn], tools: Collection[str] = ()) -> None:
        self._options = options
        self._turns = turns
        format: Format = turns[0].model.tool_format if tools else ""
        self._parsers = [ToolCallParser(format, tools) for _ in turns]
        self._calls = [0] * len(turns)

    def whole(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """All answers in one object."""
        choices = [self._choice(index, answer) for index, answer in enumerate(finished)]
        body = self._options.head("chat.completion") | {"choices": choices, "usage": usage_of(finished)}
        if self._options.token_ids:
            body["prompt_token_ids"] = token_list(finished[0].done.prompt_tokens)
        return body

    def _choice(self, index: int, finished: Finished) -> dict[str, Any]:
        parser = self._parsers[index]
        pieces = [*parser.feed(finished.done.text), *parser.finish()]
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [self._call(index, piece) for piece in pieces if isinstance(piece, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(finished.logprobs),
            "finish_reason": "tool_calls" if calls else finished.done.finish_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = token_list(finished.done.tokens)
        return choice

    def first_chunks(self) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self._turns))]

    def delta_chunks(self, index: int, delta: TurnDelta) -> list[dict[str, Any]]:
        """What this client sees of the delta, often one chunk. Tokens and log probabilities go with the first."""
        pieces = self._parsers[index].feed(delta.text)
        return self._piece_chunks(index, pieces, delta)

    def last_chunks(self, index: int, finished: Finished) -> list[dict[str, Any]]:
        """The rest of the answer, and its end."""
        parser, done = self._parsers[index], finished.done
        pieces = [*parser.feed(finished.tail.text), *parser.finish()]
        chunks = self._piece_chunks(index, pieces, finished.tail)
        last = self._chunk(index, {}, "tool_calls" if self._calls[index] else done.finish_reason)
        if self._options.token_ids:
            last["prompt_token_ids"] = token_list(done.prompt_tokens)
        return [*chunks, last]

    def usage_chunks(self, finished: Sequence[Finished]) -> list[dict[str, Any]]:
        if not self._options.stream_usage:
            return []
        return [self._options.head("chat.completion.chunk") | {"choices": [], "usage": usage_of(finished)}]

    def _piece_chunks(self, index: int, pieces: Sequence[Piece], delta: TurnDelta) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [
            {"content": piece} if isinstance(piece, str) else {"tool_calls": [self._streamed_call(index, piece)]}
            for piece in pieces
        ]
        if not deltas and (delta.logprobs or (self._options.token_ids and delta.tokens)):
            deltas = [{"content": ""}]
        chunks = []
        for number, content in enumerate(deltas):
            tokens, logprobs = (b"", ()) if number else (delta.tokens, delta.logprobs)
            chunks.append(self._chunk(index, content, tokens=tokens, logprobs=logprobs))
        return chunks

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        """The id says which turn made the call, so that it is recognized when it comes back; see recognize.py."""
        number = self._calls[index]
        self._calls[index] += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": tool_call_id(self._turns[index].id, number), "type": "function", "function": function}

    def _streamed_call(self, index: int, call: ToolCall) -> dict[str, Any]:
        return {"index": self._calls[index]} | self._call(index, call)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        tokens: bytes = b"",
        logprobs: Sequence[SampledLogprobs] | None = None,
    ) -> dict[str, Any]:
        options = self._options
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        if options.token_ids:
            choice["token_ids"] = token_list(tokens)
        chunk = options.head("chat.completion.chunk") | {"choices": [choice]}
        if options.stream_usage:
            chunk["usage"] = None  # as OpenAI does: there in every chunk, filled in the last one
        return chunk

    def _logprobs(self, entries: Sequence[SampledLogprobs]) -> dict[str, Any] | None:
        if not self._options.logprobs:
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
        "cachedattention": account_of(finished),
    }


def account_of(finished: Finished) -> dict[str, Any]:
    done = finished.done
    return account(done.usage, finished.ttft_s, done.prefill_s, done.dropped_tokens, done.kept)


def account(
    found: TurnUsage,
    ttft_s: float | None,
    prefill_s: float | None,
    dropped: int = 0,
    kept: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """Where the prompt's tokens came from, and how long the first one of the answer took."""
    return {
        "hbm": found.hbm,
        "dram": found.dram,
        "ssd": found.ssd,
        "computed": found.computed,
        "missed": dict(found.missed),
        "explained": dict(found.explained),
        "dropped": dropped,
        "kept": [list(each) for each in kept],
        "ttft_s": ttft_s,
        "prefill_s": prefill_s,
    }


def usage_of(finished: Sequence[Finished], prompts: int = 1) -> dict[str, Any]:
    """Of several answers to each of so many prompts: a prompt counts once, with the account of its first answer."""
    each = len(finished) // prompts
    firsts = [usage(answer) for answer in finished[::each]]
    found = firsts[0]
    for other in firsts[1:]:
        found["prompt_tokens"] += other["prompt_tokens"]
        found["prompt_tokens_details"]["cached_tokens"] += other["prompt_tokens_details"]["cached_tokens"]
        ours = found["cachedattention"]
        for tier in ("hbm", "dram", "ssd", "computed"):
            ours[tier] += other["cachedattention"][tier]
        for reason, tokens in other["cachedattention"]["missed"].items():
            ours["missed"][reason] = ours["missed"].get(reason, 0) + tokens
    found["completion_tokens"] = sum(answer.done.usage.completion_tokens for answer in finished)
    found["total_tokens"] = found["prompt_tokens"] + found["completion_tokens"]
    return found


def token_list(packed: bytes) -> list[int]:
    return [int(token) for token in unpack_tokens(packed)]
