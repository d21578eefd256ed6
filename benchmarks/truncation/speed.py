"""What truncation costs in time, and in hits, through the whole system over HTTP.

CA  what is left keeps its KV
OF  an overflow throws the cache away (--overflow recompute); what is computed then is reused until the next one
TT  everything is recomputed in every turn (--no-reuse)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from benchmarks.models import bench_88m
from benchmarks.random_model import byte_tokenizer, make_random_model
from benchmarks.stack import running_stack
from benchmarks.truncation.quality import TIMES
from benchmarks.turns import Conversation, settle

MODES: dict[str, dict[str, str]] = {"CA": {}, "OF": {"overflow": "recompute"}, "TT": {"no_reuse": "true"}}
_WINDOW = 2048
_CHARACTERS = 4  # of recorded text for a token
_ANSWER_TOKENS = 8
_MESSAGE_TOKENS = 4  # of the benchmark's chat template


@dataclass(frozen=True)
class Overflow:
    """The turn in which a conversation was truncated."""

    method: str
    ttft_s: float  # request sent to first token received, over HTTP
    prefill_s: float
    cached: int
    prompt_tokens: int
    dropped: int


@dataclass(frozen=True)
class Hits:
    """Of all turns of conversations that outgrow the window, first turns included."""

    method: str
    windows: int  # length of each conversation
    conversations: int
    turns: int
    truncated: int  # turns in which something more was dropped, before the answer or within it
    turns_hit: int  # turns that found some history, and missed nothing
    cached: int
    missed: int  # had been computed by an earlier turn, and were computed again
    prompt_tokens: int

    @property
    def rate(self) -> float:
        return self.cached / self.prompt_tokens

    @property
    def rate_of_turns(self) -> float:
        """As the paper counts: there a conversation's KV is found whole or not at all."""
        return self.turns_hit / self.turns


def measure_ttft(repeats: int, new: int, step: Callable[[], None]) -> list[Overflow]:
    """Time to first token of a turn of `new` tokens that makes the context overflow; history in DRAM.

    Raises RuntimeError: it did not.
    """
    found = []
    for name, settings in MODES.items():
        with running_stack(bench_88m(), log_level="warning", max_context=_WINDOW, retain=0, **settings) as stack:
            Conversation(stack, "warm-up").say(200, _ANSWER_TOKENS)
            for repeat in range(repeats):
                conversation = Conversation(stack, f"conversation {repeat}")
                conversation.say(_WINDOW - 2 * _ANSWER_TOKENS - _MESSAGE_TOKENS, _ANSWER_TOKENS)
                settle(stack, "recompute" if name == "TT" else "dram")
                reply = conversation.say(new - _MESSAGE_TOKENS, _ANSWER_TOKENS)
                parts = reply.usage["cachedattention"]
                if not parts["dropped"]:
                    raise RuntimeError(f"the context did not overflow: {reply.usage}")
                cached = reply.usage["prompt_tokens_details"]["cached_tokens"]
                counts = (cached, reply.usage["prompt_tokens"], parts["dropped"])
                found.append(Overflow(name, reply.ttft_s, parts["prefill_s"], *counts))
                step()
    return found


def measure_hits(recorded: Path, directory: Path, count: int, step: Callable[[], None]) -> list[Hits]:
    """Hit rates over recorded conversations: their lengths, and a small random model's answers.

    count: conversations of each length.
    """
    tokenizer = byte_tokenizer()
    end = int(tokenizer.eos_token_id or 0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=_WINDOW,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    make_random_model(directory, config, seed=1)
    found = []
    for name in ("CA", "OF"):
        with running_stack(directory, log_level="warning", retain=0, **MODES[name]) as stack:
            recordings = _recordings(recorded)
            for windows in TIMES:
                totals = dict.fromkeys(("turns", "truncated", "turns_hit", "cached", "missed", "prompt_tokens"), 0)
                for _ in range(count):
                    messages: list[dict[str, Any]] = []
                    dropped = 0
                    for said, answer_tokens in _joined(recordings, windows * _WINDOW):
                        messages.append({"role": "user", "content": said})
                        reply = stack.chat(messages, max_tokens=answer_tokens, logit_bias={str(end): -100})
                        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
                        usage = reply["usage"]
                        cached, parts = usage["prompt_tokens_details"]["cached_tokens"], usage["cachedattention"]
                        totals["turns"] += 1
                        totals["truncated"] += parts["dropped"] > dropped
                        totals["turns_hit"] += bool(cached) and not parts["missed"]
                        totals["cached"] += cached
                        totals["missed"] += sum(parts["missed"].values())
                        totals["prompt_tokens"] += usage["prompt_tokens"]
                        dropped = parts["dropped"]
                    step()
                found.append(Hits(name, windows, count, **totals))
    return found


def _recordings(recorded: Path) -> Iterator[list[tuple[str, int]]]:
    """Recorded conversations: what is said in each turn, and how long the answer was, in tokens."""
    with gzip.open(recorded, "rt", encoding="utf-8") as lines:
        for line in lines:
            said, turns = "", []
            for message in json.loads(line)["messages"]:
                length = min(max(1, len(message["content"] or "") // _CHARACTERS), _WINDOW // 2)
                if message["role"] != "assistant":
                    said = "x" * length
                elif said:
                    turns.append((said, length))
                    said = ""
            yield turns


def _joined(recordings: Iterator[list[tuple[str, int]]], tokens: int) -> list[tuple[str, int]]:
    """A conversation of so many tokens or more: recorded ones, one after the other."""
    turns: list[tuple[str, int]] = []
    while sum(len(said) + answer for said, answer in turns) < tokens:
        turns += next(recordings)
    return turns
