"""Train the byte-level model of the truncation figures.

    python -m benchmarks.truncation.book_model OUTPUT [--books DIR] [--minutes 8]

A Llama of the embedded model's size that reads books byte by byte, all but those held out for measurements. Its window
is short, so that a book is many times as long.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import LlamaForCausalLM

from benchmarks.random_model import byte_tokenizer
from inference.embedded.recipe import Recipe, llama_config
from inference.embedded.train import bf16_helps, make_optimizers

WINDOW = 512
HELD_OUT = ("carroll-alice.txt.gz", "chesterton-brown.txt.gz")
_ROWS = 8
_RECIPE = Recipe()
_REPORT_S = 30.0


def read_text(path: Path) -> str:
    """A text file, gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8").replace("\r\n", "\n")


def make_book_model(vocabulary: int, end_token: int) -> LlamaForCausalLM:
    config = llama_config(vocabulary, end_token)
    config.max_position_embeddings = WINDOW
    torch.manual_seed(_RECIPE.seed)
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, text: torch.Tensor, minutes: float) -> Iterator[tuple[float, int, float]]:
    """Yields progress (0 to 1), steps so far and the loss in nats per byte, after each step.  # text [bytes] int64"""
    optimizers = make_optimizers(model, _RECIPE)
    chance = torch.Generator().manual_seed(_RECIPE.seed)
    started, progress, steps = time.monotonic(), 0.0, 0
    is_mixed = bf16_helps(torch.device("cpu"))
    while progress < 1.0:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _RECIPE.schedule(progress)
        starts = torch.randint(len(text) - WINDOW, (_ROWS,), generator=chance).tolist()
        rows = torch.stack([text[start : start + WINDOW + 1] for start in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _RECIPE.clip)
        for optimizer in optimizers:
            optimizer.step()
        steps += 1
        progress = (time.monotonic() - started) / (60 * minutes)
        yield progress, steps, loss.item()


def main(
    output: Annotated[Path, typer.Argument(help="Directory of the finished model.")],
    books: Annotated[Path, typer.Option(help="Directory of *.txt.gz.")] = Path("../shared/data/books"),
    minutes: Annotated[float, typer.Option(help="Training time.")] = 8.0,
) -> None:
    """Train a byte-level Llama on books."""
    console = Console()
    tokenizer = byte_tokenizer()
    texts = [read_text(path) for path in sorted(books.glob("*.txt.gz")) if path.name not in HELD_OUT]
    text = torch.cat([torch.tensor(tokenizer(one, add_special_tokens=False).input_ids) for one in texts])
    model = make_book_model(len(tokenizer), int(tokenizer.eos_token_id or 0))
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of {len(texts)} books"
    )
    said_s = time.monotonic()
    for progress, steps, loss in train(model, text, minutes):
        if progress >= 1.0 or time.monotonic() - said_s > _REPORT_S:
            said_s = time.monotonic()
            console.print(f"{progress:4.0%}  step {steps}  loss {loss:.3f}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    console.print(f"The model is in {output}.")


if __name__ == "__main__":
    typer.run(main)
