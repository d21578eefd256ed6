"""What is played on every engine: conversations one after another, in little memory, and many at once.

A scenario is a sequence of pieces, each some seconds long at most. Engines take turns by pieces, so that a slow minute
of a shared machine falls on all of them.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from benchmarks.engine.load import Conversation, Reply
from benchmarks.engine.servers import Server


@dataclass(frozen=True)
class Sizes:
    """How much is said. In tokens: what a user says, an answer."""

    conversations: int = 4
    turns: int = 8
    user: int = 180
    answer: int = 32
    cold: int = 3  # prompts as long as the last turn's, all of them new
    clients: tuple[int, ...] = (8, 32)
    bursts: int = 3  # how often all clients come at once
    stream: int = 96  # of an answer while others come and go
    prefills: int = 6  # long prompts that arrive meanwhile

    @property
    def last_prompt(self) -> int:
        """Of the last turn; a message has a token before and one after it, and one opens the answer."""
        return self.turns * (self.user + 2) + (self.turns - 1) * (self.answer + 2) + 1

    @property
    def context(self) -> int:
        return self.last_prompt + max(self.answer, self.stream) + 64


@dataclass
class Played:
    """What one engine did in one scenario; samples of all rounds together."""

    start_s: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    cached_ttft_s: list[float] = field(default_factory=list)  # of the last turn
    cold_ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)  # of the last turn
    cached_tokens: list[int | None] = field(default_factory=list)  # of those
    answers: list[str] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # between tokens, while long prompts arrive

    def median(self, name: str) -> float | None:
        samples: Sequence[float] = getattr(self, name)
        return statistics.median(samples) if samples else None

    @property
    def gap_p99_s(self) -> float | None:
        return statistics.quantiles(self.gaps_s, n=100)[98] if len(self.gaps_s) > 1 else None

    @property
    def hit_rate(self) -> float | None:
        """Cached share of the last turn's prompt; None: the engine gives no account."""
        if not self.cached_tokens or None in self.cached_tokens:
            return None
        return sum(filter(None, self.cached_tokens)) / sum(self.prompt_tokens)

    def to_json(self) -> dict[str, Any]:
        """All samples, of the many gaps the percentiles; what was said is no figure."""
        found = {name: samples for name, samples in asdict(self).items() if name != "answers"}
        return found | {"gaps_s": statistics.quantiles(self.gaps_s, n=100) if len(self.gaps_s) > 1 else []}


Scenario = Callable[[httpx.AsyncClient, Server, Sizes, str, Played], AsyncIterator[None]]


async def warm_up(http: httpx.AsyncClient, sizes: Sizes, name: str) -> None:
    warm = Conversation(http, f"{name} warm-up")
    for _ in range(2):
        await warm.say(sizes.user, sizes.answer)


async def turns(
    http: httpx.AsyncClient, server: Server, sizes: Sizes, name: str, played: Played
) -> AsyncIterator[None]:
    """All conversations in turn, one request at a time, then prompts of the same length that nothing is known of."""
    talks = [Conversation(http, f"{name} conversation {number}") for number in range(sizes.conversations)]
    for turn in range(sizes.turns):
        for talk in talks:
            reply = await talk.say(sizes.user, sizes.answer)
            played.tpot_s.append(reply.tpot_s)
            played.answers.append(reply.text)
            if turn == sizes.turns - 1:
                played.cached_ttft_s.append(reply.ttft_s)
                played.prompt_tokens.append(reply.prompt_tokens)
                played.cached_tokens.append(reply.cached_tokens)
            yield
    played.memory_bytes.append(server.memory_bytes())
    for number in range(sizes.cold):
        reply = await Conversation(http, f"{name} cold {number}").say(sizes.last_prompt - 3, sizes.answer)
        played.cold_ttft_s.append(reply.ttft_s)
        yield


async def crowd(
    http: httpx.AsyncClient, server: Server, sizes: Sizes, name: str, played: Played
) -> AsyncIterator[None]:
    """As many clients as turns may run at once, two turns each; then long answers while long prompts arrive."""
    clients = server.setting.running

    async def talk(client: str) -> list[Reply]:
        conversation = Conversation(http, client)
        return [await conversation.say(sizes.user, sizes.answer) for _ in range(2)]

    clock = asyncio.get_running_loop().time
    for burst in range(sizes.bursts):
        started = clock()
        told = await asyncio.gather(*(talk(f"{name} burst {burst} client {number}") for number in range(clients)))
        tokens = sum(reply.answer_tokens for replies in told for reply in replies)
        played.tokens_per_s.append(tokens / (clock() - started))
        yield

    # A slot is left for the long prompts: they shall be computed beside the answers, not after them.
    streams = [Conversation(http, f"{name} stream {number}") for number in range(clients - 1)]
    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(stream.say(sizes.user, sizes.stream)) for stream in streams]
        for number in range(sizes.prefills):
            await Conversation(http, f"{name} long {number}").say(sizes.last_prompt - 3, 2)
    played.gaps_s += [gap for answer in answers for gap in answer.result().gaps_s]
    played.memory_bytes.append(server.memory_bytes())
    yield
