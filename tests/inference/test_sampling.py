"""Sampling: every field against a plain reading of what it means, and draws that depend on nothing but the seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from inference.sampling import Sampler, _least_in_nucleus
from protocol.messages import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])
ANY_LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12)


def draws(sampling: Sampling, count: int, skip: int = 0, logits: torch.Tensor = LOGITS) -> list[int]:
    """Tokens at the places `skip` and on of answers that begin alike."""
    sampler = Sampler(sampling, len(logits))
    for _ in range(skip):
        sampler.accept(0)
    return [sampler.sample(logits) for _ in range(count)]


def chi_square(found: Sequence[int], expected: Sequence[float]) -> float:
    """Pearson's statistic, of tokens that are expected at all; the others must not be found."""
    counts = np.bincount(found, minlength=len(expected))
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    pairs = [(count, p * len(found)) for count, p in zip(counts, expected, strict=True) if p > 0]
    return sum((count - mean) ** 2 / mean for count, mean in pairs)


def naive(logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """The distribution of the next token, by loops over the definitions in float64."""
    scores = list(logits)
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in {*prompt, *answer}:
        p = sampling.repetition_penalty
        scores[token] = scores[token] / p if scores[token] > 0 else scores[token] * p
    for token in answer:
        scores[token] -= sampling.frequency_penalty
    for token in set(answer):
        scores[token] -= sampling.presence_penalty
    if sampling.temperature == 0:
        return [float(i == int(np.argmax(np.float32(scores)))) for i in range(len(scores))]
    top = max(scores)
    weights = [math.exp((s - top) / sampling.temperature) for s in scores]
    weights = [w if w >= sampling.min_p * max(weights) else 0.0 for w in weights]
    if sampling.top_k:
        least = sorted(weights, reverse=True)[: sampling.top_k][-1]
        weights = [w if w >= least else 0.0 for w in weights]
    held, kept = 0.0, []
    for weight in sorted(weights, reverse=True):
        if held < sampling.top_p * sum(weights) or not kept:
            kept.append(weight)
        held += weight
    weights = [w if w >= kept[-1] else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


def test_greedy_takes_the_best() -> None:
    assert draws(Sampling(temperature=0.0), 3) == [0, 0, 0]
    assert draws(Sampling(temperature=1e-9), 3) == [0, 0, 0]


def test_equal_seeds_give_equal_draws() -> None:
    assert draws(Sampling(seed=7), 50) == draws(Sampling(seed=7), 50)
    assert draws(Sampling(seed=7), 50) != draws(Sampling(seed=8), 50)
    assert draws(Sampling(seed=-1), 5) == draws(Sampling(seed=-1), 5)
    assert draws(Sampling(), 50) != draws(Sampling(), 50)


def test_resuming_goes_on_where_it_stopped() -> None:
    assert draws(Sampling(seed=3), 20)[8:] == draws(Sampling(seed=3), 12, skip=8)


def test_rounding_changes_no_draw() -> None:
    """Logits that differ as sums in another order do draw the same, where the draws lie so close together or not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, generator=generator) * 2
    other = logits + 1e-6 * torch.randn(2000, generator=generator)
    sampling = Sampling(seed=5, top_p=0.9)
    assert draws(sampling, 500, logits=logits) == draws(sampling, 500, logits=other)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.95, "min_p": 0.02},
        {"logit_bias": ((4, 6.5), (0, -100.0), (1, -0.5))},
    ],
    ids=str,
)
def test_frequencies_are_the_distribution(fields: dict[str, Any]) -> None:
    """Chi-square of 20,000 draws with a fixed seed: 18.5 is exceeded once in a thousand at four degrees of freedom."""
    sampling = Sampling(**{"seed": 1, **fields})
    assert chi_square(draws(sampling, 20_000), naive(LOGITS.tolist(), sampling, (), ())) < 18.5


def test_draws_of_neighbouring_places_and_seeds_are_independent() -> None:
    """Pairs of draws, over places of one seed and over seeds at one place: 24 degrees of freedom, 51.2 at 0.001."""
    flat = torch.zeros(5)
    along = draws(Sampling(seed=11), 20_001, logits=flat)
    across = [draws(Sampling(seed=seed), 1, logits=flat)[0] for seed in range(10_001)]
    for found in (along, across):
        pairs = [5 * a + b for a, b in itertools.pairwise(found)]
        assert chi_square(pairs, [1 / 25] * 25) < 51.2


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_field_means_what_it_says(data: st.DataObject) -> None:
    """What is drawn has a probability by the plain definition, and greedy takes the best of it, for any fields."""
    logits = data.draw(ANY_LOGITS)
    tokens = st.integers(0, len(logits) - 1)
    prompt, answer = data.draw(st.lists(tokens, max_size=6)), data.draw(st.lists(tokens, max_size=6))
    sampling = Sampling(
        temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        top_p=data.draw(st.sampled_from([1.0, 0.95, 0.5, 0.05])),
        top_k=data.draw(st.integers(0, len(logits) + 2)),
        min_p=data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 0.5, 1.3, 5.0])),
        presence_penalty=data.draw(st.sampled_from([0.0, -2.0, 0.4])),
        frequency_penalty=data.draw(st.sampled_from([0.0, -1.0, 0.7])),
        logit_bias=tuple(data.draw(st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=4)).items()),
        seed=data.draw(st.integers(0, 5)),
    )
    sampler = Sampler(sampling, len(logits), prompt)
    for token in answer:
        sampler.accept(token)
    row = torch.tensor(logits)
    token = sampler.sample(row)
    assert row.tolist() == torch.tensor(logits).tolist()
    expected = naive(logits, sampling, prompt, answer)
    # Float32 may see two tokens as equal that differ in float64, and the other way round.
    scores = naive(logits, replace(sampling, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0), prompt, answer)
    assert any(p > 0 and math.isclose(s, scores[token], rel_tol=1e-4) for p, s in zip(expected, scores, strict=True))


@settings(max_examples=100, deadline=None)
@given(ANY_LOGITS, st.integers(1, 12), st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.1, 0.9]))
def test_what_is_kept_is_what_transformers_keeps(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    """Each filter alone keeps the tokens that transformers' warper keeps, but for equals at the border, which stay."""
    logits = torch.tensor(values)
    probabilities = torch.softmax(logits, 0)
    for fields, warper in (
        ({"top_k": top_k}, TopKLogitsWarper(top_k)),
        ({"top_p": top_p}, TopPLogitsWarper(top_p)),
        ({"min_p": min_p}, MinPLogitsWarper(min_p)),
    ):
        theirs = warper(None, logits.unsqueeze(0).clone())[0] > -torch.inf
        ours = Sampler(Sampling(**fields), len(logits))._kept(probabilities) > 0
        border = probabilities[theirs].min()
        for mine, other, p in zip(ours, theirs, probabilities, strict=True):
            assert bool(mine) == bool(other) or math.isclose(p, border, rel_tol=1e-4) or p == 0


@given(ANY_LOGITS, st.data())
def test_repetition_penalty_is_transformers(values: list[float], data: st.DataObject) -> None:
    prompt = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=5))
    logits = torch.tensor(values)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits.unsqueeze(0))[0]
    ours = Sampler(Sampling(repetition_penalty=1.7), len(values), prompt)._adjust(logits.clone())
    assert torch.equal(ours, theirs)


