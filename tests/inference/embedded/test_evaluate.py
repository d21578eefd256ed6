from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from typer.testing import CliRunner

from inference.embedded.evaluate import (
    NOT_TOLD_PRECISION,
    NOT_TOLD_RECALL,
    THRESHOLDS,
    GreedyModel,
    Row,
    evaluate,
    main,
    rows_of,
    score,
)
from inference.embedded.model import export, make_model
from inference.embedded.recipe import Recipe
from inference.embedded.train import Length, train
from inference.embedded.windows import EncodedConversation, Encoder, fresh_conversation
from inference.embedded.world import NOT_TOLD, AnswerKind, Turn


class Perfect:
    """Knows the answers."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __call__(self, conversations: Sequence[EncodedConversation]) -> list[list[str]]:
        return [[self._encoder.decode(c.ids[start:end]) for start, end in c.answers] for c in conversations]


class Always:
    """Says one thing."""

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def __call__(self, conversations: Sequence[EncodedConversation]) -> list[list[str]]:
        return [[self._answer] * len(c.answers) for c in conversations]


def test_a_perfect_model_has_every_row_full(encoder: Encoder) -> None:
    rows, mistakes = evaluate(Perfect(encoder), encoder, "held_out", questions=10, seed=1, window=2048, batch=4)
    assert {name: rows[name].rate for name in THRESHOLDS} == dict.fromkeys(THRESHOLDS, 1.0)
    assert all(rows[name].questions >= 10 for name in THRESHOLDS)
    assert mistakes == []


def test_a_model_that_is_always_wrong_has_none(encoder: Encoder) -> None:
    rows, mistakes = evaluate(Always("No."), encoder, "training", questions=5, seed=1, window=2048, batch=4)
    assert all(row.right == 0 for row in rows.values())
    assert rows[NOT_TOLD_PRECISION].questions == 0  # it never declined
    assert len(mistakes) >= sum(rows[name].questions for name in THRESHOLDS if name != NOT_TOLD_PRECISION)


def test_a_model_that_always_declines_has_recall_without_precision(encoder: Encoder) -> None:
    answer = f"{NOT_TOLD} your name."
    rows, _ = evaluate(Always(answer), encoder, "training", questions=5, seed=1, window=2048, batch=4)
    assert rows[NOT_TOLD_RECALL].rate == 1
    assert rows[NOT_TOLD_PRECISION].rate < 0.3
    assert rows[AnswerKind.UPDATED].rate == 0


def test_score_by_hand() -> None:
    recall = Turn("q", "You told me that a.", AnswerKind.RECALL, 600)
    near = Turn("q", "You told me that b.", AnswerKind.RECALL, 512)
    unknown = Turn("q", f"{NOT_TOLD} your age.", AnswerKind.NOT_TOLD)
    answers = ["You told me that a.", f"{NOT_TOLD} b.", f"{NOT_TOLD} your age."]
    rows = score([recall, near, unknown], answers)
    assert rows["recall, 513 to 1024 tokens"] == Row(1, 1)
    assert rows["recall, 1 to 512 tokens"] == Row(0, 1)
    assert rows[NOT_TOLD_PRECISION] == Row(1, 2)
    assert rows[NOT_TOLD_RECALL] == Row(1, 1)
    assert list(rows_of(Turn("q", "a", AnswerKind.RECALL, 1901))) == []  # beyond what the model is held to


def test_greedy_answers_are_those_of_transformers(tokenizer_file: Path, encoder: Encoder) -> None:
    """Of a model that is wrong everywhere, and of one whose answers happen to be right."""
    model = make_model(tokenizer_file, seed=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # answers that depend on the conversation
    played = [encoder.conversation(fresh_conversation(f"greedy/{i}", 256, encoder.count, "training")) for i in (1, 2)]
    expected: list[list[str]] = []
    own: list[EncodedConversation] = []
    for conversation in played:
        expected.append([])
        for number, (start, end) in enumerate(conversation.answers):
            ids = model.generate(
                torch.tensor([conversation.ids[:start]]),
                attention_mask=torch.ones(1, start, dtype=torch.long),
                max_new_tokens=end - start + 8,
                do_sample=False,
            )[0, start:].tolist()
            expected[-1].append(encoder.decode(ids))
            if number == 0:
                own.append(EncodedConversation([*conversation.ids[:start], *ids], [(start, start + len(ids))]))
    answerer = GreedyModel(model, encoder)
    assert answerer(played) == expected
    assert answerer(own) == [answers[:1] for answers in expected]


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, tokenizer_file: Path) -> None:
    """On a model that was hardly trained: every answer is wrong, and the table is whole."""
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    recipe = Recipe(batch_tokens=128, curriculum=((1.0, 64),))
    list(train(tmp_path, recipe, Length(1, steps=1), torch.device("cpu"), "float32", workers=1))
    export(tmp_path, tmp_path / "model")
    app = typer.Typer()
    app.command()(main)
    arguments = ["--model", str(tmp_path / "model"), "--questions", "1", "--batch", "1", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out.json").read_text())
    assert set(record["rows"]) == {"training", "held_out"}
    assert set(THRESHOLDS) <= set(record["rows"]["training"])
    assert "two documents" in result.output
