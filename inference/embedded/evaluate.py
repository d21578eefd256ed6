"""Measure what the embedded model remembers.

    python -m inference.embedded.evaluate [--model DIR] [--json FILE]

Plays freshly generated conversations, none of which was trained on, in the wording of training and in wording that
training never saw. An answer counts when the greedy answer is the right one, token by token, after the conversation
as it should have gone.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from inference.embedded import MODEL
from inference.embedded.facts import Wordings
from inference.embedded.recipe import CONTEXT
from inference.embedded.windows import EncodedConversation, Encoder, fresh_conversation
from inference.embedded.world import NOT_TOLD, AnswerKind, Turn

BANDS = (512, 1024, 1900)  # tokens of distance; the rows of recall are the bands between
NOT_TOLD_PRECISION, NOT_TOLD_RECALL = "not told: precision", "not told: recall"
# What the model is held to, by row. Rows without a threshold are shown for information.
THRESHOLDS = {
    "recall, 1 to 512 tokens": 0.99,
    "recall, 513 to 1024 tokens": 0.98,
    "recall, 1025 to 1900 tokens": 0.95,
    AnswerKind.UPDATED.value: 0.97,
    NOT_TOLD_PRECISION: 0.97,
    NOT_TOLD_RECALL: 0.97,
    AnswerKind.ONE_DOCUMENT.value: 0.97,
    AnswerKind.TWO_DOCUMENTS.value: 0.90,
}
_EXTRA_TOKENS = 8  # that a wrong answer may be longer than the right one
_MOST_CONVERSATIONS = 2000


class Answerer(Protocol):
    """Whatever answers: for each conversation, its answers' texts in order."""

    def __call__(self, conversations: Sequence[EncodedConversation]) -> list[list[str]]: ...


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    right: int
    questions: int

    @property
    def rate(self) -> float:
        return self.right / self.questions if self.questions else 0.0


def rows_of(turn: Turn) -> Iterator[str]:
    """The rows that count `turn`'s answer. Precision of "not told" is not among them: it goes by what was answered."""
    if turn.kind is AnswerKind.RECALL:
        assert turn.distance is not None
        lower = 0
        for upper in BANDS:
            if lower < turn.distance <= upper:
                yield f"recall, {lower + 1} to {upper} tokens"
            lower = upper
    elif turn.kind is AnswerKind.NOT_TOLD:
        yield NOT_TOLD_RECALL
    else:
        yield turn.kind.value


def score(turns: Sequence[Turn], answers: Sequence[str]) -> dict[str, Row]:
    """The table's rows. answers: one per turn, whatever was said."""
    right: dict[str, int] = defaultdict(int)
    questions: dict[str, int] = defaultdict(int)
    for turn, answer in zip(turns, answers, strict=True):
        for row in rows_of(turn):
            questions[row] += 1
            # For recall of "not told" it counts that the model declines, for the others that the answer is right.
            right[row] += NOT_TOLD in answer if turn.kind is AnswerKind.NOT_TOLD else answer == turn.answer
        if NOT_TOLD in answer:
            questions[NOT_TOLD_PRECISION] += 1
            right[NOT_TOLD_PRECISION] += turn.kind is AnswerKind.NOT_TOLD
    names = [*THRESHOLDS, *sorted(questions.keys() - THRESHOLDS.keys())]
    return {name: Row(right[name], questions[name]) for name in names}


