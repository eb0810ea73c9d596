"""The sampler against transformers' filters, against its own distribution, and against hostile logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from protocol.batches import Sampling
from protocol.errors import StepFailed
from runtime.sampler import candidates, choose, uniform

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=0.7, top_p=0.8),
    Sampling(temperature=1.5, min_p=0.1),
    Sampling(temperature=0.9, top_k=20, top_p=0.95, min_p=0.02),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=2.0, top_k=400, top_p=0.5),
]


def transformers_filter(scores, sampling):
    """Apply the same filters in the order in which `generate` does."""
    ids = torch.zeros((1, 0), dtype=torch.int64)
    steps = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(MinPLogitsWarper(sampling.min_p))
    scores = scores.double()[None]
    for step in steps:
        scores = step(ids, scores)
    return scores[0]


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("seed", range(5))
def test_filters_are_those_of_transformers(sampling, seed):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * 3
    ids, probs = candidates(logits.numpy().astype(np.float64) / sampling.temperature, sampling)
    wanted = transformers_filter(logits, sampling).softmax(-1)
    assert sorted(ids.tolist()) == wanted.nonzero().flatten().tolist()
    torch.testing.assert_close(torch.from_numpy(probs), wanted[torch.from_numpy(ids)], rtol=1e-9, atol=0)
    assert (np.diff(probs) <= 0).all()


def test_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3))
    history = [4, 7, 7, 49, 0]
    scores = RepetitionPenaltyLogitsProcessor(5.0)(torch.tensor([history]), logits[None].clone())[0]
    choice = choose(logits, Sampling(repetition_penalty=5.0), history=history, position=5)
    assert choice.token == int(scores.argmax())


@pytest.mark.parametrize("logits,token", [([1.0, 3.0, 3.0, 2.0], 1), ([0.0, 0.0], 0), ([5.0], 0), ([-1e30, -2e30], 0)])
def test_greedy_takes_the_lowest_id_of_a_tie(logits, token):
    assert choose(torch.tensor(logits), Sampling(), history=[], position=0).token == token


def test_ties_at_top_k_all_stay_and_are_ordered_by_id():
    ids, probs = candidates(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), Sampling(temperature=1.0, top_k=3))
    assert ids.tolist() == [1, 3, 0, 2, 4]
    assert probs.sum() == pytest.approx(1.0)


def test_logprob_is_the_models_own():
    logits = torch.tensor([0.5, 2.0, -1.0])
    choice = choose(logits, Sampling(temperature=0.1, repetition_penalty=2.0), history=[1], position=9)
    assert choice.logprob == pytest.approx(float(logits.double().log_softmax(-1)[choice.token]), abs=1e-12)


def test_draws_follow_the_distribution():
    """A chi-square of 4000 draws over 6 tokens stays under its 99.9 % bound (5 degrees of freedom: 20.5)."""
    logits = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.3, 1.5])
    wanted = logits.double().softmax(-1).numpy() * 4000
    sampling = Sampling(temperature=1.0, seed=11)
    found = np.zeros(6)
    for position in range(4000):
        found[choose(logits, sampling, history=[], position=position).token] += 1
    assert ((found - wanted) ** 2 / wanted).sum() < 20.5


def test_random_numbers_depend_on_seed_and_position_alone():
    numbers = [uniform(seed, position) for seed in (0, 1, 2**63 - 1) for position in (0, 1, 2, 100_000)]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [uniform(seed, position) for seed in (0, 1, 2**63 - 1) for position in (0, 1, 2, 100_000)]
    # Frozen: a resumed stream must sample the same tokens in every release.
    assert uniform(42, 7) == FROZEN


FROZEN = 0.4502664720018066


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(bad):
    logits = torch.zeros(10)
    logits[6] = bad
    with pytest.raises(StepFailed, match=r"1 of 10 logits are not finite.*token 6"):
        choose(logits, Sampling(temperature=1.0), history=[], position=0)


@pytest.mark.parametrize("history", [[-1], [10], [3, 10]])
def test_history_outside_the_vocabulary_is_named(history):
    with pytest.raises(StepFailed, match="vocabulary ends at 10"):
        choose(torch.zeros(10), Sampling(repetition_penalty=1.1), history=history, position=0)


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.01, 100),
    top_k=st.integers(0, 50),
    top_p=st.floats(1e-6, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), SAMPLINGS, st.integers(0, 2**31 - 1))
def test_any_setting_chooses_a_candidate_again_and_again(logits, sampling, position):
    values = torch.tensor(logits)
    choice = choose(values, sampling, history=[0], position=position)
    ids, probs = candidates(values.numpy().astype(np.float64) / sampling.temperature, sampling)
    assert choice.token in ids
    assert len(ids) >= 1
    assert probs.sum() == pytest.approx(1.0)
    assert choice.logprob <= 1e-9
    assert choice == choose(values.clone(), sampling, history=[0], position=position)
