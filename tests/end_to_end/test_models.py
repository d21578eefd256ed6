"""Models from a directory or a hub; one that cannot be served stops the start, with exit code 2 and the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.random_model import byte_tokenizer
from tests.inference.harness import make_model


def _no_rotary(directory: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def _truncated_weights(directory: Path) -> None:
    make_model(directory, "llama")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])


def _pickled_weights(directory: Path) -> None:
    make_model(directory, "llama")
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def _no_tokenizer(directory: Path) -> None:
    make_model(directory, "llama")
    for path in directory.glob("tokenizer*"):
        path.unlink()


def _no_template(directory: Path) -> None:
    make_model(directory, "llama")
    (directory / "chat_template.jinja").unlink()


def _unknown_architecture(directory: Path) -> None:
    make_model(directory, "llama")
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "perceptron_1958"}))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_no_rotary, "no rotary position embedding"),
        (_truncated_weights, "cannot load the model"),
        (_pickled_weights, "safetensors"),
        (_no_tokenizer, "tokenizer"),
        (_no_template, "chat template"),
        (_unknown_architecture, "perceptron_1958"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_start_stops_with_the_reason(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    make(tmp_path / "model")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "cli", "inference", "--model", str(tmp_path / "model")),
            *("--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")),
            *("--metrics-port-inference", "0", "--log-level", "error"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    message = " ".join(result.stderr.split())
    assert reason in message
    assert "Traceback" not in message


def _hub_cache(home: Path, name: str) -> Path:
    """A hub's cache with one model in it, laid out as huggingface_hub does."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    make_model(repository / "snapshots" / commit, "llama", max_context=512)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_a_hub_id_is_loaded_through_the_hubs_cache(tmp_path: Path) -> None:
    """The real download code, with everything in the cache already: there is no hub where tests run."""
    snapshot = _hub_cache(tmp_path, "acme/tiny")
    program = (
        "import sys; from pathlib import Path; from inference.model import locate;"
        "from tests.inference.harness import config_for;"
        "print(*locate(config_for(sys.argv[2], Path(sys.argv[1]))))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def ask(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "run"), name]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    assert ask("acme/tiny").stdout.split() == [str(snapshot), "acme/tiny"]
    assert "cannot get model 'acme/absent' from the hub" in ask("acme/absent").stderr


def test_a_context_over_the_models_own_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama", max_context=512)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "cli", "inference", "--model", str(tmp_path / "model"), "--max-context", "513"),
            *("--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")),
            *("--metrics-port-inference", "0", "--log-level", "error"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "max_context 513 is over the model's own 512" in " ".join(result.stderr.split())
