"""The connection to one inference process: what it serves, and whether it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from monitoring.logs import get_logger
from protocol.errors import PeerUnavailable
from protocol.messages import GetModel, ModelInfo, RunTurn, Welcome
from protocol.rpc import Ask, Curve, RpcClient

log = get_logger(__name__)
M = TypeVar("M")

_HELLO_S = 5.0
# A process on its way out ends its turns, and refuses new ones, some time before its connection ends.
_LEAVING_S = 1.0


class InferenceLink:
    """Owned by one loop.

    on_change: called whenever the process comes or goes.
    """

    def __init__(self, name: str, endpoint: str, curve: Curve | None, on_change: Callable[[], None]) -> None:
        self.name = name
        self.running = 0  # turns that hold a place here, and
        self.served = 0  # that ever did; counted by Workers
        self._client = RpcClient(
            endpoint,
            "gateway",
            curve=curve,
            on_connected=self._connected,
            on_disconnected=self._disconnected,
        )
        self._on_change = on_change
        self._model: ModelInfo | None = None
        self._leaving: asyncio.TimerHandle | None = None

    @property
    def is_connected(self) -> bool:
        return self._client.is_connected

    @property
    def reason(self) -> str:
        """Why it is not connected; empty where it is."""
        return "" if self.is_connected else f"{self.name} is not connected {self._client.last_error}".strip()

    @property
    def model(self) -> ModelInfo:
        """What is served, or was last. Raises PeerUnavailable: not known yet."""
        if self._model is None:
            raise PeerUnavailable(self.reason)
        return self._model

    @property
    def places(self) -> int:
        """Turns that may be there at once; none while it is away or leaves."""
        is_here = self.is_connected and self._leaving is None
        return self._model.max_running if self._model is not None and is_here else 0

    async def start(self) -> None:
        await self._client.start()

    async def stop(self) -> None:
        self._stays()
        await self._client.stop()

    def run_turn(self, turn: RunTurn, timeout_s: float) -> AsyncGenerator[Any, None]:
        """TurnStarted, TurnDelta..., TurnDone. Close it early (contextlib.aclosing) to cancel the turn.

        timeout_s bounds the whole. There is no bound of its own on silence: a long prompt on a busy machine is
        silent too, and a dead or stuck process is noticed by the connection.
        """
        return self._client.stream(turn, timeout_s, timeout_s)

    async def ask(self, message: Any, expect: type[M], timeout_s: float) -> M:
        """One request of another kind. Raises as RpcClient.request does."""
        return await self._client.request(message, expect, timeout_s)

    def gave_up_turn(self) -> None:
        """A turn was ended there, or refused, as if the process were stopping: for a moment it gets no others."""
        if self.is_connected and self._leaving is None:
            self._leaving = asyncio.get_running_loop().call_later(_LEAVING_S, self._stayed)

    def _stays(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _stayed(self) -> None:
        self._leaving = None
        self._on_change()

    async def _connected(self, welcome: Welcome, ask: Ask) -> None:
        self._model = await ask(GetModel(), ModelInfo, _HELLO_S)
        self._stays()
        log.info("inference connected", worker=self.name, model=self._model.model, max_running=self._model.max_running)
        # The client counts as connected right after this returns, before the loop can run anything else.
        asyncio.get_running_loop().call_soon(self._on_change)

    def _disconnected(self) -> None:
        log.warning("inference went away", worker=self.name, error=self._client.last_error)
        self._on_change()
