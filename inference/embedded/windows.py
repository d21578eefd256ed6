"""Conversations as windows of tokens, as training and evaluation read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from inference.embedded.facts import Wordings
from inference.embedded.template import SPECIAL_TOKENS
from inference.embedded.world import Conversation, converse

Tokens = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedConversation:
    """The token ids that the chat template gives, and where each answer lies among them: [start, end) with its end."""

    ids: list[int]
    answers: list[tuple[int, int]]


class Encoder:
    """A tokenizer with the chat template's special tokens at hand."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.end, self.system, self.user, self.assistant = (special_id(tokenizer, t) for t in SPECIAL_TOKENS[:4])

    def count(self, text: str) -> int:
        """Tokens of a message's text."""
        return len(self._tokenizer.encode(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of a message's text."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def conversation(self, conversation: Conversation) -> EncodedConversation:
        """Equal to tokenizing what the chat template renders."""
        ids = [self.system, *self.encode(conversation.system), self.end]
        answers = []
        for turn in conversation.turns:
            ids += [self.user, *self.encode(turn.user), self.end, self.assistant]
            start = len(ids)
            ids += [*self.encode(turn.answer), self.end]
            answers.append((start, len(ids)))
        return EncodedConversation(ids, answers)


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises ValueError: the tokenizer is not one of ours."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return int(found)


def fresh_conversation(seed: str, window: int, count: Callable[[str], int], wordings: Wordings) -> Conversation:
    """The conversation of a seed. Seeds of training and evaluation never meet: they begin with what they are for."""
    return converse(Random(seed), window, count, wordings)


def training_batch(encoder: Encoder, seed: int, step: int, window: int, rows: int) -> tuple[Tokens, Mask]:
    """Tokens [rows, window] and which of them are answers [rows, window]. A function of its arguments only.

    One conversation per row: nothing can be looked up in another one. What is left of a row is <|end|>.
    """
    tokens = np.full((rows, window), encoder.end, dtype=np.uint16)
    answers = np.zeros((rows, window), dtype=np.bool_)
    for row in range(rows):
        seed_of_row = f"training/{seed}/{step}/{row}"
        encoded = encoder.conversation(fresh_conversation(seed_of_row, window, encoder.count, "training"))
        tokens[row, : len(encoded.ids)] = encoded.ids
        for start, end in encoded.answers:
            answers[row, start:end] = True
    return tokens, answers
