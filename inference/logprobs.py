"""Log probabilities of sampled tokens, as the model has them."""

from __future__ import annotations

import torch

from inference.vocabulary import Vocabulary
from protocol.messages import SampledLogprobs, TokenLogprob

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot say; as in OpenAI's answers and vLLM's


class Logprobs:
    """Reports of one job: each sampled token and its `top` best alternatives."""

    def __init__(self, vocabulary: Vocabulary, top: int) -> None:
        self._vocabulary = vocabulary
        self._top = top

    def of(self, logits: torch.Tensor, token: int) -> SampledLogprobs:
        """What log_softmax says of `token` and of the best ones, best first.  # logits [vocabulary] float32"""
        logprobs = torch.log_softmax(logits, dim=-1)
        best = torch.topk(logprobs, min(self._top, len(logprobs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return SampledLogprobs(
            self._entry(token, float(logprobs[token])), tuple(self._entry(other, value) for other, value in pairs)
        )

    def _entry(self, token: int, logprob: float) -> TokenLogprob:
        found = self._vocabulary.bytes_of(token)
        return TokenLogprob(found, max(logprob, _LEAST), "" if found else self._vocabulary.name_of(token))
