"""Plays scripts against a running stack and checks every turn: the answer, the reuse, the account."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.stack import Stack
from tests.end_to_end.conversations import Script
from tests.inference.harness import Reference


@dataclass
class Played:
    """What happened over all turns."""

    turns: int = 0
    excused: int = 0  # differences at two equal best logits
    hits: dict[str, int] = field(default_factory=lambda: {"hbm": 0, "dram": 0, "ssd": 0})
    missed: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0


@dataclass
class _Open:
    """A conversation under way."""

    script: Script
    messages: list[dict[str, Any]] = field(default_factory=list)
    next_turn: int = 0
    history: int = 0  # tokens that the last turn left behind: prompt + generated - 1
    is_over: bool = False


class Player:
    """Plays conversations turn by turn.

    expect_hits: assert that each turn after the first reuses all its history. between_turns: called before every
    request (or group of parallel ones) with their count so far, to restart things or to wait.
    """

    def __init__(
        self,
        stack: Stack,
        reference: Reference,
        max_tokens: int = 12,
        *,
        expect_hits: bool = True,
        between_turns: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.stack = stack
        self.reference = reference
        self.played = Played()
        self._max_tokens = max_tokens
        self._expect_hits = expect_hits
        self._between_turns = between_turns

    def play(self, scripts: Sequence[Script], parallel: int = 1, open_at_once: int | None = None) -> Played:
        """Play all scripts, `open_at_once` of them taking turns, `parallel` requests at a time."""
        requests = 0
        width = open_at_once or parallel
        for start in range(0, len(scripts), width):
            group = [_Open(script) for script in scripts[start : start + width]]
            while going := [c for c in group if not c.is_over]:
                for first in range(0, len(going), parallel):
                    together = going[first : first + parallel]
                    self._between_turns(requests)
                    requests += 1
                    with ThreadPoolExecutor(len(together)) as pool:
                        answers = list(pool.map(self._ask, together))
                    for conversation, answer in zip(together, answers, strict=True):
                        if answer is not None:
                            self._check(conversation, answer)
        return self.played

    def _ask(self, conversation: _Open) -> dict[str, Any] | None:
        conversation.messages += conversation.script.turns[conversation.next_turn]
        conversation.next_turn += 1
        try:
            return self.stack.chat(conversation.messages, max_tokens=self._max_tokens, truncation="disabled")
        except httpx.HTTPStatusError as error:
            refusal = error.response
        # The script is longer than the model's context: the conversation is cut there.
        assert refusal.json()["error"]["code"] == "context_length_exceeded", refusal.text
        assert conversation.next_turn > 1, "not even the first turn fits"
        conversation.is_over = True
        return None

    def _check(self, conversation: _Open, answer: dict[str, Any]) -> None:
        prompt, choice, usage = answer["prompt_token_ids"], answer["choices"][0], answer["usage"]
        sampled = choice["token_ids"]
        account = usage["cachedattention"]
        self.played.turns += 1
        self.played.excused += self.reference.check(prompt, sampled)
        assert usage["prompt_tokens"] == len(prompt)
        assert usage["completion_tokens"] == len(sampled)
        hits = sum(account[tier] for tier in self.played.hits)
        assert hits == usage["prompt_tokens_details"]["cached_tokens"]
        assert hits + account["computed"] + sum(account["missed"].values()) == len(prompt)
        where = f"{conversation.script.name}, turn {conversation.next_turn}: {account}"
        if self._expect_hits:
            assert hits >= conversation.history, f"{hits} of {conversation.history} tokens of history hit; {where}"
            assert not account["missed"], where
        elif conversation.history:
            assert hits + sum(account["missed"].values()) >= conversation.history, where
        for tier in self.played.hits:
            self.played.hits[tier] += account[tier]
        for reason, tokens in account["missed"].items():
            self.played.missed[reason] = self.played.missed.get(reason, 0) + tokens
        self.played.prompt_tokens += len(prompt)
        conversation.history = len(prompt) + len(sampled) - 1
        conversation.messages.append({"role": "assistant", "content": choice["message"]["content"]})
        conversation.is_over = conversation.next_turn == len(conversation.script.turns)
