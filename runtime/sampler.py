"""Chooses a session's next token from its logits, so that the same (logits, seed, position) give the same token.

Knows nothing of batches, devices or earlier draws: the random number comes from a counter, not from a stream.

Shapes: V vocabulary; C candidates left by the filters, most probable first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from protocol.batches import Sampling
from protocol.errors import StepFailed

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


class Choice(NamedTuple):
    """A token and the natural logarithm of its probability under the model, before any filter or penalty."""

    token: int
    logprob: float


def choose(logits_V: Tensor, sampling: Sampling, *, history: Sequence[int], position: int) -> Choice:
    """Choose the token for `position`; `history` are the ids so far, prompt included (the penalty needs them).

    Filters in transformers' order: repetition penalty, temperature, top-k, top-p, min-p. Ties go to the lowest id.
    Raises StepFailed for NaN or infinite logits, or for a history outside the vocabulary.
    """
    raw_V = logits_V.detach().float().cpu().numpy().astype(np.float64)
    _require_finite(raw_V)
    scores_V = _penalise(raw_V, sampling.repetition_penalty, history)
    if sampling.temperature == 0:
        token = int(scores_V.argmax())  # numpy returns the first maximum
    else:
        ids_C, probs_C = candidates(scores_V / sampling.temperature, sampling)
        token = int(ids_C[_draw(probs_C, uniform(sampling.seed, position))])
    return Choice(token, float(raw_V[token] - _log_sum_exp(raw_V)))


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that belongs to (seed, position).

    Philox4x64 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) with the seed as key and the
    position in the counter's second word, so positions never share a block.
    """
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([0, position, 0, 0], np.uint64))
    return float(np.random.Generator(bits).random())


def candidates(scores_V: Floats, sampling: Sampling) -> tuple[Ids, Floats]:
    """Return the ids that pass top-k, top-p and min-p and their probabilities, most probable first, then lowest id.

    Tokens that tie with the k-th pass top-k, as in transformers. At least one passes.
    """
    ids = np.arange(len(scores_V))
    if 0 < sampling.top_k < len(scores_V):
        least = np.partition(scores_V, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(scores_V >= least)
    ids_C = ids[np.argsort(-scores_V[ids], kind="stable")]
    weights_C = np.exp(scores_V[ids_C] - scores_V[ids_C[0]])
    probs_C = weights_C / weights_C.sum()
    if sampling.top_p < 1:
        mass_before_C = np.concatenate(([0.0], np.cumsum(probs_C)[:-1]))
        probs_C = probs_C[: int(np.searchsorted(mass_before_C, sampling.top_p, side="left"))]
    if sampling.min_p > 0:
        probs_C = probs_C[probs_C >= sampling.min_p * probs_C[0]]
    return ids_C[: len(probs_C)], probs_C / probs_C.sum()


def _penalise(scores_V: Floats, penalty: float, history: Sequence[int]) -> Floats:
    """Divide positive and multiply negative scores of ids seen before (Keskar et al., CTRL, 2019)."""
    if penalty == 1 or not len(history):
        return scores_V
    seen = np.unique(np.asarray(history, dtype=np.int64))
    if seen[0] < 0 or seen[-1] >= len(scores_V):
        raise StepFailed(f"history holds ids {seen[0]} to {seen[-1]}, the vocabulary ends at {len(scores_V)}")
    penalised_V = scores_V.copy()
    penalised_V[seen] = np.where(scores_V[seen] > 0, scores_V[seen] / penalty, scores_V[seen] * penalty)
    return penalised_V


def _draw(probs_C: Floats, number: float) -> int:
    """Invert the cumulative distribution; rounding at its end can't leave the candidates."""
    cumulative_C = np.cumsum(probs_C)
    place = int(np.searchsorted(cumulative_C, number * cumulative_C[-1], side="right"))
    return min(place, len(probs_C) - 1)


def _log_sum_exp(values_V: Floats) -> float:
    highest = values_V.max()
    return float(highest + np.log(np.exp(values_V - highest).sum()))


def _require_finite(logits_V: Floats) -> None:
    finite_V = np.isfinite(logits_V)
    if not finite_V.all():
        first = int(np.flatnonzero(~finite_V)[0])
        raise StepFailed(
            f"{int((~finite_V).sum())} of {len(logits_V)} logits are not finite, the first is {logits_V[first]} "
            f"for token {first}",
            remedy="the weights or the number format can't represent this model; try --dtype float32",
            phase="sample",
        )
