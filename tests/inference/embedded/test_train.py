from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference.embedded import checkpoint
from inference.embedded.batches import BatchSource
from inference.embedded.model import export, make_model
from inference.embedded.recipe import CONTEXT, CURRICULUM, Recipe
from inference.embedded.train import (
    Length,
    answer_loss,
    make_optimizers,
    train,
    train_step,
)
from inference.embedded.windows import Encoder, training_batch

TINY = Recipe(seed=3, batch_tokens=512, curriculum=((0.5, 64), (1.0, 128)), warm_up=0.1)
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path, tokenizer_file: Path) -> Path:
    """A run's directory with a tokenizer in it."""
    directory = tmp_path / "run"
    directory.mkdir()
    shutil.copy(tokenizer_file, directory)
    return directory


def test_answers_get_more_likely_on_one_small_world(tokenizer_file: Path, encoder: Encoder) -> None:
    """The loop learns: the same few conversations again and again are soon known."""
    model = make_model(tokenizer_file, seed=1)
    optimizers = make_optimizers(model, TINY)
    batch = training_batch(encoder, seed=1, step=0, window=128, rows=2)
    losses = [train_step(model, optimizers, TINY, 0.3, batch)[0] for _ in range(25)]
    assert losses[0] > 5
    assert losses[-1] < losses[0] / 3


def test_loss_is_on_answers_only(tokenizer_file: Path, encoder: Encoder) -> None:
    """It equals transformers' own loss with all other labels masked out."""
    model = make_model(tokenizer_file, seed=1).eval()
    array, mask = training_batch(encoder, seed=1, step=0, window=128, rows=3)
    tokens, answers = torch.from_numpy(array.astype("int64")), torch.from_numpy(mask.copy())
    with torch.no_grad():
        loss, _ = answer_loss(model, tokens, answers)
        theirs = model(input_ids=tokens, labels=tokens.masked_fill(~answers, -100)).loss
    torch.testing.assert_close(loss, theirs)
    said = encoder.decode(tokens[0][answers[0]].tolist())
    assert "Noted." in said
    assert "?" not in said


def test_an_interrupted_run_ends_in_the_same_state(run: Path, tmp_path: Path) -> None:
    """Weights and optimizer state, bit for bit, over a change of the window."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    whole = list(train(run, TINY, Length(1, steps=6), CPU, "float32", workers=1))
    first = list(train(other, TINY, Length(1, steps=6), CPU, "float32", workers=1, stop_after=2))
    rest = list(train(other, TINY, Length(1, steps=6), CPU, "float32", workers=2))
    assert [r.step for r in first + rest] == [r.step for r in whole] == list(range(1, 7))
    assert [r.window for r in first + rest] == [64, 64, 64, 128, 128, 128]
    assert [r.loss for r in first + rest] == [r.loss for r in whole]
    one, two = (load_file(d / "checkpoint.safetensors") for d in (run, other))
    assert one.keys() == two.keys()
    states = [name for name in one if name.startswith(("exp_avg/", "momentum_buffer/"))]
    assert len(states) == sum(name.startswith("model/") for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_leaving_the_loop_keeps_the_last_step(run: Path) -> None:
    """What Ctrl-C does between two steps."""
    steps = train(run, TINY, Length(1, steps=50), CPU, "float32", workers=1)
    for report in steps:
        if report.step == 2:
            break
    steps.close()
    again = train(run, TINY, Length(1, steps=50), CPU, "float32", workers=1, stop_after=1)
    assert [r.step for r in again] == [3]
    assert not list(run.glob(".checkpoint*"))


def test_a_run_goes_on_with_its_own_recipe_only(run: Path) -> None:
    list(train(run, TINY, Length(1, steps=2), CPU, "float32", workers=1, stop_after=1))
    with pytest.raises(ValueError, match="another recipe"):
        list(train(run, Recipe(seed=4), Length(1, steps=2), CPU, "float32", workers=1))


def test_minutes_bound_a_run_by_its_own_clock(run: Path) -> None:
    """Time is counted over interruptions; the clock here makes each step last 7 s of a minute."""
    ticks = iter(range(0, 10_000, 7))
    reports = list(train(run, TINY, Length(minutes=1), CPU, "float32", workers=1, clock=lambda: float(next(ticks))))
    assert [r.step for r in reports] == list(range(1, 10))
    assert reports[-1].progress >= 1
    assert list(train(run, TINY, Length(minutes=1), CPU, "float32", workers=1)) == []


def test_the_result_is_a_transformers_model_in_ten_megabytes(run: Path, tmp_path: Path) -> None:
    list(train(run, TINY, Length(1, steps=1), CPU, "float32", workers=1))
    output = tmp_path / "model"
    export(run, output)
    export(run, output)  # a second time replaces the first
    assert sum(file.stat().st_size for file in output.iterdir()) < 10e6
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert 2e6 <= model.num_parameters() <= 4e6
    assert model.config.max_position_embeddings == CONTEXT
    trained = load_file(run / "checkpoint.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[f"model/{name}"].bfloat16().float())
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert not list(tmp_path.glob(".model*"))


def test_batches_arrive_in_order_from_any_number_of_workers(tokenizer_file: Path, encoder: Encoder) -> None:
    with BatchSource(tokenizer_file, seed=9, workers=2) as source:
        for step, window in enumerate((64, 128, 256)):
            source.request(step, window, rows=2)
        for step, window in enumerate((64, 128, 256)):
            tokens, answers = source.take()
            expected = training_batch(encoder, 9, step, window, 2)
            assert (tokens == expected[0]).all()
            assert (answers == expected[1]).all()
        assert len(source) == 0


def test_a_dead_worker_is_an_error_not_a_hang(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with BatchSource(tmp_path / "tokenizer.json", seed=1) as source:
        source.request(0, 64, 1)
        with pytest.raises(EOFError, match="ended"):
            source.take()


def test_schedule() -> None:
    recipe = Recipe()
    assert [recipe.window(p) for p in (0.0, 0.13, 0.3, 0.5, 0.7, 1.0)] == [128, 256, 512, 1024, 2048, 2048]
    assert all(recipe.rows(window) * window == recipe.batch_tokens for _, window in CURRICULUM)
    rates = [recipe.schedule(i / 1000) for i in range(1001)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(1, rel=1e-3)
    assert rates[-1] == pytest.approx(0.02)


def test_a_checkpoint_is_replaced_as_a_whole(tokenizer_file: Path, tmp_path: Path) -> None:
    """A writer that dies before its rename leaves the last checkpoint as it was."""
    model = make_model(tokenizer_file, seed=1)
    optimizers = make_optimizers(model, TINY)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, model, optimizers, checkpoint.Position(4, 1.5, json.dumps({"a": 1})))
    (tmp_path / ".checkpoint.safetensors.1").write_bytes(b"half of a ")
    assert checkpoint.load(path, model, optimizers) == checkpoint.Position(4, 1.5, '{"a": 1}')
