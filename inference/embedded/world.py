"""Conversations of the embedded model's world: seed in, conversation out.

A person tells facts about themselves and others, changes some, asks for them later, asks for what was never told,
asks for lists, gives documents to read and asks about them, and makes small talk. Each answer is the only right one,
and says what it is and how far back its fact lies, so that an evaluation can make a table.

The assistant names the topic before it says anything about it, both when a fact is told ("Noted. Anna's city: Rome.")
and when it is asked for ("Anna's city: Rome."). So a small model looks facts up by its own words, however they were
told, and has found out what is asked before it has to decide whether it knows. An answer that begins with that decision
("You have not told me ...") is learned far later: after as much training, a third of the questions without an answer
were declined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

from inference.embedded import words
from inference.embedded.documents import (
    PERSON,
    PLACE,
    PROPERTIES,
    Document,
    bridges,
    lay_out,
    place_name,
    write,
)
from inference.embedded.facts import (
    HE,
    KINDS,
    NAME,
    RELATION,
    SHE,
    Kind,
    Pronoun,
    Subject,
    Wording,
    Wordings,
    open_kind,
)
from inference.embedded.phrasing import CORRECTIONS, OPENERS, QUESTION_OPENERS, Typist, fill, say
from inference.embedded.small_talk import exchange
from inference.embedded.template import MESSAGE_TOKENS, SYSTEM_PROMPT

NOT_TOLD = "you have not told me"  # in every answer to a question without an answer
_OTHER_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You remember everything that the user says.",
    "Be friendly and short.",
)
_LISTS = Wording(
    (
        *("what do you know about {O}?", "list everything I told you about {O}.", "what have I told you about {O}?"),
        *("what do you remember about {O}?", "tell me about {O}.", "tell me everything about {O}."),
        *("what did I tell you about {O}?", "do you remember anything about {O}?", "what did I say about {O}?"),
    ),
    ("give me all facts about {O}.", "sum up what I said about {O}."),
)
_WHO = Wording(
    (
        *("who have I told you about?", "list all people I told you about.", "which people do you know?"),
        *("who do you know?", "who did I mention?", "which people did I tell you about?"),
    ),
    ("name everyone I mentioned.",),
)
_JOINS = (" and ", ", and ", ". ", "; ")
_LONGEST_LIST = 5  # facts; a longer list is not asked for
_FEW = 0.65  # of those who speak of few kinds of facts
_OPEN = 0.12  # share of facts with a noun of the visitor's own
_PRONOUNS = 0.4  # how often somebody just spoken of is "she" or "he"
_ATTEMPTS = 12  # turns that did not fit or could not be made, before a conversation is over


class AnswerKind(StrEnum):
    """What an answer is."""

    SMALL_TALK = "small talk"
    ACKNOWLEDGEMENT = "acknowledgement"
    RECALL = "recall"
    UPDATED = "updated"  # recall of a fact that was changed at least once
    NOT_TOLD = "not told"
    LIST = "list"
    ONE_DOCUMENT = "one document"
    TWO_DOCUMENTS = "two documents"


@dataclass(frozen=True)
class Turn:
    """A message, the only right answer, and what that answer is."""

    user: str
    answer: str
    kind: AnswerKind
    # Tokens from the beginning of the message that mentioned the fact last, be it a statement, an
    # acknowledgement or an earlier answer, to the answer's first token. None where no single fact is recalled.
    distance: int | None = None


@dataclass(frozen=True)
class Conversation:
    """A system prompt and turns that fit a window together."""

    system: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class _Told:
    """A fact as it stands now."""

    kind: Kind
    value: str
    updates: int
    at: int  # first token of the message that mentioned it last


_Key = tuple[Subject, str]  # whom, and the noun of the kind
_NOUNS = {kind.noun for kind in KINDS}


@dataclass(frozen=True)
class _Draft:
    """A turn that may be taken, and what it changes in the memory if it is."""

    user: str
    answer: str
    kind: AnswerKind
    recalled: int | None = None  # the `_Told.at` or document position that the answer goes back to
    told: tuple[tuple[_Key, _Told], ...] = ()  # `at` is filled in when the turn is taken
    mentioned: tuple[_Key, ...] = ()
    documents: tuple[Document, ...] = ()
    about: Subject | None = None  # the one whom the turn is about, and whom the next may call "she"


def converse(rng: Random, window: int, count: Callable[[str], int], wordings: Wordings = "training") -> Conversation:
    """A conversation of at most `window` tokens, and nearly as many. `count` gives the tokens of a message's text."""
    return _Person(rng, window, count, wordings).converse()


