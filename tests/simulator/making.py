"""Small traces, made by hand or at random."""

from __future__ import annotations

from random import Random

from benchmarks.simulator.replay import Machine
from benchmarks.simulator.traces import Request, Trace

AT_ONCE = Machine(1, *[float("inf")] * 4)  # nothing takes time, so turns follow one another
SIZE = 4  # tokens per chunk


def request(letters: str, *, number: int = 0, at_s: float | None = None, after_s: float = 0.0) -> Request:
    """A turn whose chunks have these names, all of them full."""
    chain = tuple(letters[: i + 1].encode() for i in range(len(letters)))
    tokens = SIZE * len(chain)
    return Request(chain, tokens, chain, tokens, len(chain), tokens, 1, "person", number, at_s, after_s)


def sequence(*prompts: str) -> Trace:
    """Single turns, one second apart."""
    return Trace(SIZE, [[request(letters, at_s=float(at))] for at, letters in enumerate(prompts)])


def conversations(random: Random, count: int) -> Trace:
    """Conversations that begin alike now and then, go on at random, and sometimes go back."""
    made = []
    for number in range(count):
        chain = random.choice(["", "x", "xy"])
        turns: list[Request] = []
        for turn in range(random.randint(1, 6)):
            if turn and random.random() < 0.15:
                chain = chain[: random.randint(0, len(chain))]
            chain += "".join(chr(256 + number * 64 + turn * 8 + i) for i in range(random.randint(1, 4)))
            at_s = random.uniform(0, 100) if turn == 0 else None
            turns.append(request(chain, number=turn, at_s=at_s, after_s=random.expovariate(1 / 20)))
        made.append(turns)
    made.sort(key=lambda turns: turns[0].at_s or 0.0)
    return Trace(SIZE, made)
