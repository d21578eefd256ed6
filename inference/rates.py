"""What loading and computing cost on this machine, estimated from what they did cost. Estimates are pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

_LINK_KEPT = 0.75  # an observation's weight after the next one: a link that changes is known after a few loads
_PREFILL_KEPT = 0.98  # steps are many and much alike; those that tell the two costs apart must not be forgotten soon
_DECODE_KEPT = 0.9
_STALE_S = 60.0  # a link that nothing was loaded over for so long is tried again
_TYPICAL_PAST = 1000.0  # tokens: where one more token and its attention are taken to cost about the same


@dataclass(frozen=True)
class LinkRate:
    """Bytes per second of loads: all bytes over all seconds, older ones counting less."""

    weighted_bytes: float = 0.0
    weighted_s: float = 0.0
    measured_s: float = 0.0  # monotonic, of the last observation

    def observed(self, nbytes: int, seconds: float, now_s: float) -> LinkRate:
        return LinkRate(
            self.weighted_bytes * _LINK_KEPT + nbytes, self.weighted_s * _LINK_KEPT + max(seconds, 1e-9), now_s
        )

    @property
    def bytes_per_s(self) -> float:
        """0: not measured."""
        return self.weighted_bytes / self.weighted_s if self.weighted_s else 0.0

    def is_fresh(self, now_s: float) -> bool:
        return self.weighted_s > 0 and now_s - self.measured_s <= _STALE_S


@dataclass(frozen=True)
class PrefillRate:
    """Seconds of computing new tokens: token_s for each of them, pair_s for each earlier token that one attends to, and
    step_s for each step that it takes, whose weights are read once.

    step_s is what a step of decoding takes; the others are least squares over the steps of prefill. Older ones count
    less. The sums are of tokens (n), pairs (p) and seconds (s).
    """

    token_s: float = 0.0  # 0, as pair_s: not measured
    pair_s: float = 0.0
    step_s: float = 0.0
    step_tokens: int = 512
    nn: float = 0.0
    np: float = 0.0
    pp: float = 0.0
    ns: float = 0.0
    ps: float = 0.0

    @property
    def is_known(self) -> bool:
        return self.token_s > 0 or self.pair_s > 0

    def seconds(self, start: int, tokens: int) -> float:
        """To compute `tokens` tokens from position `start` on."""
        steps = -(-tokens // self.step_tokens)
        return self.token_s * tokens + self.pair_s * pairs(start, tokens) + self.step_s * steps

    def prefilled(self, tokens: int, token_pairs: float, seconds: float) -> PrefillRate:
        """After a step with prefill."""
        seconds -= min(self.step_s, seconds / 2)
        seen = (
            tokens * tokens,
            tokens * token_pairs,
            token_pairs * token_pairs,
            tokens * seconds,
            token_pairs * seconds,
        )
        sums = (self.nn, self.np, self.pp, self.ns, self.ps)
        nn, np, pp, ns, ps = (old * _PREFILL_KEPT + new for old, new in zip(sums, seen, strict=True))
        token_s, pair_s = _solve(nn, np, pp, ns, ps)
        return PrefillRate(token_s, pair_s, self.step_s, self.step_tokens, nn, np, pp, ns, ps)

    def decoded(self, seconds: float) -> PrefillRate:
        """After a step of decoding alone."""
        return replace(
            self, step_s=self.step_s * _DECODE_KEPT + seconds * (1 - _DECODE_KEPT) if self.step_s else seconds
        )


def pairs(start: int, tokens: int) -> float:
    """How many (token, earlier token) pairs attention has for `tokens` tokens from position `start` on."""
    return tokens * (start + tokens / 2)


def _solve(nn: float, np: float, pp: float, ns: float, ps: float) -> tuple[float, float]:
    """token_s and pair_s, neither negative.

    Steps that are all alike do not tell the two apart; a little of both is held against large values then.
    """
    held = 1e-3 * (nn + pp / _TYPICAL_PAST**2)
    nn, pp = nn + held, pp + held * _TYPICAL_PAST**2
    determinant = nn * pp - np * np
    token_s, pair_s = (ns * pp - ps * np) / determinant, (ps * nn - ns * np) / determinant
    if token_s < 0:
        return 0.0, ps / pp
    if pair_s < 0:
        return ns / nn, 0.0
    return token_s, pair_s


@dataclass
class Rates:
    """All estimates of one process. Loads are observed by the loader's thread, steps by the engine's; each estimate is
    a value that its one writer replaces, so reading needs no lock."""

    link: Mapping[str, LinkRate] = field(default_factory=lambda: {"dram": LinkRate(), "ssd": LinkRate()})  # by tier
    prefill: PrefillRate = PrefillRate()

    def loaded(self, tier: str, nbytes: int, seconds: float, now_s: float) -> None:
        self.link = {**self.link, tier: self.link[tier].observed(nbytes, seconds, now_s)}

    def prefilled(self, tokens: int, token_pairs: float, seconds: float) -> None:
        self.prefill = self.prefill.prefilled(tokens, token_pairs, seconds)

    def decoded(self, seconds: float) -> None:
        self.prefill = self.prefill.decoded(seconds)

    def load_s(self, tier: str, nbytes: int, now_s: float) -> float | None:
        """Seconds to load so many bytes from a tier; None: not known, or not any more."""
        link = self.link[tier]
        return nbytes / link.bytes_per_s if link.is_fresh(now_s) else None