class GreedyModel:
    """Greedy answers of a model, many at once.

    The right answers are read along with the conversation in one pass. Where every token of an answer is the most
    likely one after the tokens before it, greedy decoding gives just that answer. Where one is not, decoding goes on
    from there.
    """

    def __init__(self, model: torch.nn.Module, encoder: Encoder) -> None:
        self._model = model
        self._encoder = encoder

    @torch.inference_mode()
    def __call__(self, conversations: Sequence[EncodedConversation]) -> list[list[str]]:
        longest = max(len(c.ids) for c in conversations)
        device = next(self._model.parameters()).device
        tokens = torch.full((len(conversations), longest), self._encoder.end, device=device)  # [conversations, tokens]
        for row, conversation in enumerate(conversations):
            tokens[row, : len(conversation.ids)] = torch.tensor(conversation.ids, device=device)
        output = self._model(tokens, use_cache=True)
        best = output.logits.argmax(-1).cpu()  # [conversations, tokens]: the greedy next token after each
        return [
            [
                self._encoder.decode(self._answer(c, span, best[row], output.past_key_values, row, tokens.device))
                for span in c.answers
            ]
            for row, c in enumerate(conversations)
        ]

    def _answer(
        self,
        conversation: EncodedConversation,
        span: tuple[int, int],
        best: torch.Tensor,
        cache: Any,  # transformers' DynamicCache
        row: int,
        device: torch.device,
    ) -> list[int]:
        start, end = span
        said = conversation.ids[start:end]
        wrong = next((i for i in range(end - start) if int(best[start + i - 1]) != said[i]), None)
        if wrong is None:
            return said
        answer = [*said[:wrong], int(best[start + wrong - 1])]
        kept = start + wrong  # tokens whose keys and values are those of this answer
        branch = DynamicCache()
        for number, layer in enumerate(cache.layers):
            keys, values = layer.keys, layer.values  # [conversations, heads, tokens, head_dim]
            branch.update(keys[row : row + 1, :, :kept], values[row : row + 1, :, :kept], number)
        while answer[-1] != self._encoder.end and len(answer) < len(said) + _EXTRA_TOKENS:
            following = self._model(torch.tensor([answer[-1:]], device=device), past_key_values=branch, use_cache=True)
            answer.append(int(following.logits[0, -1].argmax()))
        return answer


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, to look at."""

    kind: str
    user: str
    right: str
    answered: str
    distance: int | None


def evaluate(
    answerer: Answerer, encoder: Encoder, wordings: Wordings, questions: int, seed: int, window: int, batch: int
) -> tuple[dict[str, Row], list[Mistake]]:
    """Play conversations until each row has at least `questions` questions (or very many were played).

    Precision counts what the model answers, which a model can keep below `questions`; it does not hold up the end.
    """
    turns: list[Turn] = []
    answers: list[str] = []
    wanted = set(THRESHOLDS) - {NOT_TOLD_PRECISION}
    with Progress(transient=True) as bar:
        task = bar.add_task(f"{wordings} wording", total=questions)
        for first in range(0, _MOST_CONVERSATIONS, batch):
            played = [
                fresh_conversation(f"evaluation/{seed}/{wordings}/{i}", window, encoder.count, wordings)
                for i in range(first, first + batch)
            ]
            for conversation, said in zip(played, answerer([encoder.conversation(c) for c in played]), strict=True):
                turns += conversation.turns
                answers += said
            table = score(turns, answers)
            fewest = min(table[name].questions for name in wanted)
            bar.update(task, completed=min(fewest, questions))
            if fewest >= questions:
                break
    mistakes = [
        Mistake(t.kind.value, t.user, t.answer, a, t.distance)
        for t, a in zip(turns, answers, strict=True)
        if a != t.answer
    ]
    return table, mistakes


def main(
    model: Annotated[Path, typer.Option(help="Directory of the model.")] = MODEL,
    questions: Annotated[int, typer.Option(min=1, help="At least so many per row.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the conversations.")] = 20_000,
    batch: Annotated[int, typer.Option(help="Conversations at once.")] = 4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    show: Annotated[int, typer.Option(help="So many mistakes are printed.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Print the quality table, held against what the model has to reach."""
    console = Console()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), use_safetensors=True)
    encoder = Encoder(AutoTokenizer.from_pretrained(model).backend_tokenizer)
    answerer = GreedyModel(torch.nn.Module.to(loaded, torch.device(device)).eval(), encoder)
    started = time.monotonic()
    wordings: tuple[Wordings, ...] = ("training", "held_out")
    results = {w: evaluate(answerer, encoder, w, questions, seed, CONTEXT, batch) for w in wordings}
    table = Table(title=f"{model.name}, {dtype}, greedy, exact match")
    for column in ("", "training wording", "held-out wording", "held to"):
        table.add_column(column, justify="left" if not column else "right")
    for name in results["training"][0]:
        cells = [_cell(results[w][0].get(name, Row(0, 0))) for w in wordings]
        table.add_row(name, *cells, f">= {THRESHOLDS[name]:.0%}" if name in THRESHOLDS else "")
    console.print(table)
    for wording in wordings:
        for mistake in results[wording][1][:show]:
            console.print(asdict(mistake))
    if json_file is not None:
        record = {
            "command": " ".join(["python -m inference.embedded.evaluate", *sys.argv[1:]]),
            "machine": platform.processor() or platform.machine(),
            "dtype": dtype,
            "seconds": time.monotonic() - started,
            "rows": {w: {n: {**asdict(r), "rate": r.rate} for n, r in results[w][0].items()} for w in wordings},
            "thresholds": THRESHOLDS,
            "mistakes": {w: [asdict(m) for m in results[w][1][:200]] for w in wordings},
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record, indent=1) + "\n")


def _cell(row: Row) -> str:
    return f"{row.rate:.1%} of {row.questions}" if row.questions else "none"


if __name__ == "__main__":
    typer.run(main)
