from __future__ import annotations

import re
import string
from collections import Counter
from random import Random

import pytest

from inference.embedded import small_talk, words
from inference.embedded.facts import Wordings
from inference.embedded.windows import Encoder, fresh_conversation
from inference.embedded.world import NOT_TOLD, AnswerKind, Conversation, converse, wording_of_the_world

WORDINGS: tuple[Wordings, ...] = ("training", "held_out")
SEEDS = range(40)


def conversations(encoder: Encoder, wordings: Wordings = "training", window: int = 2048) -> list[Conversation]:
    return [fresh_conversation(f"test/{seed}", window, encoder.count, wordings) for seed in SEEDS]


def clauses(answer: str) -> list[str]:
    """The facts that an answer of the assistant states, like "your city: Rome"."""
    said = re.fullmatch(r"(?:Noted\. |Updated\. |You told me this\. )?(.+: .+)\.", answer)
    if not said or NOT_TOLD in answer or said[1].startswith(("The ", "the ")) or " of " in said[1].split(":")[0]:
        return []
    return [said[1][0].lower() + said[1][1:] if said[1].startswith("Your ") else said[1]][0].split("; ")


def read_clause(clause: str) -> tuple[str, str, str]:
    """(subject, noun, value) of what the assistant says; written without a look at how it is made."""
    match = re.fullmatch(
        r"(?:(?P<me>[Yy]our)|(?P<subject>[Yy]our [a-z -]+?|[A-Za-z]+)'s) (?P<noun>[a-z ]+?): (?P<value>.+)", clause
    )
    if match is None:
        match = re.fullmatch(r"(?P<me>[Yy]our) (?P<subject>)(?P<noun>[a-z ]+?): (?P<value>.+)", clause)
    assert match, clause
    subject = match["subject"] or "you"
    return subject[0].lower() + subject[1:] if subject.startswith("Your ") else subject, match["noun"], match["value"]


def test_equal_seeds_give_equal_conversations_and_others_differ(encoder: Encoder) -> None:
    first, again = (converse(Random(7), 1024, encoder.count) for _ in range(2))
    assert first == again
    assert converse(Random(8), 1024, encoder.count) != first


@pytest.mark.parametrize("wordings", WORDINGS)
def test_answers_follow_from_what_was_told(encoder: Encoder, wordings: Wordings) -> None:
    """A reader that knows only the text keeps its own books, and every answer agrees with them."""
    checked: Counter[str] = Counter()
    for conversation in conversations(encoder, wordings):
        books: dict[tuple[str, str], str] = {}
        updated: set[tuple[str, str]] = set()
        for turn in conversation.turns:
            if turn.kind is AnswerKind.ACKNOWLEDGEMENT and clauses(turn.answer):
                for clause in clauses(turn.answer):
                    subject, noun, value = read_clause(clause)
                    assert value in turn.user  # as it was told, to the letter
                    key = subject, noun
                    assert (key in books) == turn.answer.startswith("Updated"), turn
                    if key in books:
                        updated.add(key)
                        assert books[key] != value
                    books[key] = value
            elif turn.kind in (AnswerKind.RECALL, AnswerKind.UPDATED):
                subject, noun, value = read_clause(clauses(turn.answer)[0])
                assert books[subject, noun] == value
                assert ((subject, noun) in updated) == (turn.kind is AnswerKind.UPDATED)
            elif turn.kind is AnswerKind.LIST and clauses(turn.answer):
                told = [read_clause(clause) for clause in clauses(turn.answer)]
                about = told[0][0]
                assert told == [(s, n, v) for (s, n), v in books.items() if s == about]
            elif turn.kind is AnswerKind.NOT_TOLD and " of " not in turn.answer:
                lacking = turn.answer.split(": ")[0]
                lacking = lacking[0].lower() + lacking[1:] if lacking.startswith("Your ") else lacking
                assert not any(_lacks(lacking, subject, noun) for subject, noun in books), turn
            checked[turn.kind] += 1
    assert set(checked) == set(AnswerKind)


def _lacks(lacking: str, subject: str, noun: str) -> bool:
    """Whether `lacking`, in the words of the assistant, is this fact."""
    return lacking in (f"your {noun}" if subject == "you" else f"{subject}'s {noun}", subject)


