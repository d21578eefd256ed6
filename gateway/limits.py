"""What a tenant may use: buckets that fill with time. Pure: the time is an argument, in monotonic seconds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.errors import CapacityError, ConfigError

_MOST_NAMESPACES = 1024
FIRST_PRIORITY, LAST_PRIORITY = -100, 100


class RateLimited(CapacityError):
    """A tenant has used what it may use in a minute; retry_after_s says when there is enough again."""

    code = "rate_limit_exceeded"
    http_status = 429


@dataclass(frozen=True)
class Limits:
    """None: no limit. Raises ConfigError, naming the field."""

    requests_per_minute: int | None = None  # turns: each answer of a request with n > 1 counts
    tokens_per_minute: int | None = None  # of prompts, cached ones too, and answers
    stored_bytes: int | None = None  # of KV in DRAM and on SSD; beyond it, turns run and store nothing
    priority: int = 0  # the first that may be asked for

    @property
    def usual_priority(self) -> int:
        """Of a request that asks for none."""
        return max(0, self.priority)

    @property
    def is_limited(self) -> bool:
        return (self.requests_per_minute, self.tokens_per_minute, self.stored_bytes) != (None, None, None)

    def __post_init__(self) -> None:
        for key in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key} must be at least 1, not {value}", param=key)
        if self.stored_bytes is not None and self.stored_bytes < 0:
            raise ConfigError(f"stored_bytes must not be negative: {self.stored_bytes}", param="stored_bytes")
        if not FIRST_PRIORITY <= self.priority <= LAST_PRIORITY:
            raise ConfigError(
                f"priority must be from {FIRST_PRIORITY} to {LAST_PRIORITY}, not {self.priority}", param="priority"
            )


class Bucket:
    """Holds what is used in a minute, full at first. A debt, of use that was more than foreseen, is waited for."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._held = float(per_minute)
        self._then_s = now_s

    def held(self, now_s: float) -> float:
        self._held = min(self._per_minute, self._held + (now_s - self._then_s) * self._per_minute / 60.0)
        self._then_s = now_s
        return self._held

    def wait_s(self, amount: float, now_s: float) -> float:
        """When `amount` can be taken. More than a minute's worth can be taken from a full bucket."""
        lacking = min(amount, self._per_minute) - self.held(now_s)
        return max(0.0, lacking * 60.0 / self._per_minute)

    def take(self, amount: float, now_s: float) -> None:
        """Also more than there is; a negative amount is given back."""
        self._held = min(self._per_minute, self.held(now_s) - amount)


class Meter:
    """What one tenant uses. Changed by one loop."""

    def __init__(self, limits: Limits, now_s: float, name: str = "") -> None:
        self.name = name  # for people
        # Of its KV: one for each cache_salt. Of more than can be counted the first are.
        self.namespaces: set[bytes] = set()
        self.requests = self.prompt_tokens = self.cached_tokens = self.completion_tokens = self.refused = 0
        self.stored_bytes = 0  # as the store told last
        self.limit(limits, now_s)

    def limit(self, limits: Limits, now_s: float) -> None:
        """These limits from now on, and another full minute of them."""
        self.limits = limits
        self._requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute, now_s)
        self._tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute, now_s)

    @property
    def may_store(self) -> bool:
        return self.limits.stored_bytes is None or self.stored_bytes < self.limits.stored_bytes

    def uses(self, namespace: bytes) -> None:
        if len(self.namespaces) < _MOST_NAMESPACES:
            self.namespaces.add(namespace)

    def admit(self, tokens: int, now_s: float) -> None:
        """Take a turn whose prompt has about so many tokens in. Raises RateLimited; then nothing was changed."""
        for bucket, amount, limit, what in (
            (self._requests, 1, self.limits.requests_per_minute, "requests"),
            (self._tokens, tokens, self.limits.tokens_per_minute, "tokens"),
        ):
            if bucket is not None and (wait_s := bucket.wait_s(amount, now_s)) > 0:
                self.refused += 1
                error = RateLimited(f"the limit of {limit} {what} per minute is reached; try again in {wait_s:.1f} s")
                error.retry_after_s = wait_s
                raise error
        self.requests += 1
        for bucket, amount in ((self._requests, 1), (self._tokens, tokens)):
            if bucket is not None:
                bucket.take(amount, now_s)

    def settle(self, foreseen: int, prompt: int, cached: int, completion: int, now_s: float) -> None:
        """The turn that was let in for `foreseen` tokens is over, and took so many."""
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.completion_tokens += completion
        if self._tokens is not None:
            self._tokens.take(prompt + completion - foreseen, now_s)

    def take_back(self, foreseen: int, now_s: float) -> None:
        """The turn was not begun after all."""
        self.requests -= 1
        for bucket, amount in ((self._requests, 1), (self._tokens, foreseen)):
            if bucket is not None:
                bucket.take(-amount, now_s)


class Meters:
    """By tenant. Those without limits are forgotten when there are too many: without API keys anybody may make some."""

    def __init__(self, unlimited: int = 4096) -> None:
        self._unlimited = unlimited
        self._limited: dict[bytes, Meter] = {}
        self._others: OrderedDict[bytes, Meter] = OrderedDict()

    def of(self, tenant: bytes, limits: Limits, now_s: float, name: str = "") -> Meter:
        """limits: of a meter that is new, or has none yet."""
        if tenant in self._limited:
            return self._limited[tenant]
        meter = self._others.pop(tenant, None) or Meter(limits, now_s, name)
        if limits.is_limited:
            self._limited[tenant] = meter
            return meter
        self._others[tenant] = meter
        if len(self._others) > self._unlimited:
            self._others.popitem(last=False)
        return meter

    def __iter__(self) -> Iterator[tuple[bytes, Meter]]:
        yield from self._limited.items()
        yield from self._others.items()
