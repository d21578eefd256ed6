"""The kinds of facts a person tells, and all the ways of telling and asking for them.

Templates hold slots that agree with the subject: "{P} city", "{S} live{s} in {v}". A person's own "my city" and the
assistant's "your city" come from the same template with different slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from inference.embedded import words

Wordings = Literal["training", "held_out"]
Form = Literal["me", "relation", "name"]
Pronoun = tuple[str, str, str]  # subject, object, possessive

HE: Pronoun = ("he", "him", "his")
SHE: Pronoun = ("she", "her", "her")


@dataclass(frozen=True)
class Wording:
    """Templates of one thing to say. `held_out` ones are never used in training, only in evaluation."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]

    def choose(self, rng: Random, wordings: Wordings) -> str:
        """One template."""
        return rng.choice(self.training if wordings == "training" else self.held_out)


@dataclass(frozen=True)
class Subject:
    """Whom a fact is about: the person who speaks, a relation of theirs ("sister"), or somebody by name."""

    form: Form
    text: str = ""

    def in_words_of_user(self) -> dict[str, str]:
        """Slots of a template that the user says."""
        if self.form == "me":
            return {"S": "I", "O": "me", "P": "my", "R": "my", "is": "am", **_PLURAL_VERBS}
        name = f"my {self.text}" if self.form == "relation" else self.text
        return _third_person(name)

    @staticmethod
    def as_pronoun(pronoun: Pronoun) -> dict[str, str]:
        """Slots of a template that the user says about somebody just spoken of."""
        subject, object_, possessive = pronoun
        return {"S": subject, "O": object_, "P": possessive, "R": possessive, "is": "is", **_SINGULAR_VERBS}

    def in_words_of_assistant(self) -> dict[str, str]:
        """Slots of a template that the assistant says."""
        if self.form == "me":
            return {"S": "you", "O": "you", "P": "your", "R": "your", "is": "are", **_PLURAL_VERBS}
        name = f"your {self.text}" if self.form == "relation" else self.text
        return _third_person(name)


_PLURAL_VERBS = {"s": "", "es": "", "ies": "y", "have": "have", "do": "do"}
_SINGULAR_VERBS = {"s": "s", "es": "es", "ies": "ies", "have": "has", "do": "does"}


def _third_person(name: str) -> dict[str, str]:
    return {"S": name, "O": name, "P": f"{name}'s", "R": "their", "is": "is", **_SINGULAR_VERBS}


@dataclass(frozen=True)
class Kind:
    """One kind of fact."""

    noun: str  # "favourite colour", as in "my favourite colour"
    value: Callable[[Random], str]
    statements: Wording
    questions: Wording
    forms: tuple[Form, ...]
    topic: str  # what the assistant calls it: "{P} favourite colour"


def _kind(
    noun: str,
    value: Callable[[Random], str],
    say: tuple[str, ...],
    say_held_out: str,
    ask: tuple[str, ...],
    ask_held_out: str,
    forms: tuple[Form, ...] = ("me", "relation", "name"),
    topic: str = "",
) -> Kind:
    """A kind with its own wordings and those that any noun allows."""
    return Kind(
        noun=noun,
        value=value,
        statements=Wording(
            (*say, *say, f"{{P}} {noun} is {{v}}", f"{{P}} {noun}: {{v}}"),
            (say_held_out, f"{{P}} {noun} would be {{v}}"),
        ),
        questions=Wording(
            (
                *ask,
                *ask,
                f"what is {{P}} {noun}?",
                f"what's {{P}} {noun}?",
                f"tell me {{P}} {noun}.",
                f"do you remember {{P}} {noun}?",
                f"{{P}} {noun}?",
                f"and {{P}} {noun}?",
                f"can you tell me {{P}} {noun}?",
                f"do you know what {{P}} {noun} is?",
                f"what did I say {{P}} {noun} is?",
                f"remind me of {{P}} {noun}.",
                f"I forgot {{P}} {noun}. What is it?",
            ),
            (
                ask_held_out,
                f"could you remind me what {{P}} {noun} is?",
                f"please look up {{P}} {noun}.",
                f"I need to know {{P}} {noun} again.",
            ),
        ),
        forms=forms,
        topic=topic or f"{{P}} {noun}",
    )


