"""How a visitor types: openers, lower case, forgotten punctuation, slips of the finger.

What must be found again (names, values) is never misspelt; a person who writes in lower case tells lower-case values.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from inference.embedded.facts import Wording

_Piece = tuple[str, bool]  # text, and whether it is a slot's content

OPENERS = Wording(
    (
        "By the way, ",
        "Just so you know, ",
        "I should mention that ",
        "You know, ",
        "Hi, ",
        "Hello! ",
        "Please note: ",
        "Remember that ",
        "Please remember: ",
        "I think ",
        "Also, ",
        "Did I say that ",
        "One more thing: ",
        "For your information, ",
        "It is true that ",
    ),
    ("Something else: ", "Here is a fact: ", "Keep in mind that ", "Before I forget: "),
)
QUESTION_OPENERS = Wording(
    ("So, ", "Tell me, ", "Please, ", "Quick question: ", "Hm, ", "Ok, ", "By the way, ", "Now, "),
    ("Sorry to ask, but ", "One question: "),
)
CORRECTIONS = Wording(
    (
        "Actually, ",
        "Correction: ",
        "Update: ",
        "Change of plan: ",
        "That has changed: ",
        "Sorry, I was wrong: ",
        "It is different now: ",
        "Not any more! Now ",
        "Wait, ",
    ),
    ("A small correction: ", "Things have changed: ", "Please update this: "),
)


@dataclass(frozen=True)
class Typist:
    """One person's way of typing."""

    lower_case: bool
    slips: float  # probability that a message has a slip
    bare: float  # probability that a message ends without its punctuation
    american: bool = False  # "favorite color"
    contracting: float = 0.0  # probability of "I'm" and "what's"
    apostrophes: bool = True  # or "im" and "whats"

    @staticmethod
    def meet(rng: Random) -> Typist:
        """Most people type well."""
        careless = rng.random() < 0.3
        return Typist(
            lower_case=rng.random() < 0.12,
            slips=0.2 if careless else 0.03,
            bare=0.5 if careless else 0.05,
            american=rng.random() < 0.3,
            contracting=rng.choice((0.0, 0.0, 0.5, 0.9)),
            apostrophes=not careless or rng.random() < 0.6,
        )

    def value(self, text: str) -> str:
        """A name or value as this person writes it."""
        return text.lower() if self.lower_case else text

    def spelling(self, text: str) -> str:
        """Words that are no name or value, as this person spells them."""
        return _BRITISH.sub(lambda found: _AMERICAN[found[0]], text) if self.american else text

    def contracted(self, text: str, rng: Random) -> str:
        """ "I'm" for "I am", now and then."""
        if rng.random() >= self.contracting:
            return text
        return _LONG.sub(lambda found: found[1] + (_SHORT if self.apostrophes else _BARE)[found[2]], text)


_AMERICAN = {"favourite": "favorite", "colour": "color", "travelling": "traveling", "practise": "practice"}
_BRITISH = re.compile("|".join(_AMERICAN))
_LONG = re.compile(r"\b(I|[Ww]hat|[Ww]here|[Ww]ho|[Ww]hen|[Hh]ow|[Hh]e|[Ss]he|[Ii]t|[Tt]hat)( am| is)(?= )")
_SHORT = {" am": "'m", " is": "'s"}
_BARE = {" am": "m", " is": "s"}


def fill(template: str, slots: Mapping[str, str]) -> str:
    """The template with its slots filled, as is."""
    return "".join(text for text, _ in _pieces(template, slots))


def say(template: str, slots: Mapping[str, str], typist: Typist, rng: Random, opener: str = "") -> str:
    """The template as `typist` types it: one message, or one sentence of it."""
    pieces = [(opener, False), *_pieces(typist.spelling(template), slots)]
    if not opener and not typist.lower_case:
        pieces = _capitalized(pieces)
    if typist.lower_case:
        pieces = [(text if slot else text.lower(), slot) for text, slot in pieces]
    if rng.random() < typist.slips:
        pieces = _with_slip(pieces, rng)
    text = typist.contracted("".join(text for text, _ in pieces), rng)
    return text.rstrip(".?!") if rng.random() < typist.bare else text


def _pieces(template: str, slots: Mapping[str, str]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for literal, name, _, _ in string.Formatter().parse(template):
        if literal:
            pieces.append((literal, False))
        if name is not None:
            pieces.append((slots[name], True))
    return pieces


def _capitalized(pieces: list[_Piece]) -> list[_Piece]:
    """The first letter of the whole made a capital."""
    for at, (text, slot) in enumerate(pieces):
        if text:
            return [*pieces[:at], (text[0].upper() + text[1:], slot), *pieces[at + 1 :]]
    return pieces


def _with_slip(pieces: list[_Piece], rng: Random) -> list[_Piece]:
    """Two letters exchanged, one dropped or one doubled in a long word of the template's own text."""
    at = rng.randrange(len(pieces))
    text, slot = pieces[at]
    inner = [i for i in range(1, len(text) - 2) if text[i - 1 : i + 3].isalpha()]
    if slot or not inner:
        return pieces
    i = rng.choice(inner)
    slip = rng.choice((text[i + 1] + text[i], text[i + 1], text[i] * 2 + text[i + 1]))
    return [*pieces[:at], (text[:i] + slip + text[i + 2 :], slot), *pieces[at + 1 :]]
