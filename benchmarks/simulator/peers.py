"""Other systems' replacement, to compare with: flat caches of chunks in DRAM, and the optimum that knows the future.

All of them see what a prefix cache sees: a prompt's chunks hit up to the first that is missing, and after the turn all
its chunks are cached. Chunks of one prompt are used from the last to the first, so that prefixes are the warmest.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from benchmarks.simulator.traces import Request


class Replacement(Protocol):
    """A cache of chunks of a fixed capacity."""

    def __contains__(self, chunk_id: bytes) -> bool: ...

    def use(self, request: Request) -> None:
        """A turn ended: its chunks are used, and cached."""
        ...


class Flat:
    """A turn's life, for a Replacement."""

    def __init__(self, replacement: Replacement) -> None:
        self._replacement = replacement

    def wait(self, ticket: int, request: Request, now_s: float) -> None:
        pass

    def begin(self, ticket: int, request: Request, now_s: float) -> tuple[int, int]:
        hits = 0
        for chunk_id in request.chain:
            if chunk_id not in self._replacement:
                break
            hits += 1
        return hits, 0

    def end(self, ticket: int, request: Request, now_s: float) -> None:
        self._replacement.use(request)


class Lru:
    """Least recently used, by chunk: what vLLM and SGLang do."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._chunks: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self._chunks

    def use(self, request: Request) -> None:
        for chunk_id in reversed(request.left):
            self._chunks[chunk_id] = None
            self._chunks.move_to_end(chunk_id)
        while len(self._chunks) > self._capacity:
            self._chunks.popitem(last=False)


class TailLru:
    """SGLang's conversation-aware Tail-Optimized LRU.

    A conversation may lose its last `spare` tokens and still get its first token in time, so first those chunks go
    that lie behind history + expected prompt - spare tokens; then the least recently used.
    """

    def __init__(self, capacity: int, chunk_tokens: int, spare_tokens: int) -> None:
        self._capacity, self._chunk_tokens, self._spare_tokens = capacity, chunk_tokens, spare_tokens
        self._needed: OrderedDict[bytes, None] = OrderedDict()
        self._spare: OrderedDict[bytes, None] = OrderedDict()
        self._expected_prompt = 0.0  # tokens that a turn adds, on average
        self._turns = 0

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self._needed or chunk_id in self._spare

    def use(self, request: Request) -> None:
        known = next((i for i, c in enumerate(request.left) if c not in self), len(request.left))
        added = request.left_tokens - min(request.left_tokens, known * self._chunk_tokens)
        self._turns += 1
        self._expected_prompt += (added - self._expected_prompt) / self._turns
        history = request.prompt_tokens + request.answer_tokens
        needed = (history + self._expected_prompt - self._spare_tokens) / self._chunk_tokens
        for i in range(len(request.left) - 1, -1, -1):
            chunk_id = request.left[i]
            self._needed.pop(chunk_id, None)
            self._spare.pop(chunk_id, None)
            (self._needed if i < needed else self._spare)[chunk_id] = None
        while len(self._needed) + len(self._spare) > self._capacity:
            (self._spare or self._needed).popitem(last=False)


class Arc:
    """Adaptive Replacement Cache (Megiddo and Modha, FAST 2003)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._target = 0.0  # of once
        self._once: OrderedDict[bytes, None] = OrderedDict()
        self._often: OrderedDict[bytes, None] = OrderedDict()
        self._ghost_once: OrderedDict[bytes, None] = OrderedDict()
        self._ghost_often: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self._once or chunk_id in self._often

    def use(self, request: Request) -> None:
        for chunk_id in reversed(request.left):
            self._use(chunk_id)

    def _use(self, chunk_id: bytes) -> None:
        once, often, ghost_once, ghost_often = self._once, self._often, self._ghost_once, self._ghost_often
        capacity = self._capacity
        if chunk_id in self:
            once.pop(chunk_id, None)
            often[chunk_id] = None
            often.move_to_end(chunk_id)
            return
        if chunk_id in ghost_once:
            self._target = min(capacity, self._target + max(1.0, len(ghost_often) / len(ghost_once)))
            self._replace(in_ghost_often=False)
            del ghost_once[chunk_id]
            often[chunk_id] = None
            return
        if chunk_id in ghost_often:
            self._target = max(0.0, self._target - max(1.0, len(ghost_once) / len(ghost_often)))
            self._replace(in_ghost_often=True)
            del ghost_often[chunk_id]
            often[chunk_id] = None
            return
        if len(once) + len(ghost_once) >= capacity:
            if len(once) < capacity:
                ghost_once.popitem(last=False)
                self._replace(in_ghost_often=False)
            else:
                once.popitem(last=False)
        elif len(once) + len(often) + len(ghost_once) + len(ghost_often) >= capacity:
            if len(once) + len(often) + len(ghost_once) + len(ghost_often) >= 2 * capacity:
                ghost_often.popitem(last=False)
            self._replace(in_ghost_often=False)
        once[chunk_id] = None

    def _replace(self, *, in_ghost_often: bool) -> None:
        once, often = self._once, self._often
        if len(once) + len(often) < self._capacity:
            return
        if once and (len(once) > self._target or (in_ghost_often and len(once) == self._target) or not often):
            chunk_id, _ = once.popitem(last=False)
            self._ghost_once[chunk_id] = None
        else:
            chunk_id, _ = often.popitem(last=False)
            self._ghost_often[chunk_id] = None


