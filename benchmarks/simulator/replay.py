"""The replay: an event loop over simulated time, with the gateway's queue in front of a store.

Service is modelled, decisions are not: a turn waits in the real queue until a place is free, its history is looked up
in the store, what is only on SSD is read while the turn waits for it, the rest is computed.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.simulator.traces import Request, Trace
from gateway.queue import TurnQueue

_LAST_TURN = 20  # turns from this one on are counted together


@dataclass(frozen=True, slots=True)
class Machine:
    """What serves. Rates are tokens per second; infinity where that takes no time."""

    places: int = 16  # turns that run at once
    prefill_rate: float = 20_000.0
    decode_rate: float = 50.0  # per running turn
    ssd_read_rate: float = 40_000.0
    ssd_write_rate: float = 40_000.0


@dataclass(slots=True)
class Tally:
    """What came of a replay, in tokens unless named otherwise."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    hit_tokens_dram: int = 0  # in DRAM when the turn began
    hit_tokens_ssd: int = 0  # not yet in DRAM when the turn began, so it was read while the turn waited: late
    hit_requests: int = 0  # requests that found anything
    ready_tokens: int = 0  # brought up for a waiting turn, and there when it began
    useless_tokens: int = 0  # brought up and let go unused
    read_tokens: int = 0  # SSD to DRAM
    written_tokens: int = 0  # DRAM to SSD
    lost_tokens: int = 0  # found no room to be stored
    evicted_dram_tokens: int = 0
    evicted_ssd_tokens: int = 0
    most_waiting: int = 0  # turns
    queue_wait_s: float = 0.0
    prefill_s: float = 0.0  # loading included
    by_turn: dict[int, list[int]] = field(default_factory=dict)  # turn number, from 0 -> [prompt, hit]
    simulated_s: float = 0.0
    wall_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / max(1, self.prompt_tokens)

    def reset(self) -> None:
        """Begin anew."""
        self.__init__()  # type: ignore[misc]

    def count(self, request: Request, dram_chunks: int, ssd_chunks: int, size: int) -> tuple[int, int]:
        """A request found so many leading chunks of `size` tokens. Returns its hits by tier."""
        hit = min((dram_chunks + ssd_chunks) * size, request.chain_tokens)
        hit_dram = min(dram_chunks * size, request.chain_tokens)
        self.requests += 1
        self.prompt_tokens += request.prompt_tokens
        self.hit_tokens += hit
        self.hit_tokens_dram += hit_dram
        self.hit_tokens_ssd += hit - hit_dram
        self.hit_requests += hit > 0
        of_turn = self.by_turn.setdefault(min(request.number, _LAST_TURN), [0, 0])
        of_turn[0] += request.prompt_tokens
        of_turn[1] += hit
        return hit_dram, hit - hit_dram


Schedule = Callable[[float, Callable[[float], None]], None]  # at a time, do something


class Cache(Protocol):
    """What the replay asks of a store: Tiers, or another system's cache."""

    def wait(self, ticket: int, request: Request, now_s: float) -> None: ...
    def begin(self, ticket: int, request: Request, now_s: float) -> tuple[int, int]:
        """The turn begins. Leading chunks found in DRAM, and those that follow and are on SSD."""
        ...

    def end(self, ticket: int, request: Request, now_s: float) -> None: ...


def replay(
    trace: Trace,
    make_cache: Callable[[Tally, Schedule], Cache],
    machine: Machine,
    progress: Callable[[int], None] = lambda done: None,
    warm_up: int = 0,
    count: int | None = None,
) -> Tally:
    """Run a trace through a cache. Equal arguments give equal results, wall_s apart.

    progress: told how many requests have begun. warm_up: so many are served before counting begins. count: stops when
    so many were counted.
    """
    started = time.perf_counter()
    tally = Tally()
    events: list[tuple[float, int, Callable[[float], None]]] = []
    order = itertools.count()

    def at(when_s: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (when_s, next(order), what))

    cache = make_cache(tally, at)
    queue = TurnQueue(limit=1 << 30)
    turns: dict[bytes, tuple[int, Request, int, float]] = {}  # id -> conversation, request, ticket, arrival
    tickets = itertools.count()
    places = [0] * len(trace.conversations)  # the turn that each is at
    running = begun = 0
    last = None if count is None else warm_up + count

    def arrive(conversation: int, number: int, now_s: float) -> None:
        request = trace.conversations[conversation][number]
        ticket = next(tickets)
        turn_id = ticket.to_bytes(8, "big")
        turns[turn_id] = (conversation, request, ticket, now_s)
        queue.enter(turn_id, machine.places)
        queue.wait(turn_id)
        cache.wait(ticket, request, now_s)
        dispatch(now_s)
        tally.most_waiting = max(tally.most_waiting, len(turns) - running)

    def dispatch(now_s: float) -> None:
        nonlocal running, begun
        while running < machine.places and begun != last and (turn_id := queue.pop(machine.places)) is not None:
            running += 1
            begun += 1
            _, request, ticket, arrived_s = turns[turn_id]
            dram, ssd = cache.begin(ticket, request, now_s)
            hit_dram, hit_ssd = tally.count(request, dram, ssd, trace.chunk_tokens)
            prefill_s = max(
                hit_ssd / machine.ssd_read_rate, (request.prompt_tokens - hit_dram - hit_ssd) / machine.prefill_rate
            )
            tally.queue_wait_s += now_s - arrived_s
            tally.prefill_s += prefill_s
            done_s = now_s + prefill_s + request.answer_tokens / machine.decode_rate
            at(done_s, lambda now_s, turn_id=turn_id: finish(turn_id, now_s))  # type: ignore[misc]
            progress(begun)
            if begun == warm_up:
                tally.reset()

    def finish(turn_id: bytes, now_s: float) -> None:
        nonlocal running
        conversation, request, ticket, _ = turns.pop(turn_id)
        cache.end(ticket, request, now_s)
        queue.leave(turn_id)
        running -= 1
        following = places[conversation] = places[conversation] + 1
        requests = trace.conversations[conversation]
        if following < len(requests):
            at(now_s + requests[following].after_s, lambda now_s: arrive(conversation, following, now_s))
        dispatch(now_s)

    for conversation, requests in enumerate(trace.conversations):
        first_s = requests[0].at_s
        assert first_s is not None
        at(first_s, lambda now_s, conversation=conversation: arrive(conversation, 0, now_s))  # type: ignore[misc]
    while events and (last is None or begun < last):
        now_s, _, what = heapq.heappop(events)
        tally.simulated_s = now_s
        what(now_s)
    tally.wall_s = time.perf_counter() - started
    return tally


class Recorder:
    """A cache that notes in which order turns begin and end."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.steps: list[tuple[bool, Request]] = []  # whether it ends, and which

    def wait(self, ticket: int, request: Request, now_s: float) -> None:
        self.cache.wait(ticket, request, now_s)

    def begin(self, ticket: int, request: Request, now_s: float) -> tuple[int, int]:
        self.steps.append((False, request))
        return self.cache.begin(ticket, request, now_s)

    def end(self, ticket: int, request: Request, now_s: float) -> None:
        self.cache.end(ticket, request, now_s)
        self.steps.append((True, request))
