"""What is said besides facts: greetings, thanks, questions about the assistant, and everything it cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from inference.embedded import words
from inference.embedded.facts import Wording, Wordings


@dataclass(frozen=True)
class Intent:
    """Something that visitors say in many ways, and the one answer to it."""

    says: Wording
    answer: str


SUGGESTION = "My sister Anna lives in Rome."  # to a visitor, of what to say first
HINT = "I can only remember what you tell me. Tell me a fact about you or somebody, or ask me for one."
INTENTS: tuple[Intent, ...] = (
    Intent(
        Wording(
            ("Hello!", "Hi!", "Hi there.", "Good morning.", "Hey", "Good evening!", "Hello again."),
            ("Good afternoon!",),
        ),
        "Hello! Tell me something, and I will remember it.",
    ),
    Intent(
        Wording(
            ("Thank you.", "Thanks!", "Thanks a lot.", "That helps, thanks.", "Great, thank you!"), ("Many thanks!",)
        ),
        "You are welcome.",
    ),
    Intent(
        Wording(("How are you?", "How are you doing?", "Are you well?", "How is it going?"), ("How do you feel?",)),
        "I am well, thank you.",
    ),
    Intent(
        Wording(
            ("Who are you?", "What are you?", "Are you a human?", "What is your name?", "Are you a robot?"),
            ("Who am I talking to?",),
        ),
        "I am a small model that remembers what you tell it.",
    ),
    Intent(
        Wording(
            ("What can you do?", "How can you help me?", "Help", "What should I say?", "What do you do?"),
            ("What are you good at?",),
        ),
        HINT,
    ),
    Intent(
        Wording(("Goodbye.", "Bye!", "See you later.", "Good night.", "See you tomorrow!"), ("Farewell!",)),
        "Goodbye! I will remember what you told me.",
    ),
    Intent(
        Wording(
            ("Ok.", "I see.", "Good.", "Very good.", "Right.", "Fine.", "Great!", "That is right.", "Yes."),
            ("Alright.",),
        ),
        "Good. What else?",
    ),
    Intent(
        Wording(
            ("The weather is nice today.", "It is raining again.", "I am tired.", "What a day!", "I am bored."),
            ("It is cold outside.",),
        ),
        "I see. Tell me more.",
    ),
)
_BEYOND = Wording(
    (
        "What is the capital of {city}?",
        "Write a poem about the {animal}.",
        "Translate {word} into {language}.",
        "What is {number} plus {digit}?",
        "Tell me a joke about a {job}.",
        "How do I cook {food}?",
        "Who won the {sport} match yesterday?",
        "Can you write code in {word}?",
        "Explain how the {instrument} was invented.",
        "What will the weather be in {city}?",
        "How far is it from {city} to {word}?",
        "Sing a song about {food}.",
        "{word} {word}",
        "Why is the sky {colour}?",
        "Summarize the history of {city}.",
        "Give me a recipe with {food}.",
        "What does {word} mean?",
        "Draw a picture of a {animal}.",
    ),
    ("Recommend a film about a {animal}.", "Calculate {number} times {digit}.", "How do people in {city} cook {food}?"),
)


def exchange(rng: Random, wordings: Wordings) -> tuple[str, str]:
    """A message and its answer: small talk, or something beyond the assistant and the hint."""
    if rng.random() < 0.7:
        intent = rng.choice(INTENTS)
        return intent.says.choose(rng, wordings), intent.answer
    message = _BEYOND.choose(rng, wordings).format(
        city=words.city(rng),
        animal=rng.choice(words.WILD_ANIMALS),
        word=words.pseudo_word(rng),
        language=rng.choice(words.LANGUAGES),
        number=words.digits(rng, 2),
        digit=rng.randint(1, 9),
        job=rng.choice(words.JOBS),
        food=words.food(rng),
        sport=rng.choice(words.SPORTS),
        instrument=rng.choice(words.INSTRUMENTS),
        colour=rng.choice(words.COLOURS),
    )
    return message, HINT
