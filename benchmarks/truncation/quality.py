"""What truncation costs in quality: perplexity of long texts, and recall of facts that the context still holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.truncation.methods import METHODS, Reader
from inference.embedded.windows import Encoder, fresh_conversation
from inference.embedded.world import AnswerKind, Conversation, Turn
from inference.model import LoadedModel
from inference.truncation import Window

TIMES = (2, 4, 10)  # the window
_TURN_TOKENS = 64
_PERSON_TOKENS = 800  # said by one person in a long conversation


@dataclass(frozen=True)
class Quality:
    """Of one method. perplexity: by length of the text in windows, of all behind the first window."""

    method: str
    perplexity: dict[int, float]
    tokens: int  # at the longest
    recalled: int = 0
    asked: int = 0  # for facts that the context still holds


class _Sums:
    def __init__(self, window: int) -> None:
        self._window = window
        self._nats = dict.fromkeys(TIMES, 0.0)
        self._tokens = dict.fromkeys(TIMES, 0)

    def add(self, place: int, nats: float) -> None:
        for times in TIMES:
            if self._window <= place < times * self._window:
                self._nats[times] += nats
                self._tokens[times] += 1

    def perplexity(self) -> dict[int, float]:
        return {times: math.exp(self._nats[times] / max(1, self._tokens[times])) for times in TIMES}

    @property
    def tokens(self) -> int:
        return self._tokens[TIMES[-1]]


def read_text(
    model: LoadedModel, window: Window, ids: list[int], texts: int, step: Callable[[], None]
) -> list[Quality]:
    """Perplexity of so many stretches of a text, ten windows each. Raises ValueError: the text is too short."""
    length = TIMES[-1] * window.tokens
    if len(ids) < texts * length:
        raise ValueError(f"the text has {len(ids)} tokens; {texts} stretches of {length} were asked for")
    apart = len(ids) // texts
    found = []
    for name, method in METHODS.items():
        sums = _Sums(window.tokens)
        for first in range(0, texts * apart, apart):
            reader = Reader(model, window, method)
            for at in range(0, length, _TURN_TOKENS):
                turn = ids[first + at : first + min(at + _TURN_TOKENS, length)]
                told = reader.read(turn)
                for place, nats in enumerate(told.nats.tolist(), start=at + len(turn) - len(told.nats)):
                    sums.add(place, nats)
            step()
        found.append(Quality(name, sums.perplexity(), sums.tokens))
    return found


def long_conversation(seed: str, tokens: int, encoder: Encoder) -> Conversation:
    """One person after another, that questions are about what was told not long ago, as at any length."""
    system = ""
    turns: tuple[Turn, ...] = ()
    for part in itertools.count():
        said = fresh_conversation(f"{seed}/{part}", _PERSON_TOKENS, encoder.count, "training")
        whole = Conversation(system or said.system, (*turns, *said.turns))
        if len(encoder.conversation(whole).ids) > tokens:
            break
        system, turns = whole.system, whole.turns
    return Conversation(system, turns)


def converse(
    model: LoadedModel, window: Window, encoder: Encoder, conversations: int, step: Callable[[], None]
) -> list[Quality]:
    """Conversations of the embedded model's world, ten windows each: perplexity of answers, and recall."""
    found = []
    for name, method in METHODS.items():
        sums, recalled, asked = _Sums(window.tokens), 0, 0
        for number in range(conversations):
            conversation = long_conversation(f"evaluation/truncation/{number}", TIMES[-1] * window.tokens, encoder)
            encoded = encoder.conversation(conversation)
            head = len(encoder.encode(conversation.system)) + 2
            reader = Reader(model, window, method, head)
            at = 0
            for turn, (start, end) in zip(conversation.turns, encoded.answers, strict=True):
                told = reader.read(encoded.ids[at:end])
                nats, is_best = told.nats[start - end :], told.is_best[start - end :]
                for place, surprise in enumerate(nats.tolist(), start=start):
                    sums.add(place, surprise)
                is_asked = turn.kind is AnswerKind.RECALL and turn.distance is not None and start >= window.tokens
                if is_asked and start - (turn.distance or 0) in reader.left(end):
                    asked += 1
                    recalled += bool(is_best.all())
                at = end
            step()
        found.append(Quality(name, sums.perplexity(), sums.tokens, recalled, asked))
    return found