def test_penalties_grow_with_the_answer() -> None:
    """Each repetition costs frequency_penalty; a greedy answer goes round the tokens as their logits are used up."""
    sampling = Sampling(temperature=0.0, frequency_penalty=1.0)
    assert draws(sampling, 6) == [0, 0, 1, 0, 1, 2]  # equal scores: the first
    assert draws(Sampling(temperature=0.0, presence_penalty=2.5), 4) == [0, 1, 2, 0]


def test_nucleus_of_a_large_vocabulary_needs_no_sort_but_is_the_same() -> None:
    """Where the best thousand do not hold top_p, all are sorted; both ways find the same border."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 6.0):
        probabilities = torch.softmax(torch.randn(50_000, generator=generator) * scale, 0)
        ordered = probabilities.sort(descending=True).values.double()
        for top_p in (0.01, 0.3, 0.9, 0.999):
            kept = int((torch.cumsum(ordered, 0) - ordered < top_p * float(ordered.sum())).sum())
            assert float(_least_in_nucleus(probabilities, top_p)) == float(ordered[max(1, kept) - 1])


def test_bias_forces_and_bans() -> None:
    assert set(draws(Sampling(logit_bias=((4, 100.0),)), 200)) == {4}
    assert 0 not in draws(Sampling(logit_bias=((0, -100.0),)), 500)
    with pytest.raises(IndexError):
        Sampler(Sampling(logit_bias=((5, 1.0),)), 5)


def test_logits_of_an_inference_step_are_left_alone() -> None:
    """The engine's rows are inference tensors, which may not be written to."""
    with torch.inference_mode():
        row = LOGITS.clone()
    sampler = Sampler(Sampling(logit_bias=((1, 5.0),), frequency_penalty=1.0, seed=1, top_k=2), 5, [0])
    assert sampler.sample(row) in range(5)
    assert torch.equal(row, LOGITS)