class S3Fifo:
    """Three static queues (Yang et al., SOSP 2023): a small one on probation, a main one, and ghosts."""

    _SMALL_SHARE = 0.1
    _MOST_USES = 3

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small_capacity = max(1, int(capacity * self._SMALL_SHARE))
        self._uses: dict[bytes, int] = {}
        self._small: deque[bytes] = deque()
        self._main: deque[bytes] = deque()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self._uses

    def use(self, request: Request) -> None:
        for chunk_id in reversed(request.left):
            if chunk_id in self._uses:
                self._uses[chunk_id] = min(self._MOST_USES, self._uses[chunk_id] + 1)
                continue
            while len(self._uses) >= self._capacity:
                self._evict()
            if chunk_id in self._ghosts:
                del self._ghosts[chunk_id]
                self._main.append(chunk_id)
            else:
                self._small.append(chunk_id)
            self._uses[chunk_id] = 0

    def _evict(self) -> None:
        if len(self._small) >= self._small_capacity or not self._main:
            while self._small:
                chunk_id = self._small.popleft()
                if self._uses[chunk_id] > 1:
                    self._uses[chunk_id] = 0
                    self._main.append(chunk_id)
                    continue
                del self._uses[chunk_id]
                self._ghosts[chunk_id] = None
                while len(self._ghosts) > self._capacity:
                    self._ghosts.popitem(last=False)
                return
        while self._main:
            chunk_id = self._main.popleft()
            if self._uses[chunk_id]:
                self._uses[chunk_id] -= 1
                self._main.append(chunk_id)
                continue
            del self._uses[chunk_id]
            return


class Belady:
    """The optimum: whatever is looked up last in the future goes first, and what never is again is not kept.

    steps: in which order turns begin (False) and end (True), as Recorder has it.
    """

    def __init__(self, capacity: int, steps: Sequence[tuple[bool, Request]]) -> None:
        self._capacity = capacity
        self._steps = steps
        self._chunks: dict[bytes, int] = {}  # -> place of the next lookup
        self._furthest: list[tuple[int, int, bytes]] = []

    def hits(self) -> Iterator[tuple[Request, int]]:
        """Each turn that begins, and how many leading chunks it finds."""
        following = self._following()
        for (is_end, request), next_places in zip(self._steps, following, strict=True):
            if is_end:
                self._keep(request.left, next_places, found=False)
            else:
                count = next((i for i, c in enumerate(request.chain) if c not in self._chunks), len(request.chain))
                yield request, count
                self._keep(request.chain, next_places, found=True)

    def _following(self) -> list[list[int]]:
        """Per step and chunk, the place of the next lookup, or that behind the last step."""
        next_place: dict[bytes, int] = {}
        never = len(self._steps)
        following: list[list[int]] = []
        for place in range(never - 1, -1, -1):
            is_end, request = self._steps[place]
            chain = request.left if is_end else request.chain
            following.append([next_place.get(chunk_id, never) for chunk_id in chain])
            if not is_end:
                next_place.update(dict.fromkeys(chain, place))
        following.reverse()
        return following

    def _keep(self, chain: Sequence[bytes], next_places: Sequence[int], *, found: bool) -> None:
        """found: only what is there already is kept, with its new place."""
        chunks, never = self._chunks, len(self._steps)
        for depth, (chunk_id, place) in enumerate(zip(chain, next_places, strict=True)):
            if found and chunk_id not in chunks:
                continue
            if place == never:
                chunks.pop(chunk_id, None)
            elif chunks.get(chunk_id) != place:
                chunks[chunk_id] = place
                heapq.heappush(self._furthest, (-place, -depth, chunk_id))
        while len(chunks) > self._capacity:
            minus_place, _, chunk_id = heapq.heappop(self._furthest)
            if chunks.get(chunk_id) == -minus_place:
                del chunks[chunk_id]