def test_documents_hold_the_answers_to_questions_about_them(encoder: Encoder) -> None:
    """The value and the subject of an answer are in the conversation; two documents name the person between them."""
    seen: Counter[str] = Counter()
    for conversation in conversations(encoder):
        text = ""
        for turn in conversation.turns:
            text += turn.user + "\n"
            if turn.kind in (AnswerKind.ONE_DOCUMENT, AnswerKind.TWO_DOCUMENTS):
                seen[turn.kind] += 1
                value = turn.answer.rpartition(": ")[2].removesuffix(".")
                assert value.lower() in text.lower(), turn
                if turn.kind is AnswerKind.TWO_DOCUMENTS:
                    person = turn.answer.split(": ")[1].split(";")[0]
                    paragraphs = [p for p in turn.user.split("\n\n") if "\n" not in p]
                    # It has to be found in the first document, the question does not name it.
                    assert paragraphs, turn
                    assert not any(person in paragraph for paragraph in paragraphs), turn
                    titles = [line for line in text.splitlines() if line.endswith(person)]
                    assert titles, turn
    assert min(seen[AnswerKind.ONE_DOCUMENT], seen[AnswerKind.TWO_DOCUMENTS]) > 20


def test_distances_are_counted_from_the_last_mention(encoder: Encoder) -> None:
    """Tokens from the message that stated the same clause last, found by searching the text, to the answer."""
    counted = 0
    for conversation in conversations(encoder):
        at = encoder.count(conversation.system) + 2
        mentioned: dict[str, int] = {}
        for turn in conversation.turns:
            answer_message = at + encoder.count(turn.user) + 2
            if turn.kind in (AnswerKind.RECALL, AnswerKind.UPDATED):
                assert turn.distance == answer_message + 1 - mentioned[clauses(turn.answer)[0]]
                counted += 1
            for clause in clauses(turn.answer):
                mentioned[clause] = answer_message
            at = answer_message + encoder.count(turn.answer) + 2
    assert counted > 300


def test_recall_reaches_over_the_whole_context(encoder: Encoder) -> None:
    far = Counter(
        turn.distance // 512
        for conversation in conversations(encoder)
        for turn in conversation.turns
        if turn.kind is AnswerKind.RECALL and turn.distance is not None
    )
    assert all(far[band] >= len(SEEDS) // 4 for band in range(4)), far


@pytest.mark.parametrize("window", [128, 256, 512, 1024, 2048])
def test_no_conversation_exceeds_its_window_nor_wastes_it(encoder: Encoder, window: int) -> None:
    lengths = [len(encoder.conversation(c).ids) for c in conversations(encoder, window=window)]
    assert max(lengths) <= window
    assert sum(lengths) / len(lengths) > 0.85 * window


def _said(template: str) -> re.Pattern[str]:
    """What a message looks like that was made from `template`."""
    choices = {"do": "(do|does)", "is": "(am|is)", "have": "(have|has)", "s": "s?", "es": "(es)?", "ies": "(y|ies)"}
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template.lower()):
        parts.append(re.escape(literal))
        if name is not None:
            parts.append(choices.get(name, r"[^.?!;\n]{1,40}"))
    return re.compile("".join(parts).rstrip("\\.?!"))


def test_held_out_wording_never_occurs_in_training(encoder: Encoder) -> None:
    says = "\n".join(
        turn.user.lower() for c in conversations(encoder) for turn in c.turns if turn.kind is not AnswerKind.SMALL_TALK
    )
    for wording in wording_of_the_world():
        assert not set(wording.training) & set(wording.held_out)
        for template in wording.held_out:
            assert not _said(template).search(says), template
    small = {
        turn.user.lower() for c in conversations(encoder) for turn in c.turns if turn.kind is AnswerKind.SMALL_TALK
    }
    for intent in small_talk.INTENTS:
        assert not small & {text.lower() for text in intent.says.held_out}


def test_an_evaluation_in_held_out_wording_uses_nothing_else() -> None:
    rng = Random(4)
    for wording in wording_of_the_world():
        assert {wording.choose(rng, "held_out") for _ in range(50)} <= set(wording.held_out)
        assert {wording.choose(rng, "training") for _ in range(50)} <= set(wording.training)


def test_values_cannot_be_learnt_by_heart() -> None:
    rng = Random(3)
    assert len({words.pseudo_word(rng) for _ in range(1000)}) > 950
    assert len({words.phone(rng) for _ in range(1000)}) > 990
    assert len({words.gift(rng) for _ in range(1000)}) > 700


def test_what_it_cannot_do_gets_the_hint() -> None:
    rng = Random(5)
    answers = Counter(small_talk.exchange(rng, "training")[1] for _ in range(500))
    assert answers[small_talk.HINT] > 100
    assert set(answers) == {intent.answer for intent in small_talk.INTENTS}
