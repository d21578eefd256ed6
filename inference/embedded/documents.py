"""Short documents about places and people that nobody has heard of, and questions about them.

A place is founded and led by people, and some of the people have documents of their own, so that "what does the
founder of the Velmar Museum collect?" needs two documents. The answer names the person, which makes it two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from inference.embedded import words
from inference.embedded.facts import Wording, Wordings
from inference.embedded.phrasing import Typist, fill


@dataclass(frozen=True)
class Property:
    """One thing that a document may say of its subject. Slots: {S} the subject, {v} the value."""

    noun: str  # "founder", as in "the founder of the Velmar Museum"
    value: Callable[[Random], str]
    sentences: Wording
    questions: Wording
    bridge: str = ""  # the value is a person, who can be spoken of like this: "the founder of {S}"

    @property
    def topic(self) -> str:
        """What the assistant calls it."""
        return f"the {self.noun} of {{S}}"


@dataclass(frozen=True)
class Document:
    """What one document says. `values` follow the order of its sentences."""

    subject: str
    values: tuple[tuple[Property, str], ...]
    text: str  # title and sentences


PLACE: tuple[Property, ...] = (
    Property(
        "founder",
        words.full_name,
        Wording(("{S} was founded by {v}.", "The founder of {S} was {v}."), ("It was {v} who founded {S}.",)),
        Wording(("who founded {S}?", "who was the founder of {S}?"), ("by whom was {S} founded?",)),
        "the founder of {S}",
    ),
    Property(
        "director",
        words.full_name,
        Wording(("{S} is led by {v}.", "The director of {S} is {v}."), ("Today {v} runs {S} as its director.",)),
        Wording(("who leads {S}?", "who is the director of {S}?"), ("who is in charge of {S}?",)),
        "the director of {S}",
    ),
    Property(
        "opening year",
        words.year,
        Wording(("{S} opened in {v}.", "{S} has been open since {v}."), ("The doors of {S} first opened in {v}.",)),
        Wording(("when did {S} open?", "in which year did {S} open?"), ("since when has {S} been open?",)),
    ),
    Property(
        "location",
        words.city,
        Wording(("{S} stands in {v}.", "{S} can be found in {v}."), ("Whoever looks for {S} must go to {v}.",)),
        Wording(("where is {S}?", "in which city does {S} stand?"), ("where can {S} be found?",)),
    ),
    Property(
        "number of rooms",
        lambda rng: words.digits(rng, rng.choice((2, 3))),
        Wording(("{S} has {v} rooms.", "There are {v} rooms in {S}."), ("{S} is divided into {v} rooms.",)),
        Wording(
            ("how many rooms does {S} have?", "how many rooms are there in {S}?"),
            ("what is the number of rooms in {S}?",),
        ),
    ),
    Property(
        "number of visitors",
        lambda rng: words.digits(rng, rng.choice((3, 4, 5))),
        Wording(
            ("{S} receives {v} visitors a year.", "Every year {v} people visit {S}."),
            ("{S} counts {v} visitors each year.",),
        ),
        Wording(
            ("how many people visit {S} every year?", "how many visitors does {S} receive?"),
            ("how many guests come to {S} each year?",),
        ),
    ),
    Property(
        "ticket price",
        lambda rng: words.digits(rng, rng.choice((1, 2))),
        Wording(
            ("A ticket for {S} costs {v} coins.", "To enter {S} one pays {v} coins."),
            ("{S} asks {v} coins of its guests.",),
        ),
        Wording(
            ("how much is a ticket for {S}?", "what does a ticket for {S} cost?"), ("what must one pay to enter {S}?",)
        ),
    ),
    Property(
        "colour",
        words.colour,
        Wording(("{S} is painted {v}.", "The walls of {S} are {v}."), ("The painters gave {S} a {v} front.",)),
        Wording(("which colour is {S}?", "what colour are the walls of {S}?"), ("in what colour is {S} painted?",)),
    ),
    Property(
        "speciality",
        words.food,
        Wording(("{S} is known for its {v}.", "People come to {S} for the {v}."), ("Guests of {S} praise the {v}.",)),
        Wording(("what is {S} known for?", "why do people come to {S}?"), ("what do guests of {S} praise?",)),
    ),
)
PERSON: tuple[Property, ...] = (
    Property(
        "birthplace",
        words.city,
        Wording(("{S} was born in {v}.", "The birthplace of {S} is {v}."), ("The childhood of {S} began in {v}.",)),
        Wording(("where was {S} born?", "in which town was {S} born?"), ("what is the birthplace of {S}?",)),
    ),
    Property(
        "field of study",
        lambda rng: rng.choice(
            ("law", "physics", "music", "history", "botany", "geology", "medicine", "optics", "logic")
        ),
        Wording(("{S} studied {v}.", "At university {S} chose {v}."), ("{S} has a degree in {v}.",)),
        Wording(("what did {S} study?", "which subject did {S} study?"), ("in which field was {S} educated?",)),
    ),
    Property(
        "number of children",
        lambda rng: str(rng.randint(2, 14)),
        Wording(("{S} has {v} children.", "{S} raised {v} children."), ("The family of {S} includes {v} children.",)),
        Wording(
            ("how many children does {S} have?", "how many children did {S} raise?"),
            ("what number of children does {S} have?",),
        ),
    ),
    Property(
        "book",
        words.book,
        Wording(("{S} wrote {v}.", "The best known book of {S} is {v}."), ("{v} came from the pen of {S}.",)),
        Wording(("what did {S} write?", "which book did {S} write?"), ("of which book is {S} the author?",)),
    ),
    Property(
        "collection",
        lambda rng: f"{rng.choice(words.COLOURS)} {rng.choice(words.GIFTS)}s",
        Wording(("{S} collects {v}.", "{S} has a large collection of {v}."), ("The attic of {S} is full of {v}.",)),
        Wording(("what does {S} collect?", "which things does {S} collect?"), ("what fills the collection of {S}?",)),
    ),
)
PROPERTIES = (*PLACE, *PERSON)
PLACE_NOUNS = (
    "Museum",
    "Library",
    "School",
    "Hospital",
    "Theatre",
    "Bakery",
    "Observatory",
    "Hotel",
    "Castle",
    "Market",
    "Academy",
    "Inn",
    "Gallery",
    "Zoo",
)
_PADDING = (
    "Many stories are told about it in the region.",
    "Little more is known for certain.",
    "The weather there is mild for most of the year.",
    "A small festival is held every spring.",
    "Old letters in the archive mention this more than once.",
    "Nobody remembers why.",
)


def place_name(rng: Random) -> str:
    """'the Velmar Museum'."""
    return f"the {words.pseudo_word(rng)} {rng.choice(PLACE_NOUNS)}"


def write(
    rng: Random,
    wordings: Wordings,
    subject: str,
    properties: tuple[Property, ...],
    typist: Typist,
    given: dict[str, str],
) -> Document:
    """A document that says `properties` of `subject`, in this order. `given`: values already decided, by noun."""
    values = tuple((p, given.get(p.noun) or typist.value(p.value(rng))) for p in properties)
    pronoun = "It" if subject.startswith("the ") else rng.choice(("She", "He"))
    sentences: list[str] = []
    for position, (prop, value) in enumerate(values):
        template = prop.sentences.choose(rng, wordings)
        repeat = position == 0 or not template.startswith("{S}") or rng.random() < 0.5
        sentence = fill(template, {"S": subject if repeat else pronoun, "v": value})
        sentences.append(sentence[0].upper() + sentence[1:] if not typist.lower_case else sentence.lower())
        if rng.random() < 0.2:
            sentences.append(typist.value(rng.choice(_PADDING)))
    title = subject.removeprefix("the ")
    return Document(subject, values, f"{title}\n{' '.join(sentences)}")


def bridges(place: Document, people: list[Document]) -> list[tuple[str, Document]]:
    """Two-document references: a person spoken of through `place` ("the founder of ..."), and the person's document."""
    by_subject = {person.subject: person for person in people}
    return [
        (fill(prop.bridge, {"S": place.subject}), by_subject[value])
        for prop, value in place.values
        if prop.bridge and value in by_subject
    ]


def lay_out(rng: Random, documents: list[Document], question: str, wordings: Wordings) -> str:
    """One message: the documents, numbered where there are several, with the question before or behind or absent."""
    if wordings == "held_out":
        heads = [f"Source {i}. " for i in range(1, len(documents) + 1)]
    else:
        heads = rng.choice(
            (
                [f"[{i}] " for i in range(1, len(documents) + 1)],
                [f"Document {i}: " for i in range(1, len(documents) + 1)],
                ["# " for _ in documents],
                [f"Text {i}\n" for i in range(1, len(documents) + 1)],
            )
        )
    body = "\n\n".join(head + document.text for head, document in zip(heads, documents, strict=True))
    if not question:
        return f"{rng.choice(('Read this:', 'Please read:', 'Here is a text:', 'Remember this text:'))}\n\n{body}"
    if rng.random() < 0.75:
        return f"{body}\n\n{rng.choice(('', '', 'Question: '))}{question}"
    return f"{question}\n\n{body}"
