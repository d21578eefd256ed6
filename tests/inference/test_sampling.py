"""Sampling: seeded draws repeat, resuming continues them, and the distribution is the model's."""

from __future__ import annotations

import torch

from inference.sampling import Sampler
from protocol.messages import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])


def draws(sampling: Sampling, count: int, skip: int = 0) -> list[int]:
    sampler = Sampler(sampling)
    sampler.skip(skip)
    return [sampler.sample(LOGITS) for _ in range(count)]


def test_greedy_takes_the_best() -> None:
    assert draws(Sampling(temperature=0.0), 3) == [0, 0, 0]


def test_equal_seeds_give_equal_draws() -> None:
    assert draws(Sampling(seed=7), 50) == draws(Sampling(seed=7), 50)
    assert draws(Sampling(seed=7), 50) != draws(Sampling(seed=8), 50)
    assert draws(Sampling(seed=-1), 5) == draws(Sampling(seed=-1), 5)


def test_resuming_goes_on_where_it_stopped() -> None:
    assert draws(Sampling(seed=3), 20)[8:] == draws(Sampling(seed=3), 12, skip=8)


def test_frequencies_are_the_softmax() -> None:
    count = 20_000
    found = torch.bincount(torch.tensor(draws(Sampling(seed=1, temperature=0.7), count)), minlength=5) / count
    assert torch.allclose(found, torch.softmax(LOGITS / 0.7, 0), atol=0.015)


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    probabilities = torch.softmax(LOGITS, 0)
    both = float(probabilities[:2].sum())
    assert set(draws(Sampling(seed=1, top_p=both - 0.01), 500)) == {0, 1}
    assert set(draws(Sampling(seed=1, top_p=0.0), 50)) == {0}
