"""All inference processes as one: what they serve together, how many turns they take, who takes the next one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from gateway.inference_link import InferenceLink
from gateway.routing import Holders, Load, choose_worker
from monitoring.logs import get_logger
from protocol.errors import CachedAttentionError, PeerUnavailable
from protocol.messages import ForgetTurns, GetWorkingKv, ModelInfo, TurnsForgotten, WorkingKv
from protocol.rpc import Curve

log = get_logger(__name__)
M = TypeVar("M")

_FORGET_S = 20.0  # more than a worker waits for its saves
_ASK_S = 30.0  # tokenizing the largest body takes seconds


class Workers:
    """Owned by one loop. Changed by the dispatcher, which takes places and gives them back, and by the links.

    All workers serve one model: while one of them is connected, another that serves something else gets no turns.
    on_change: called whenever a worker comes or goes.
    """

    def __init__(self, endpoints: Sequence[str], curve: Curve | None, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._model: ModelInfo | None = None
        self._holders = Holders()
        names = [f"inference-{number}" for number in range(1, len(endpoints) + 1)]
        if len(endpoints) == 1:
            names = ["inference"]
        self._links = [
            InferenceLink(name, endpoint, curve, partial(self._changed, number))
            for number, (name, endpoint) in enumerate(zip(names, endpoints, strict=True))
        ]

    async def start(self) -> None:
        for link in self._links:
            await link.start()

    async def stop(self) -> None:
        for link in self._links:
            await link.stop()

    # -- what they are together -----------------------------------------------------------------------------

    @property
    def model(self) -> ModelInfo:
        """What is served, or was last: requests are checked and journaled, and their turns wait, while all are away.

        Raises PeerUnavailable: not known yet.
        """
        if self._model is None:
            raise PeerUnavailable(self.reason)
        return self._model

    @property
    def serving(self) -> int:
        """How many are connected and serve the model."""
        return sum(map(self._serves, self._links))

    @property
    def is_connected(self) -> bool:
        return self.serving > 0

    @property
    def reason(self) -> str:
        """Why not all of them are serving; empty where all are."""
        absent = [link.reason or f"{link.name} serves another model" for link in self._links if not self._serves(link)]
        return "; ".join(absent)

    @property
    def places(self) -> int:
        """Turns that may run at once."""
        return sum(load.places for load in self._loads())

    @property
    def free_places(self) -> int:
        return sum(max(0, load.places - load.running) for load in self._loads())

    async def ask(self, message: Any, expect: type[M]) -> M:
        """A request that any of them answers. Raises PeerUnavailable: all are away; and as RpcClient.request does."""
        for link in self._links:
            if self._serves(link):
                return await link.ask(message, expect, _ASK_S)
        raise PeerUnavailable(self.reason)

    async def forget(self, turn_keys: Sequence[bytes]) -> tuple[list[TurnsForgotten], list[str]]:
        """Have every worker let go of these turns' contexts. What each said; and one sentence for each thing left."""
        told = await asyncio.gather(*(self._forget(link, turn_keys) for link in self._links))
        return [found for found, _ in told if found is not None], [left for _, left in told if left]

    async def working_kv(self, timeout_s: float) -> dict[str, WorkingKv]:
        """By the workers' names, of those that answer in time."""
        told = await asyncio.gather(
            *(link.ask(GetWorkingKv(), WorkingKv, timeout_s) for link in self._links), return_exceptions=True
        )
        return {link.name: kv for link, kv in zip(self._links, told, strict=True) if isinstance(kv, WorkingKv)}

    # -- turns ----------------------------------------------------------------------------------------------

    def take(self, parent_turn_key: bytes | None, affinity: bytes | None = None) -> InferenceLink:
        """A place for the turn that continues this one. Raises PeerUnavailable: none is free.

        affinity: names turns that probably begin alike; where nobody holds the parent, the worker of the last one.
        """
        holder = self._holders.find(parent_turn_key) if parent_turn_key is not None else None
        if holder is None and affinity is not None:
            holder = self._holders.find(affinity)
        chosen = choose_worker(self._loads(), holder)
        if chosen is None:
            raise PeerUnavailable("no place is free")
        link = self._links[chosen]
        link.running += 1
        link.served += 1
        return link

    def give_back(self, link: InferenceLink) -> None:
        link.running -= 1

    def note_end(self, turn_key: bytes, link: InferenceLink, affinity: bytes | None = None) -> None:
        """A turn ended well there. Where there is one worker, nobody has to remember."""
        if len(self._links) == 1:
            return
        for key in (turn_key,) if affinity is None else (turn_key, affinity):
            self._holders.note(key, self._links.index(link), time.monotonic())

    def save_wait_s(self, parent_turn_key: bytes | None, link: InferenceLink) -> float:
        """How long a turn at `link` should wait for the context that it continues; see Holders."""
        if parent_turn_key is None:
            return 0.0
        return self._holders.save_wait_s(parent_turn_key, self._links.index(link), time.monotonic())

    # -- inside ---------------------------------------------------------------------------------------------

    async def _forget(self, link: InferenceLink, turn_keys: Sequence[bytes]) -> tuple[TurnsForgotten | None, str]:
        try:
            found = await link.ask(ForgetTurns(tuple(turn_keys)), TurnsForgotten, _FORGET_S)
        except CachedAttentionError as error:
            return None, f"on the device of {link.name}, until it needs the room or ends: {error.message}"
        return found, f"{found.unsaved} turns are still being saved by {link.name}" if found.unsaved else ""

    def _loads(self) -> list[Load]:
        return [Load(link.running, link.places if self._serves(link) else 0, link.served) for link in self._links]

    def _serves(self, link: InferenceLink) -> bool:
        return link.is_connected and self._model is not None and _identity(link.model) == _identity(self._model)

    def _changed(self, number: int) -> None:
        link = self._links[number]
        if not link.is_connected:
            self._holders.forget(number)
        if not self.is_connected:  # nobody serves the model, not yet or not any more: another one may be served
            self._model = next((other.model for other in self._links if other.is_connected), self._model)
        if link.is_connected and not self._serves(link):
            log.error(
                "a worker serves another model than the others and gets no turns",
                worker=link.name,
                serves=link.model.model,
                others=self.model.model,
                namespace=link.model.namespace.hex(),
                others_namespace=self.model.namespace.hex(),
            )
        self._on_change()


def _identity(model: ModelInfo) -> tuple[object, ...]:
    """What makes turns of two workers the same: their names and keys, and which prompts fit."""
    return model.model, model.namespace, model.template_digest, model.max_context
