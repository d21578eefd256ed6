from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import inference.service
from inference.service import InferenceService
from protocol.rpc import RpcClient
from tests.inference.harness import config_for, run, service


@pytest.fixture
def serve(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run an async test against a service of its own, without a store."""
    monkeypatch.setattr(inference.service, "_STORE_WAIT_S", 0.0)
    monkeypatch.setattr(inference.service, "_DRAIN_S", 1.0)

    def serve(test: Callable[[InferenceService, RpcClient], Awaitable[None]], **overrides: Any) -> None:
        async def main() -> None:
            async with service(config_for(model, tmp_path / "run", **overrides)) as (running, client):
                await test(running, client)

        run(main(), 300)

    return serve
