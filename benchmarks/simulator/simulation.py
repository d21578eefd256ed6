"""A trace, a store and a policy by name; what came of it, and what one who knows the future had made of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.simulator.names import PolicyName
from benchmarks.simulator.peers import Arc, Belady, Flat, Lru, Replacement, S3Fifo, TailLru
from benchmarks.simulator.replay import Cache, Machine, Recorder, Schedule, Tally, replay
from benchmarks.simulator.tiers import Tiers
from benchmarks.simulator.traces import Trace
from kvdaemon.placement.policies import POLICIES
from kvdaemon.placement.policy import Policy

_TAIL_LRU_SPARE_TOKENS = 4096
# Other systems', of capacity in chunks and tokens per chunk; they know one tier.
PEERS: dict[PolicyName, Callable[[int, int], Replacement]] = {
    "plain-lru": lambda chunks, size: Lru(chunks),
    "arc": lambda chunks, size: Arc(chunks),
    "s3-fifo": lambda chunks, size: S3Fifo(chunks),
    "tail-lru": lambda chunks, size: TailLru(chunks, size, _TAIL_LRU_SPARE_TOKENS),
}
BELADY: PolicyName = "belady"
BYTES_PER_TOKEN = 131_072  # Llama-3.1-8B: 32 layers, 8 KV heads of 128, 16 bits


@dataclass(frozen=True, slots=True)
class Simulation:
    """One replay. Sizes in tokens, rounded down to chunks.

    Raises ValueError: a tier of less than one chunk, an SSD under a policy without one, a warm-up that leaves nothing.
    """

    trace: Trace
    policy: PolicyName
    dram_tokens: int
    ssd_tokens: int = 0
    machine: Machine = field(default_factory=Machine)
    warm_up: int = 0  # requests before counting begins
    count: int | None = None  # requests to count; None: all
    make_policy: Callable[[], Policy] | None = None  # instead of a new one of that name

    def __post_init__(self) -> None:
        if self.warm_up >= self.trace.requests:
            raise ValueError(f"{self.warm_up} requests of warm-up leave none of {self.trace.requests} to count")
        if self.dram_chunks < 1:
            raise ValueError(f"a DRAM tier of {self.dram_tokens} tokens holds no chunk of {self.trace.chunk_tokens}")
        if self.ssd_tokens and self.ssd_chunks < 1:
            raise ValueError(f"an SSD tier of {self.ssd_tokens} tokens holds no chunk of {self.trace.chunk_tokens}")
        if self.ssd_tokens and self.policy in PEERS:
            raise ValueError(f"{self.policy} is a policy of one tier: it takes no SSD tokens")

    @property
    def dram_chunks(self) -> int:
        return self.dram_tokens // self.trace.chunk_tokens

    @property
    def ssd_chunks(self) -> int:
        return self.ssd_tokens // self.trace.chunk_tokens

    def run(self, progress: Callable[[int], None] = lambda done: None, *, limit: bool = True) -> tuple[Tally, Tally]:
        """What the policy made of the trace, and what Belady's had made of the same turns in the same order.

        Belady's is one tier of both sizes, in which everything is in time, so all its hits count as DRAM; nothing is
        said of what it moves. limit: without it that tally is empty. Where the policy is belady itself, both are the
        same, and the order is that under plain LRU.
        """
        recorders: list[Recorder] = []

        def make(tally: Tally, at: Schedule) -> Cache:
            recorders.append(Recorder(self._cache(tally, at)))
            return recorders[0] if limit or self.policy == BELADY else recorders[0].cache

        tally = replay(self.trace, make, self.machine, progress, self.warm_up, self.count)
        if not (limit or self.policy == BELADY):
            return tally, Tally()
        best = Tally(simulated_s=tally.simulated_s)
        hits = Belady(self.dram_chunks + self.ssd_chunks, recorders[0].steps).hits()
        for request, found in itertools.islice(hits, self.warm_up, None):
            best.count(request, found, 0, self.trace.chunk_tokens)
        if self.policy == BELADY:
            best.wall_s = tally.wall_s
            return best, best
        return tally, best

    def _cache(self, tally: Tally, at: Schedule) -> Cache:
        size = self.trace.chunk_tokens
        if self.policy in PEERS:
            return Flat(PEERS[self.policy](self.dram_chunks, size))
        if self.policy == BELADY:
            return Flat(Lru(self.dram_chunks + self.ssd_chunks))
        make_policy = self.make_policy or POLICIES[self.policy]
        return Tiers(make_policy(), self.dram_chunks, self.ssd_chunks, size, self.machine, tally, at)


def as_json(tally: Tally, bytes_per_token: int = BYTES_PER_TOKEN) -> dict[str, Any]:
    """The figures of a replay, with the rates and sizes that people look at."""
    return {
        "requests": tally.requests,
        "hit_requests": tally.hit_requests,
        "prompt_tokens": tally.prompt_tokens,
        "hit_tokens": tally.hit_tokens,
        "hit_tokens_dram": tally.hit_tokens_dram,
        "hit_tokens_ssd": tally.hit_tokens_ssd,
        "hit_rate": tally.hit_rate,
        "hit_rate_by_turn": [
            {"turn": turn + 1, "prompt_tokens": prompt, "hit_tokens": hit, "hit_rate": hit / max(1, prompt)}
            for turn, (prompt, hit) in sorted(tally.by_turn.items())
        ],
        # Of what was on SSD: there before its turn began, not there yet, and fetched in vain.
        "ready_tokens": tally.ready_tokens,
        "late_tokens": tally.hit_tokens_ssd,
        "useless_tokens": tally.useless_tokens,
        "bytes_read": tally.read_tokens * bytes_per_token,
        "bytes_written": tally.written_tokens * bytes_per_token,
        "evicted_tokens_dram": tally.evicted_dram_tokens,
        "evicted_tokens_ssd": tally.evicted_ssd_tokens,
        "lost_tokens": tally.lost_tokens,
        "most_waiting": tally.most_waiting,
        "queue_wait_s": tally.queue_wait_s / max(1, tally.requests),
        "prefill_s": tally.prefill_s / max(1, tally.requests),
        "simulated_s": tally.simulated_s,
        "wall_s": tally.wall_s,
    }
