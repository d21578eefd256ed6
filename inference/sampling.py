"""From logits to a token."""

from __future__ import annotations

import torch

from protocol.messages import Sampling


class Sampler:
    """Draws the tokens of one job. Equal seeds give equal draws, whatever else is in the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator: torch.Generator | None = None
        if self._temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed & 0xFFFF_FFFF_FFFF_FFFF)

    def skip(self, tokens: int) -> None:
        """Go on where an earlier attempt of the same job stopped, `tokens` draws later."""
        if self._generator is not None:
            for _ in range(tokens):
                torch.rand((), generator=self._generator)

    def sample(self, logits: torch.Tensor) -> int:
        """One token id.  # logits [vocabulary] float32"""
        if self._generator is None:
            return int(torch.argmax(logits))
        probabilities = torch.softmax(logits / self._temperature, dim=-1)
        ordered, ids = torch.sort(probabilities, descending=True, stable=True)
        cumulative = torch.cumsum(ordered, dim=0)
        # The smallest set whose probability reaches top_p; the most probable token is always in it.
        kept = max(1, int((cumulative - ordered < self._top_p).sum())) if self._top_p < 1 else len(ordered)
        draw = float(torch.rand((), generator=self._generator)) * float(cumulative[kept - 1])
        index = int(torch.searchsorted(cumulative[:kept], draw, right=True))
        return int(ids[min(index, kept - 1)])
