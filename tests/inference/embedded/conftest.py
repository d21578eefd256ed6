from __future__ import annotations

from pathlib import Path

import pytest

from inference.embedded.tokenizer import load_tokenizer
from inference.embedded.train import prepare_tokenizer
from inference.embedded.windows import Encoder


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer that a training run makes."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    prepare_tokenizer(path, seed=1)
    return path


@pytest.fixture(scope="session")
def encoder(tokenizer_file: Path) -> Encoder:
    return Encoder(load_tokenizer(tokenizer_file))
