"""Load or compute: which part of a saved history is loaded, and which is computed again because that is sooner done.

After Cake (Jin et al., ICML 2025): computing begins at the front, since a token's KV depends on all before it, and
what lies behind is loaded meanwhile. We differ: Cake loads whole chunks from the back until the two meet, we load
by layers, so that the rest of the load hides under the new tokens' computation; where the two meet is estimated
from measured rates, and again after every piece that was computed. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from inference.rates import PrefillRate

# Computing takes the place of other jobs, loading hardly does; and within a few milliseconds estimates are noise.
_WORTH_RATIO = 0.97
_WORTH_S = 0.002


@dataclass(frozen=True)
class Choice:
    """Tokens before `start` are computed, those from it on loaded. The estimates are seconds to the first token."""

    start: int
    chosen_s: float
    load_s: float  # had all been loaded
    compute_s: float  # had all been computed


def choose(
    borders: Sequence[int], load_s: Sequence[float], new_tokens: int, layers: int, prefill: PrefillRate
) -> Choice:
    """Where computing is to end and the loaded part to begin.

    borders: the first token of each chunk that is not computed yet, and the history's end, ascending  # [chunks + 1]
    load_s: how long what is left to load of each chunk takes  # [chunks]

    With everything before m computed and the rest loaded meanwhile, the first step behind it begins when the former is
    done and the first layer is there, and its last layer not before the last one is there. With step(new) for what the
    first step takes of the new tokens, and rest(new) for the others:
    T(m) = max(max(compute(..m), load(m..) / layers) + step(new), load(m..) + step(new) / layers) + rest(new).
    """
    first, end = borders[0], borders[-1]
    step_s = prefill.seconds(end, min(new_tokens, prefill.step_tokens))
    rest_s = prefill.seconds(end, new_tokens) - step_s
    to_load_s = sum(load_s)
    estimates = []
    for border, chunk_s in zip(borders[:-1], load_s, strict=True):
        front_s = max(prefill.seconds(first, border - first), to_load_s / layers)
        estimates.append(max(front_s + step_s, to_load_s + step_s / layers) + rest_s)
        to_load_s = max(0.0, to_load_s - chunk_s)
    estimates.append(prefill.seconds(first, end - first + new_tokens))  # all in one go
    worth_s = min(estimates) / _WORTH_RATIO + _WORTH_S
    chosen = next(at for at, estimate in enumerate(estimates) if estimate <= worth_s)
    return Choice(borders[chosen], estimates[chosen], estimates[0], estimates[-1])


def name_of(start: int, end: int) -> Literal["load", "both", "compute"]:
    """What was done with a history of `end` tokens whose first `start` were computed."""
    return "load" if start == 0 else "both" if start < end else "compute"