class _Person:
    """The one who speaks: what they have told so far, and what they may say next."""

    def __init__(self, rng: Random, window: int, count: Callable[[str], int], wordings: Wordings) -> None:
        self._rng = rng
        self._window = window
        self._count = count
        self._wordings: Wordings = wordings
        self._typist = Typist.meet(rng)
        self._system = SYSTEM_PROMPT if rng.random() < 0.85 else rng.choice(_OTHER_SYSTEM_PROMPTS)
        self._at = MESSAGE_TOKENS + count(self._system)  # tokens so far
        self._facts: dict[_Key, _Told] = {}
        self._documents: list[tuple[Document, int]] = []  # with the first token of the message
        self._turns: list[Turn] = []
        people = rng.randint(1, 3 + window // 256)
        self._subjects = [Subject("me"), *(self._stranger() for _ in range(people))]
        # Many speak of few things: then the same is told of several people, and only both together, whom and what, tell
        # one fact from another. Where every kind is as likely, the kind alone nearly does, and that is what is learned.
        few = rng.random() < _FEW
        self._kinds = rng.sample(KINDS, rng.randint(2, 7)) if few else list(KINDS)
        self._pronouns: dict[Subject, Pronoun] = {}
        self._about: Subject | None = None  # the last turn's
        # Some tell much at first and ask later, so that facts lie far back; others mix.
        self._early_bird = rng.random() < 0.6
        self._eagerness = rng.uniform(0.25, 0.5)  # share of turns that tell, for those who mix
        self._reader = rng.random() < 0.6  # brings documents

    def converse(self) -> Conversation:
        failures = 0
        while failures < _ATTEMPTS:
            draft = self._next()
            if draft is None or not self._take(draft):
                failures += 1
        return Conversation(self._system, tuple(self._turns))

    def _next(self) -> _Draft | None:
        progress = self._at / self._window
        telling = (0.9 if progress < 0.3 else 0.08) if self._early_bird else self._eagerness
        if self._rng.random() < telling or not (self._facts or self._documents):
            changes = self._facts and self._rng.random() < 0.22
            return self._change_fact() if changes else self._tell_facts()
        draw = self._rng.random()
        if draw < 0.14:
            return self._small_talk()
        if draw < 0.18:
            return self._ask_list()
        if draw < 0.20:
            return self._ask_who()
        if draw < 0.40:
            return self._ask_not_told()
        if self._reader and draw < 0.50:
            return self._read()
        if self._documents and draw < 0.62:
            return self._ask_document()
        return self._ask_fact()

    def _take(self, draft: _Draft) -> bool:
        """Say it, if it fits."""
        answer_message_at = self._at + MESSAGE_TOKENS + self._count(draft.user)
        end = answer_message_at + MESSAGE_TOKENS + self._count(draft.answer)
        if end > self._window:
            return False
        distance = None if draft.recalled is None else answer_message_at + 1 - draft.recalled
        self._turns.append(Turn(draft.user, draft.answer, draft.kind, distance))
        for key, told in draft.told:
            self._facts[key] = replace(told, at=answer_message_at)
        for key in draft.mentioned:
            self._facts[key] = replace(self._facts[key], at=answer_message_at)
        self._documents += [(document, self._at) for document in draft.documents]
        self._at = end
        self._about = draft.about
        return True

    # --- telling ---

    def _stranger(self) -> Subject:
        """Somebody not spoken of so far."""
        rng = self._rng
        known = {s.text for s in getattr(self, "_subjects", ())} | {t.value for t in self._facts.values()}
        while True:
            if rng.random() < 0.4:
                subject = Subject("relation", rng.choice(words.RELATIONS))
            elif self._typist.lower_case:  # only well-known names: the others are spelt otherwise after a space
                subject = Subject("name", rng.choice(words.FIRST_NAMES).lower())
            else:
                subject = Subject("name", words.first_name(rng))
            if subject.text not in known:
                return subject

    def _tell_facts(self) -> _Draft | None:
        """One fact, or several about one or more subjects, in one message."""
        rng = self._rng
        facts: dict[_Key, _Told] = {}
        sentences: list[str] = []
        about = self._about
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            subject = about if about and rng.random() < 0.3 else rng.choice(self._subjects)
            kind = self._any_kind()
            key = (subject, kind.noun)
            if subject.form not in kind.forms or key in self._facts or key in facts:
                continue
            value = self._value(kind)
            if value is None:
                continue
            slots = {**self._spoken_of(subject, about), "v": value}
            named = slots["S"] == subject.text
            about = subject
            relation_key = (subject, RELATION.noun)
            told_relation = relation_key in self._facts or relation_key in facts or kind is RELATION
            if named and subject.form == "name" and not told_relation and rng.random() < 0.3:
                relation = self._value(RELATION)
                if relation is not None:  # "My sister Anna lives in Rome"
                    facts[relation_key] = _Told(RELATION, relation, 0, 0)
                    slots |= Subject("name", f"my {relation} {subject.text}").in_words_of_user()
            facts[key] = _Told(kind, value, 0, 0)
            sentences.append(self._statement(kind, slots, first=not sentences))
        if not facts:
            return None
        user = rng.choice(_JOINS).join(sentences) + self._full_stop()
        answer = f"Noted. {_upper('; '.join(_said(s, t) for (s, _), t in facts.items()))}."
        only = about if about and all(subject == about for subject, _ in facts) else None
        return _Draft(user, answer, AnswerKind.ACKNOWLEDGEMENT, told=tuple(facts.items()), about=only)

    def _any_kind(self) -> Kind:
        if self._rng.random() >= _OPEN:
            return self._rng.choice(self._kinds)
        noun = words.any_noun(self._rng)
        return open_kind(noun) if noun not in _NOUNS else self._any_kind()

    def _spoken_of(self, subject: Subject, about: Subject | None) -> dict[str, str]:
        """The user's slots for `subject`: a pronoun now and then, if they are whom it was about just before."""
        rng = self._rng
        if subject.form == "me" or subject != about or rng.random() >= _PRONOUNS:
            return subject.in_words_of_user()
        if subject not in self._pronouns:
            hers, his = subject.text in words.HERS, subject.text in words.HIS
            self._pronouns[subject] = SHE if hers else HE if his else rng.choice((SHE, HE))
        return Subject.as_pronoun(self._pronouns[subject])

    def _change_fact(self) -> _Draft | None:
        """A new value of a fact told before, mostly said to be a change."""
        rng = self._rng
        subject, noun = key = self._some_fact()
        old = self._facts[key]
        value = self._value(old.kind)
        if value is None or value == old.value:
            return None
        slots = {**self._spoken_of(subject, self._about), "v": value}
        if rng.random() < 0.25:
            template = rng.choice((f"{{P}} {noun} is now {{v}}", f"{{P}} {noun} has changed to {{v}}"))
            user = say(template, slots, self._typist, rng)
        elif rng.random() < 0.75:
            opener = CORRECTIONS.choose(rng, self._wordings)
            user = say(old.kind.statements.choose(rng, self._wordings), slots, self._typist, rng, opener)
        else:
            user = self._statement(old.kind, slots, first=True)
        told = _Told(old.kind, value, old.updates + 1, 0)
        answer = f"Updated. {_upper(_said(subject, told))}."
        return _Draft(user + self._full_stop(), answer, AnswerKind.ACKNOWLEDGEMENT, told=((key, told),), about=subject)

    def _value(self, kind: Kind) -> str | None:
        """A value of `kind`. None: a name or relation that already stands for somebody."""
        value = self._typist.value(kind.value(self._rng))
        taken = kind in (NAME, RELATION) and (
            any(s.text == value for s in self._subjects) or any(t.value == value for t in self._facts.values())
        )
        return None if taken else value

    def _statement(self, kind: Kind, slots: dict[str, str], *, first: bool) -> str:
        opener = OPENERS.choose(self._rng, self._wordings) if first and self._rng.random() < 0.3 else ""
        return say(kind.statements.choose(self._rng, self._wordings), slots, self._typist, self._rng, opener)

    def _full_stop(self) -> str:
        return "" if self._rng.random() < self._typist.bare else self._rng.choice((".", ".", ".", "!"))

    # --- asking ---

    def _some_fact(self) -> _Key:
        """A fact at a distance drawn evenly from all of the conversation so far; changed ones more often.

        Being asked for brings a fact near, so the far ones are preferred where many were told early.
        """
        rng = self._rng
        changed = [key for key, told in self._facts.items() if told.updates]
        keys = changed if changed and rng.random() < 0.25 else list(self._facts)
        wanted = 0.0 if self._early_bird and rng.random() < 0.75 else rng.uniform(0, self._at)
        return min(keys, key=lambda key: abs(self._facts[key].at - wanted))

    def _question(self, wording: Wording, slots: dict[str, str]) -> str:
        opener = QUESTION_OPENERS.choose(self._rng, self._wordings) if self._rng.random() < 0.15 else ""
        return say(wording.choose(self._rng, self._wordings), slots, self._typist, self._rng, opener)

    def _ask_fact(self) -> _Draft | None:
        if not self._facts:
            return None
        subject, _ = key = self._some_fact()
        told = self._facts[key]
        user = self._question(told.kind.questions, self._spoken_of(subject, self._about))
        answer = f"{_upper(_said(subject, told))}."
        kind = AnswerKind.UPDATED if told.updates else AnswerKind.RECALL
        return _Draft(user, answer, kind, recalled=told.at, mentioned=(key,), about=subject)

    def _ask_not_told(self) -> _Draft | None:
        """Mostly a kind of fact that was told of others, about somebody known: the hardest to deny."""
        rng = self._rng
        if self._documents and rng.random() < 0.25:
            document, _ = rng.choice(self._documents)
            told = {prop.noun for prop, _ in document.values}
            candidates = PLACE if document.values[0][0] in PLACE else PERSON
            prop = rng.choice(candidates)
            if prop.noun in told:
                return None
            user = self._question(prop.questions, {"S": document.subject})
            topic = fill(prop.topic, {"S": document.subject})
            return _Draft(user, f"{_upper(topic)}: {NOT_TOLD}.", AnswerKind.NOT_TOLD)
        subject = rng.choice(self._subjects) if rng.random() < 0.75 else self._stranger()
        kinds = [told.kind for told in self._facts.values()] if rng.random() < 0.7 else list(KINDS)
        kind = rng.choice(kinds) if kinds and rng.random() > _OPEN else self._any_kind()
        if subject.form not in kind.forms or (subject, kind.noun) in self._facts:
            return None
        user = self._question(kind.questions, self._spoken_of(subject, self._about))
        answer = f"{_upper(fill(kind.topic, subject.in_words_of_assistant()))}: {NOT_TOLD}."
        return _Draft(user, answer, AnswerKind.NOT_TOLD, about=subject)

    def _ask_list(self) -> _Draft | None:
        subject = self._rng.choice(self._subjects) if self._rng.random() < 0.9 else self._stranger()
        keys = [key for key in self._facts if key[0] == subject]
        if len(keys) > _LONGEST_LIST:
            return None
        user = self._question(_LISTS, subject.in_words_of_user())
        if not keys:
            whom = subject.in_words_of_assistant()["O"]
            return _Draft(user, f"{_upper(whom)}: {NOT_TOLD} anything.", AnswerKind.NOT_TOLD)
        clauses = "; ".join(_said(subject, self._facts[key]) for key in keys)
        return _Draft(user, f"You told me this. {_upper(clauses)}.", AnswerKind.LIST, mentioned=tuple(keys))

    def _ask_who(self) -> _Draft | None:
        people = list(dict.fromkeys(s.in_words_of_assistant()["S"] for s, _ in self._facts if s.form != "me"))
        user = self._question(_WHO, {})
        if not people:
            return _Draft(user, f"People: {NOT_TOLD} about anybody.", AnswerKind.NOT_TOLD)
        if len(people) > _LONGEST_LIST:
            return None
        return _Draft(user, f"You told me about {', '.join(people)}.", AnswerKind.LIST)

    def _small_talk(self) -> _Draft:
        user, answer = exchange(self._rng, self._wordings)
        typist = self._typist
        return _Draft(typist.contracted(typist.value(user), self._rng), answer, AnswerKind.SMALL_TALK)

    # --- documents ---

    def _read(self) -> _Draft | None:
        """A message with one document or several, mostly with a question."""
        rng = self._rng
        documents = self._write_documents()
        if rng.random() < 0.15:
            answer = "Thank you, I have read it." if len(documents) == 1 else "Thank you, I have read them."
            text = lay_out(rng, documents, "", self._wordings)
            return _Draft(text, answer, AnswerKind.ACKNOWLEDGEMENT, documents=tuple(documents))
        question, answer, kind, _ = self._document_question(documents)
        text = lay_out(rng, documents, question, self._wordings)
        return _Draft(text, answer, kind, recalled=self._at, documents=tuple(documents))

    def _ask_document(self) -> _Draft:
        """A question about documents given earlier."""
        question, answer, kind, needed = self._document_question([document for document, _ in self._documents])
        read_at = min(at for document, at in self._documents if document in needed)
        return _Draft(question, answer, kind, recalled=read_at)

    def _write_documents(self) -> list[Document]:
        rng, typist = self._rng, self._typist
        several = self._window - self._at > 200 and rng.random() < 0.75
        place = self._place(bridged=several and rng.random() < 0.85)
        if not several:
            return [place if rng.random() < 0.6 else self._biography(typist.value(words.full_name(rng)))]
        people = [v for prop, v in place.values if prop.bridge]
        documents = [place, *(self._biography(name) for name in people)]
        for _ in range(rng.randint(0 if people else 1, 2)):
            other = self._place() if rng.random() < 0.5 else self._biography(typist.value(words.full_name(rng)))
            documents.append(other)
        rng.shuffle(documents)
        return documents

    def _place(self, *, bridged: bool = False) -> Document:
        """bridged: it names at least one person, who can have a document too."""
        properties = tuple(self._rng.sample(PLACE, self._rng.randint(2, 4)))
        if bridged and not any(prop.bridge for prop in properties):
            person = self._rng.choice([prop for prop in PLACE if prop.bridge])
            properties = tuple(self._rng.sample((person, *properties), len(properties) + 1))
        return write(self._rng, self._wordings, self._typist.value(place_name(self._rng)), properties, self._typist, {})

    def _biography(self, name: str) -> Document:
        properties = tuple(self._rng.sample(PERSON, self._rng.randint(1, 3)))
        return write(self._rng, self._wordings, name, properties, self._typist, {})

    def _document_question(self, documents: list[Document]) -> tuple[str, str, AnswerKind, tuple[Document, ...]]:
        """A question that needs one or two of `documents`, its answer, and the documents it needs."""
        rng = self._rng
        references = [(place, *bridge) for place in documents for bridge in bridges(place, documents)]
        needed: tuple[Document, ...]
        if references and rng.random() < 0.65:
            place, spoken_of_as, document = rng.choice(references)
            kind, needed = AnswerKind.TWO_DOCUMENTS, (place, document)
        else:
            document = rng.choice(documents)
            spoken_of_as = document.subject
            kind, needed = AnswerKind.ONE_DOCUMENT, (document,)
        prop, value = rng.choice(document.values)
        question = self._question(prop.questions, {"S": spoken_of_as})
        said = f"{fill(prop.topic, {'S': document.subject})}: {value}."
        if kind is AnswerKind.TWO_DOCUMENTS:  # one step after the other
            said = f"{spoken_of_as}: {document.subject}; {said}"
        return question, _upper(said), kind, needed


def _said(subject: Subject, told: _Told) -> str:
    """'Anna's city: Rome'."""
    return f"{fill(told.kind.topic, subject.in_words_of_assistant())}: {told.value}"


def _upper(text: str) -> str:
    """The same as a sentence. Names stay as they were typed."""
    return text[0].upper() + text[1:] if text.startswith(("your ", "the ")) else text


def wording_of_the_world() -> tuple[Wording, ...]:
    """Every wording of facts and documents, for checks that held-out ones stay out of training."""
    kinds = [w for kind in KINDS for w in (kind.statements, kind.questions)]
    properties = [w for prop in PROPERTIES for w in (prop.sentences, prop.questions)]
    return (*kinds, *properties, _LISTS, _WHO, OPENERS, QUESTION_OPENERS, CORRECTIONS)
