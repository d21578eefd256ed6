from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.serving import ServedGateway


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: a Unix socket's may have 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ca-gw-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def served(directory: Path) -> Iterator[ServedGateway]:
    gateway = ServedGateway(directory)
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def served_once() -> Iterator[ServedGateway]:
    """One gateway for a whole file of tests that must change nothing in it."""
    path = Path(tempfile.mkdtemp(prefix="ca-gw-"))
    gateway = ServedGateway(path)
    yield gateway
    gateway.close()
    shutil.rmtree(path)
