"""OpenAI's older completion objects and their chunks, made of turns' events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.api.completion import CompletionOptions, token_list, usage_of
from gateway.turn import Finished
from protocol.messages import SampledLogprobs, TokenLogprob, TurnDelta


class TextShape:
    """echoes: what each answer's text begins with, often nothing. prompts: so many; each has as many answers."""

    def __init__(self, options: CompletionOptions, echoes: Sequence[str], prompts: int) -> None:
        self._options = options
        self._echoes = echoes
        self._prompts = prompts
        self._offsets = [len(echo) for echo in echoes]  # of the next token's text

    def whole(self, finished: Sequence[Finished]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(finished):
            done = answer.done
            text = self._echoes[index] + done.text
            choices.append(self._choice(index, text, done.finish_reason, answer.logprobs, done.tokens))
            if self._options.token_ids:
                choices[-1]["prompt_token_ids"] = token_list(done.prompt_tokens)
        return self._options.head("text_completion") | {
            "choices": choices,
            "usage": usage_of(finished, self._prompts),
        }

    def first_chunks(self) -> list[dict[str, Any]]:
        return [self._chunk(index, echo) for index, echo in enumerate(self._echoes) if echo]

    def delta_chunks(self, index: int, delta: TurnDelta) -> list[dict[str, Any]]:
        """One chunk, or none where the delta has nothing that this client would see."""
        if not delta.text and not (self._options.token_ids and delta.tokens) and not delta.logprobs:
            return []
        return [self._chunk(index, delta.text, None, delta.logprobs, delta.tokens)]

    def last_chunks(self, index: int, finished: Finished) -> list[dict[str, Any]]:
        last = self._chunk(index, "", finished.done.finish_reason)
        if self._options.token_ids:
            last["choices"][0]["prompt_token_ids"] = token_list(finished.done.prompt_tokens)
        return [*self.delta_chunks(index, finished.tail), last]

    def usage_chunks(self, finished: Sequence[Finished]) -> list[dict[str, Any]]:
        if not self._options.stream_usage:
            return []
        return [self._options.head("text_completion") | {"choices": [], "usage": usage_of(finished, self._prompts)}]

    def _chunk(
        self,
        index: int,
        text: str,
        finish_reason: str | None = None,
        logprobs: Sequence[SampledLogprobs] = (),
        tokens: bytes = b"",
    ) -> dict[str, Any]:
        choice = self._choice(index, text, finish_reason, logprobs, tokens)
        chunk = self._options.head("text_completion") | {"choices": [choice]}
        if self._options.stream_usage:
            chunk["usage"] = None
        return chunk

    def _choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: Sequence[SampledLogprobs], tokens: bytes
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs),
            "finish_reason": finish_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = token_list(tokens)
        return choice

    def _logprobs(self, index: int, entries: Sequence[SampledLogprobs]) -> dict[str, Any] | None:
        if not self._options.logprobs:
            return None
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            found["tokens"].append(_name(entry.sampled))
            found["token_logprobs"].append(entry.sampled.logprob)
            found["top_logprobs"].append({_name(token): token.logprob for token in (*entry.top, entry.sampled)})
            found["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(entry.sampled.bytes.decode("utf-8", "ignore"))
        return found


def _name(entry: TokenLogprob) -> str:
    """A token's text; as OpenAI writes it, where it is no whole characters."""
    try:
        return entry.bytes.decode() or entry.name
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