NAME = _kind(
    "name",
    words.first_name,
    ("{P} name is {v}", "{S} {is} called {v}", "call {O} {v}", "{S} go{es} by {v}"),
    "{P} given name is {v}",
    ("what {is} {S} called?", "who {is} {S}?", "what {do} people call {O}?", "how {is} {S} called?"),
    "do you still know {P} name?",
    ("me", "relation"),
)
RELATION = _kind(
    "relation to me",
    lambda rng: rng.choice(words.RELATIONS),
    ("{S} is my {v}",),
    "you should know that {S} is my {v}",
    ("who is {S}?", "who's {S} again?"),
    "how do I know {S}?",
    ("name",),
    "{P} relation to you",
)

KINDS: tuple[Kind, ...] = (
    NAME,
    RELATION,
    _kind(
        "city",
        words.city,
        (
            "{S} live{s} in {v}",
            "{S} moved to {v}",
            "{P} home is in {v}",
            "{S} {is} from {v}",
            "{S} come{s} from {v}",
            "{S} {is} living in {v}",
            "{P} hometown is {v}",
        ),
        "{S} settled down in {v}",
        (
            "where {do} {S} live?",
            "which city {do} {S} live in?",
            "where {is} {S} from?",
            "where {is} {S} living?",
            "where {do} {S} come from?",
            "what city {do} {S} live in?",
        ),
        "in which place is {P} home?",
    ),
    _kind(
        "job",
        words.job,
        (
            "{S} work{s} as {v}",
            "{S} {is} {v}",
            "for a living {S} work{s} as {v}",
            "{S} {is} working as {v}",
            "{S} {is} {v} by profession",
            "{P} profession is {v}",
        ),
        "{S} earn{s} money as {v}",
        (
            "what {do} {S} do for a living?",
            "what {do} {S} work as?",
            "what {do} {S} do?",
            "what {is} {P} profession?",
            "what work {do} {S} do?",
            "what {is} {P} work?",
        ),
        "what kind of work {do} {S} do?",
    ),
    _kind(
        "age",
        words.age,
        (
            "{S} {is} {v} years old",
            "{S} just turned {v}",
            "{S} {is} {v}",
            "{S} turned {v} last week",
            "{S} {is} now {v}",
            "{S} {is} {v} years of age",
        ),
        "{S} celebrated {v} years",
        ("how old {is} {S}?", "how old {is} {S} now?", "how many years {is} {S}?"),
        "how many years old {is} {S}?",
    ),
    _kind(
        "birthday",
        words.day_of_year,
        (
            "{P} birthday is on {v}",
            "{S} {have} a birthday on {v}",
            "{S} turn{s} a year older on {v}",
            "{S} was born on {v}",
            "{S} celebrate{s} {R} birthday on {v}",
        ),
        "the birthday of {O} falls on {v}",
        (
            "when is {P} birthday?",
            "on which day is {P} birthday?",
            "when was {S} born?",
            "on which day was {S} born?",
            "when do we celebrate {P} birthday?",
        ),
        "which day should I mark for {R} birthday?",
    ),
    _kind(
        "favourite colour",
        words.colour,
        (
            "{S} like{s} the colour {v} best",
            "the colour {S} love{s} most is {v}",
            "{S} like{s} {v}",
            "{S} love{s} the colour {v}",
            "{P} colour is {v}",
        ),
        "{P} colour of choice is {v}",
        (
            "which colour {do} {S} like best?",
            "what colour {do} {S} like?",
            "which colour {do} {S} love?",
            "what is {P} colour?",
        ),
        "what colour {do} {S} prefer?",
    ),
    _kind(
        "favourite food",
        words.food,
        (
            "{S} love{s} to eat {v}",
            "the food {S} like{s} best is {v}",
            "{S} like{s} {v}",
            "{S} love{s} {v}",
            "{S} like{s} to eat {v}",
            "{S} always eat{s} {v}",
        ),
        "nothing tastes better to {O} than {v}",
        (
            "what {do} {S} like to eat?",
            "which food {do} {S} like best?",
            "what food {do} {S} like?",
            "what {do} {S} love to eat?",
            "what {do} {S} eat?",
        ),
        "what food should I cook for {O}?",
    ),
    _kind(
        "favourite drink",
        words.drink,
        (
            "{S} love{s} to drink {v}",
            "the drink {S} like{s} best is {v}",
            "{S} like{s} {v}",
            "{S} drink{s} {v} every day",
            "{S} like{s} to drink {v}",
        ),
        "to drink {S} always choose{s} {v}",
        (
            "what {do} {S} like to drink?",
            "which drink {do} {S} like best?",
            "what {do} {S} drink?",
            "what drink {do} {S} like?",
        ),
        "what drink should I pour for {O}?",
    ),
    _kind(
        "pet",
        words.pet,
        (
            "{S} {have} {v}",
            "{S} own{s} {v}",
            "at home {S} {have} {v}",
            "{S} got {v}",
            "{S} {have} a pet: {v}",
            "{P} pet is {v}",
        ),
        "{S} look{s} after {v}",
        (
            "which pet {do} {S} have?",
            "what pet {do} {S} own?",
            "{do} {S} have a pet?",
            "{do} {S} have any pets?",
            "what pet {do} {S} have?",
            "what animal {do} {S} have?",
        ),
        "what animal {do} {S} keep as a pet?",
    ),
    _kind(
        "lucky number",
        lambda rng: words.digits(rng, rng.choice((1, 2, 3))),
        ("the number that brings {O} luck is {v}", "{S} believe{s} in the lucky number {v}"),
        "{v} is the lucky number of {O}",
        ("which number is lucky for {O}?",),
        "which number brings luck to {O}?",
    ),
    _kind(
        "phone number",
        words.phone,
        (
            "you can call {O} at {v}",
            "{P} number is {v}",
            "{S} can be reached at {v}",
            "{P} phone is {v}",
            "{P} telephone number is {v}",
        ),
        "to reach {O} by phone dial {v}",
        (
            "which number do I dial to call {O}?",
            "at which phone number can one call {O}?",
            "what is {P} number?",
            "how can I call {O}?",
            "under which number is {S} reached?",
        ),
        "how do I reach {O} by phone?",
    ),
    _kind(
        "hobby",
        lambda rng: rng.choice(words.HOBBIES),
        (
            "{S} enjoy{s} {v} on weekends",
            "the thing {S} enjoy{s} most is {v}",
            "{S} like{s} {v}",
            "{S} love{s} {v}",
            "{S} go{es} {v} every weekend",
        ),
        "{S} spend{s} every free hour with {v}",
        (
            "what {do} {S} do for fun?",
            "what {do} {S} enjoy on weekends?",
            "what are {P} hobbies?",
            "what {do} {S} do in {R} free time?",
            "what {do} {S} enjoy?",
        ),
        "which hobby {do} {S} have?",
    ),
    _kind(
        "instrument",
        lambda rng: rng.choice(words.INSTRUMENTS),
        ("{S} play{s} the {v}", "{S} {is} learning the {v}", "{S} can play the {v}", "{P} instrument is the {v}"),
        "{S} practise{s} the {v}",
        (
            "which instrument {do} {S} play?",
            "what {do} {S} play?",
            "what instrument {do} {S} play?",
            "{do} {S} play an instrument?",
            "{do} {S} play any instrument?",
        ),
        "what instrument {do} {S} practise?",
    ),
    _kind(
        "car",
        words.car,
        ("{S} drive{s} {v}", "{S} bought {v}", "{P} car is {v}", "{S} {have} a car, {v}"),
        "on the road {S} use{s} {v}",
        (
            "what {do} {S} drive?",
            "which car {do} {S} drive?",
            "what car {do} {S} drive?",
            "which car {do} {S} have?",
            "{do} {S} have a car?",
        ),
        "what kind of car {do} {S} own?",
    ),
    _kind(
        "shoe size",
        lambda rng: str(rng.randint(20, 49)),
        (
            "{S} wear{s} shoes in size {v}",
            "{S} take{s} size {v} in shoes",
            "{S} {have} shoe size {v}",
            "{P} shoes are size {v}",
        ),
        "shoes for {O} must be size {v}",
        (
            "which shoe size {do} {S} wear?",
            "what size are {P} shoes?",
            "what size {do} {S} wear?",
            "what shoe size {do} {S} have?",
        ),
        "in what size should I buy shoes for {O}?",
    ),
    _kind(
        "language",
        lambda rng: rng.choice(words.LANGUAGES),
        (
            "{S} speak{s} {v}",
            "{S} grew up with {v}",
            "the language {S} speak{s} is {v}",
            "{S} can speak {v}",
            "{P} mother tongue is {v}",
            "{S} {is} learning {v}",
        ),
        "{S} talk{s} in {v}",
        (
            "which language {do} {S} speak?",
            "what language {do} {S} speak?",
            "what languages {do} {S} speak?",
            "which languages {do} {S} know?",
        ),
        "in what language {do} {S} talk?",
    ),
    _kind(
        "allergy",
        lambda rng: rng.choice(words.ALLERGENS),
        (
            "{S} {is} allergic to {v}",
            "{S} cannot stand {v} because of an allergy",
            "{S} {have} an allergy to {v}",
            "{S} must avoid {v} because of an allergy",
            "{P} allergy is {v}",
        ),
        "{S} react{s} badly to {v}",
        (
            "what {is} {S} allergic to?",
            "{do} {S} have any allergies?",
            "{do} {S} have an allergy?",
            "what are {P} allergies?",
        ),
        "which allergy {do} {S} have?",
    ),
    _kind(
        "employer",
        words.company,
        (
            "{S} work{s} for {v}",
            "{S} {is} employed at {v}",
            "{S} got a position at {v}",
            "{S} work{s} at {v}",
            "{P} company is {v}",
        ),
        "{v} employs {O}",
        (
            "who {do} {S} work for?",
            "which company {do} {S} work for?",
            "where {do} {S} work?",
            "what company {do} {S} work for?",
        ),
        "which firm pays {O}?",
    ),
    _kind(
        "address",
        words.address,
        ("letters reach {O} at {v}", "{P} house is at {v}", "{S} live{s} at {v}", "{P} home address is {v}"),
        "send parcels for {O} to {v}",
        (
            "at which address {do} {S} live?",
            "where is {P} house?",
            "what is {P} home address?",
            "what address {do} {S} live at?",
        ),
        "to what address do I send parcels for {O}?",
    ),
    _kind(
        "room number",
        lambda rng: words.digits(rng, 3),
        ("{S} {is} staying in room {v}", "{P} room is number {v}", "{S} {is} in room {v}", "{S} {have} room {v}"),
        "one finds {O} in room {v}",
        (
            "which room {is} {S} in?",
            "in which room {is} {S} staying?",
            "what room {is} {S} in?",
            "which room {do} {S} have?",
        ),
        "what room should I knock at for {S}?",
    ),
    _kind(
        "door code",
        lambda rng: words.digits(rng, rng.choice((4, 5))),
        (
            "the code for {P} door is {v}",
            "{P} door opens with {v}",
            "the code of {P} door is {v}",
            "{P} door code is {v} now",
        ),
        "to open {P} door type {v}",
        (
            "which code opens {P} door?",
            "what is the code for {P} door?",
            "how do I open {P} door?",
            "what code opens {P} door?",
        ),
        "what should I type to open {P} door?",
    ),
    _kind(
        "favourite book",
        words.book,
        (
            "the book {S} love{s} most is {v}",
            "{S} could read {v} again and again",
            "{S} love{s} {v}",
            "{S} like{s} the book {v}",
        ),
        "of all books {S} prefer{s} {v}",
        ("which book {do} {S} love most?", "what book {do} {S} love?", "which book {do} {S} like?"),
        "what book {do} {S} read again and again?",
    ),
    _kind(
        "favourite sport",
        lambda rng: rng.choice(words.SPORTS),
        (
            "the sport {S} like{s} best is {v}",
            "of all sports {S} love{s} {v}",
            "{S} like{s} {v}",
            "{S} play{s} {v}",
            "{P} sport is {v}",
        ),
        "{S} {is} a fan of {v}",
        ("which sport {do} {S} like best?", "what sport {do} {S} like?", "what sport {do} {S} play?"),
        "what sport {is} {S} a fan of?",
    ),
    _kind(
        "appointment",
        words.day_and_hour,
        (
            "{S} {have} an appointment on {v}",
            "{P} appointment is on {v}",
            "{P} next appointment is on {v}",
            "{S} {have} to go to an appointment on {v}",
        ),
        "{S} must be there on {v} for the appointment",
        (
            "when is {P} appointment?",
            "when {do} {S} have an appointment?",
            "what time is {P} appointment?",
            "when is {P} next appointment?",
        ),
        "at what time should {S} be at the appointment?",
    ),
    _kind(
        "travel destination",
        words.city,
        (
            "{S} {is} travelling to {v}",
            "{S} {is} going on a trip to {v}",
            "{P} next trip goes to {v}",
            "{S} {is} flying to {v}",
            "{S} {is} going to {v}",
            "{S} will travel to {v}",
            "{S} {is} going on holiday to {v}",
        ),
        "{S} booked a journey to {v}",
        (
            "where {is} {S} travelling to?",
            "where does {P} next trip go?",
            "where {is} {S} going?",
            "where {is} {S} flying to?",
            "where {is} {S} going on holiday?",
        ),
        "what {is} {S} packing for, which destination?",
    ),
    _kind(
        "favourite animal",
        lambda rng: rng.choice(words.WILD_ANIMALS),
        (
            "the animal {S} like{s} best is the {v}",
            "{S} love{s} the {v} more than any other animal",
            "{S} like{s} the {v} best",
            "{P} animal is the {v}",
        ),
        "of all animals {S} admire{s} the {v}",
        ("which animal {do} {S} like best?", "what animal {do} {S} like?", "which animal {do} {S} love?"),
        "what animal {do} {S} admire?",
    ),
    _kind(
        "flight",
        words.flight,
        ("{S} {is} taking flight {v}", "{S} fl{ies} on {v}", "{P} ticket is for flight {v}"),
        "{S} booked a seat on flight {v}",
        ("which flight {is} {S} taking?", "what is the number of {P} flight?"),
        "on what flight {do} {S} have a seat?",
    ),
    _kind(
        "wish",
        words.gift,
        (
            "{S} want{s} {v}",
            "what {S} want{s} is {v}",
            "{S} wish{es} for {v}",
            "{S} would like {v}",
            "{S} would love to have {v}",
            "{S} want{s} {v} for {R} birthday",
        ),
        "one could give {O} {v}, that is the wish",
        (
            "what {do} {S} want?",
            "what {do} {S} wish for?",
            "what would {S} like?",
            "what {do} {S} want for {R} birthday?",
        ),
        "what present {do} {S} hope for?",
    ),
)


def open_kind(noun: str) -> Kind:
    """A kind with a noun of the visitor's own: "my wifi password is 4455". Any value can be one of it."""
    return _kind(
        noun,
        words.any_value,
        (f"{{P}} {noun} is {{v}}", f"{{P}} {noun} is called {{v}}"),
        f"the {noun} of {{O}} is {{v}}",
        (f"what is the {noun} of {{O}}?",),
        f"which {noun} {{do}} {{S}} have?",
    )
