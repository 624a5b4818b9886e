"""Log probabilities of a step's rows, for those who ask: of the drawn token and of the most probable ones.

They are those of the guided distribution, log softmax of the merged logits, before penalties, biases, temperature and
filters. Whoever does not ask pays nothing. Shapes: V vocabulary, N the tokens that are told of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.api import Scoring
from actors.guidance.drawing import floats, merged
from actors.guidance.filters import kth_largest, log_sum_exp
from actors.guidance.kernels import find_best
from actors.guidance.merge import Guidance

LEAST = -9999.0
"""In place of the logarithm of 0, for which JSON has no number."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RowScores:
    """Log probabilities of some tokens of one row: of one that was asked about, then of the most probable ones."""

    tokens: list[int]
    logprobs: list[float]
    own: list[list[float]] | None = None
    """Each voice's own, the base's first, with details."""

    log_z: float = 0.0
    """logprob = base + sum of weight * guide - log_z, with details."""


def warm_up() -> None:
    """Compile the kernels, or load them from numba's cache."""
    score(torch.zeros(8), [], [], 0, Scoring(num_top=1))


def score(
    base: Tensor, guides: Sequence[Guidance], gaps: Sequence[Guidance], token: int, scoring: Scoring
) -> RowScores:
    """Return the log probabilities of a token and of the most probable ones, of the latter only those above 0.

    Args:
        base: the base's logits [V].
        guides: those that were merged.
        gaps: what forbids columns (`Spelled.guidance`), and is no voice.
        token: one of V.
        scoring: what is wanted.
    """
    z_V = merged(base, [*guides, *gaps])
    maxima, best_block = find_best(z_V)
    best = float(maxima[best_block])
    log_sum = log_sum_exp(z_V, best)
    tokens = [token, *_most_probable(z_V, maxima, best, scoring.num_top)]
    logprobs = [_finite(float(z_V[token]) - log_sum) for token in tokens]
    if not scoring.has_details:
        return RowScores(tokens, logprobs)
    own, log_z = [], log_sum
    for weight, row in (Guidance(1.0, base), *guides):
        own_V = floats(row)[: len(z_V)]
        own_sum = log_sum_exp(own_V, float(own_V.max()))
        own.append([_finite(float(own_V[token]) - own_sum if token < len(own_V) else -np.inf) for token in tokens])
        log_z -= weight * own_sum
    return RowScores(tokens, logprobs, own, log_z)


def _most_probable(z_V: Floats, maxima: Floats, best: float, num_top: int) -> list[int]:
    """The tokens with the largest logits, the best first, and the lowest first among equals."""
    if not num_top:
        return []
    least = kth_largest(z_V, maxima, best, 1.0, min(num_top, len(z_V)))
    among = np.flatnonzero(z_V >= max(least, np.finfo(np.float32).min))
    order = np.argsort(-z_V[among], kind="stable")
    return [int(token) for token in among[order[:num_top]]]


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
