"""Train the embedded model.

    python -m inference.embedded.train [--minutes 85] [--run DIR] [--output DIR]

Conversations are generated on the fly, none is seen twice. A run that was interrupted goes on when the command is
given again. With --minutes the schedule follows the clock, so that a run is whole on any machine; with --steps it
follows the steps, and equal arguments give equal runs.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlamaForCausalLM

from inference.embedded import MODEL, checkpoint
from inference.embedded.batches import BatchSource
from inference.embedded.model import export, make_model
from inference.embedded.recipe import Recipe
from inference.embedded.tokenizer import train_tokenizer
from inference.embedded.windows import Mask, Tokens
from inference.embedded.world import converse

_AHEAD = 4  # batches requested before they are needed, per worker
_CHECKPOINT_S = 60.0
_TOKENIZER_CONVERSATIONS = 1500  # of 4,000 characters: enough that more changes no token of note
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Length:
    """How long a run is: by steps, or by minutes where steps is 0."""

    minutes: float
    steps: int = 0

    def progress(self, position: checkpoint.Position) -> float:
        """0 at the start, 1 at the end."""
        return position.step / self.steps if self.steps else position.trained_s / (60 * self.minutes)


def prepare_tokenizer(path: Path, seed: int) -> None:
    """Train the run's tokenizer on conversations of its own, unless it is there."""
    if path.exists():
        return
    conversations = (converse(Random(f"tokenizer/{seed}/{i}"), 4000, len) for i in range(_TOKENIZER_CONVERSATIONS))
    texts = (text for c in conversations for turn in c.turns for text in (c.system, turn.user, turn.answer))
    temporary = path.with_name(f".{path.name}")
    train_tokenizer(texts).save(str(temporary))
    temporary.replace(path)


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest. Each group holds its peak learning rate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups: list[dict[str, Any]] = [{"params": matrices, "peak": recipe.matrix_lr}]
    other_groups: list[dict[str, Any]] = [{"params": others, "peak": recipe.other_lr}]
    return [
        torch.optim.Muon(groups, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other_groups, betas=recipe.betas, weight_decay=0.0, fused=True),
    ]


def answer_loss(
    model: LlamaForCausalLM, tokens: torch.Tensor, answers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy of the answers' tokens, and the share of them that are predicted right.

    tokens, answers: [rows, window]. The head reads only positions that predict answers: under half.
    """
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state  # [rows, window - 1, hidden]
    wanted = answers[:, 1:]
    logits = model.lm_head(hidden[wanted]).float()  # [answer tokens, vocabulary]
    targets = tokens[:, 1:][wanted]
    loss = torch.nn.functional.cross_entropy(logits, targets)
    return loss, (logits.detach().argmax(-1) == targets).float().mean()


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    progress: float,
    batch: tuple[Tokens, Mask],
    precision: Precision = "float32",
) -> tuple[float, float]:
    """One step. Returns loss and share of answer tokens predicted right, before the step."""
    device = model.device
    tokens = torch.from_numpy(batch[0].astype("int64")).to(device)
    answers = torch.from_numpy(batch[1].copy()).to(device)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * recipe.schedule(progress)
    with torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext():
        loss, right = answer_loss(model, tokens, answers)
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item(), right.item()


@dataclass(frozen=True)
class Report:
    """One step, for the progress bar and the log."""

    step: int
    progress: float
    window: int
    loss: float
    right: float
    step_s: float


def train(
    run: Path,
    recipe: Recipe,
    length: Length,
    device: torch.device,
    precision: Precision,
    workers: int,
    stop_after: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Report]:
    """Train in `run`, from its checkpoint if there is one, yielding after each step.

    stop_after: steps of this call, after which it ends as if interrupted, with a checkpoint.
    Raises ValueError: the checkpoint belongs to another recipe.
    """
    run.mkdir(parents=True, exist_ok=True)
    tokenizer, saved = run / "tokenizer.json", run / "checkpoint.safetensors"
    prepare_tokenizer(tokenizer, recipe.seed)
    model = make_model(tokenizer, recipe.seed)
    torch.nn.Module.to(model, device)  # transformers' own `to` is typed for no device
    optimizers = make_optimizers(model, recipe)
    position = checkpoint.Position(recipe=json.dumps(asdict(recipe)))
    if saved.exists():
        position = _resume(saved, model, optimizers, position.recipe)
    saved_at = clock()
    first = requested = position.step
    with BatchSource(tokenizer, recipe.seed, workers) as source:
        while (progress := length.progress(position)) < 1 and position.step - first != stop_after:
            while len(source) < _AHEAD * workers:
                ahead = requested / length.steps if length.steps else progress
                window = recipe.window(min(ahead, 1.0))
                source.request(requested, window, recipe.rows(window))
                requested += 1
            started = clock()
            batch = source.take()
            loss, right = train_step(model, optimizers, recipe, progress, batch, precision)
            step_s = clock() - started
            position = checkpoint.Position(position.step + 1, position.trained_s + step_s, position.recipe)
            if clock() - saved_at > _CHECKPOINT_S:
                checkpoint.save(saved, model, optimizers, position)
                saved_at = clock()
            try:
                yield Report(position.step, length.progress(position), batch[0].shape[1], loss, right, step_s)
            except GeneratorExit:  # interrupted between two steps; within one, the last checkpoint counts
                checkpoint.save(saved, model, optimizers, position)
                raise
    checkpoint.save(saved, model, optimizers, position)


def _resume(
    saved: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], recipe: str
) -> checkpoint.Position:
    position = checkpoint.load(saved, model, optimizers)
    if position.recipe != recipe:
        raise ValueError(f"{saved} was begun with another recipe: {position.recipe}")
    return position


def main(
    minutes: Annotated[float, typer.Option(help="Training time, over all interruptions.")] = 85,
    steps: Annotated[int, typer.Option(help="Instead of --minutes: exactly so many steps, reproducibly.")] = 0,
    run: Annotated[Path, typer.Option(help="Checkpoint, tokenizer and log; give it again to go on.")] = Path(
        "build/embedded"
    ),
    output: Annotated[Path, typer.Option(help="The finished model.")] = MODEL,
    seed: Annotated[int, typer.Option(help="Of the weights and the conversations.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 (mixed) or auto.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that generate conversations.")] = 1,
    matrix_lr: Annotated[float, typer.Option(help="Highest learning rate of the matrices.")] = Recipe.matrix_lr,
) -> None:
    """Train the embedded model, or go on with a run."""
    console = Console()
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    mixed: Precision = (
        "bfloat16" if precision == "bfloat16" or (precision == "auto" and bf16_helps(chosen)) else "float32"
    )
    recipe = Recipe(seed=seed, matrix_lr=matrix_lr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    run.mkdir(parents=True, exist_ok=True)
    with Progress(*columns, console=console) as bar, (run / "log.jsonl").open("a") as log:
        task = bar.add_task(f"{chosen}, {mixed}", total=1.0)
        for report in train(run, recipe, Length(minutes, steps), chosen, mixed, workers):
            text = f"step {report.step} window {report.window} loss {report.loss:.3f} right {report.right:.1%}"
            bar.update(task, completed=min(report.progress, 1.0), description=f"{text} {report.step_s:.2f} s")
            log.write(json.dumps(asdict(report)) + "\n")
            log.flush()
    export(run, output)
    console.print(f"The model is in {output}. Measure it: python -m inference.embedded.evaluate --model {output}")


def bf16_helps(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster there: on CPUs only with instructions for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


if __name__ == "__main__":
    typer.run(main)
