"""From logits to a token.

What a request asks for acts in vLLM's order (v1/sample/sampler.py), each as vLLM and transformers define it:

1. guidance: tokens that the schema does not allow are out
2. logit_bias is added
3. repetition_penalty, on every token of the prompt or the answer: positive logits are divided by it, others multiplied;
   then the answer's tokens lose frequency_penalty times their count, and presence_penalty once
4. temperature 0: the best token. Otherwise logits are divided by it, and
5. min_p drops what is less probable than so much of the best; top_k keeps the k best (and what equals the k-th);
   top_p keeps the smallest set that holds so much of the rest
6. a token is drawn from what is left

The draw is the Gumbel-max trick in its exponential form: the token with the largest probability / noise. Every token id
has noise of its own, Exp(1) from a counter-based generator (Philox): its key is the seed, its counter the token's place
in the answer. So a draw depends on nothing but the seed, the place and the probabilities. An answer that was broken off
goes on with the same draws; and rounding, which differs with what else is in the batch, changes a token only where the
two largest ratios are equal to that precision.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch

from inference.guided import Guide
from protocol.ids import TokenArray
from protocol.messages import Sampling

_GREEDY_BELOW = 1e-5  # as in vLLM: dividing by less overflows
_NUCLEUS = 1024  # so many tokens nearly always hold top_p; selecting them is far cheaper than sorting a vocabulary
_LEAST_NOISE = np.finfo(np.float64).tiny  # for the one exponential in 2**64 that is zero
_MASK64 = 2**64 - 1


class Sampler:
    """Chooses the tokens of one job. Owned by one thread."""

    def __init__(
        self, sampling: Sampling, vocabulary: int, prompt: TokenArray | Sequence[int] = (), guide: Guide | None = None
    ) -> None:
        """vocabulary: how many logits there are. guide: for this answer alone, at its beginning.

        Raises IndexError: logit_bias names a token outside the vocabulary.
        """
        self._sampling = sampling
        self._is_greedy = sampling.temperature < _GREEDY_BELOW
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed & _MASK64
        self._position = 0
        self._guide = guide
        self._bias: torch.Tensor | None = None  # [vocabulary] float32
        self._seen: torch.Tensor | None = None  # [vocabulary] bool: in the prompt or the answer
        self._counts: torch.Tensor | None = None  # [vocabulary] float32: in the answer
        if sampling.logit_bias:
            tokens, biases = zip(*sampling.logit_bias, strict=True)
            self._bias = torch.zeros(vocabulary).index_add_(0, torch.tensor(tokens), torch.tensor(biases))
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[torch.from_numpy(np.asarray(prompt, dtype=np.int64))] = True
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._counts = torch.zeros(vocabulary)
        self._is_plain = guide is None and self._bias is None and self._seen is None and self._counts is None

    @property
    def is_argmax(self) -> bool:
        """The next token is the one with the largest logit, and nothing else matters."""
        return self._is_greedy and self._is_plain

    @property
    def is_over(self) -> bool:
        """The schema is fulfilled and allows nothing more."""
        return self._guide is not None and self._guide.is_over

    def accept(self, token: int) -> None:
        """`token` is the answer's next one. For tokens that `sample` did not choose: of an earlier attempt.

        Raises InternalError: the schema does not allow it.
        """
        self._position += 1
        if self._is_plain:
            return
        if self._guide is not None:
            self._guide.accept(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def sample(self, logits: torch.Tensor) -> int:
        """Choose the answer's next token, and accept it. Leaves `logits` as they are.  # [vocabulary] float32

        Raises InvalidRequest: the schema has become too complex to follow.
        """
        if not self._is_plain:
            logits = self._adjust(logits.to("cpu", copy=True))
        token = int(torch.argmax(logits)) if self._is_greedy else self._draw(logits.cpu())
        self.accept(token)
        return token

    def _adjust(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self._sampling
        if self._guide is not None:
            logits.masked_fill_(~self._guide.allowed(len(logits)), -torch.inf)
        if self._bias is not None:
            logits += self._bias
        if self._seen is not None:
            penalty = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._counts is not None:
            logits -= sampling.frequency_penalty * self._counts
            logits -= sampling.presence_penalty * (self._counts > 0)
        return logits

    def _draw(self, logits: torch.Tensor) -> int:
        probabilities = self._kept(torch.softmax(logits / self._sampling.temperature, dim=-1))
        # The place in the answer is the counter's highest word: no draw runs into the numbers of the next.
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=self._position << 192))
        noise = generator.standard_exponential(len(probabilities))
        np.maximum(noise, _LEAST_NOISE, out=noise)
        return int(np.argmax(np.divide(probabilities.numpy(), noise, out=noise)))

    def _kept(self, probabilities: torch.Tensor) -> torch.Tensor:
        """`probabilities`, zero where min_p, top_k or top_p drop them. They need not add up to one."""
        sampling = self._sampling
        if sampling.min_p > 0:
            probabilities = torch.where(
                probabilities < sampling.min_p * probabilities.max(), torch.zeros(()), probabilities
            )
        if 0 < sampling.top_k < len(probabilities):
            least = torch.topk(probabilities, sampling.top_k).values[-1]
            probabilities = torch.where(probabilities < least, torch.zeros(()), probabilities)
        if sampling.top_p < 1:
            least = _least_in_nucleus(probabilities, sampling.top_p)
            probabilities = torch.where(probabilities < least, torch.zeros(()), probabilities)
        return probabilities


def _least_in_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability in the smallest set that holds top_p of all. The best one is always in it."""
    wanted = top_p * float(probabilities.sum(dtype=torch.float64))
    for count in (min(_NUCLEUS, len(probabilities)), len(probabilities)):
        best = torch.topk(probabilities, count).values
        cumulative = torch.cumsum(best, 0, dtype=torch.float64)
        if float(cumulative[-1]) >= wanted:
            break
    kept = int((cumulative - best < wanted).sum())
    return best[max(1, kept) - 1]
