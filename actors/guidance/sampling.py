"""From guided logits to a token: temperature, top-k, top-p, min-p, then a Gumbel-max draw.

Shapes: B rows of a step, S those of them that sample, V vocabulary, N blocks of W = 4 tokens, M those in reach.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from actors.guidance.noise import REACH, WORDS, gumbel, noise, token_words

SLACK = 1 + 1e-6
"""Far above what rounding in float64 could take from a token that ties with the bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request draws its tokens."""

    temperature: float = 1.0
    """Of the guided distribution; 0 is greedy."""

    top_k: int = 0
    """Keep the k most probable tokens, and all that tie with the last; 0 keeps all."""

    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities reach p, after top_k; 1 keeps all."""

    min_p: float = 0.0
    """Keep the tokens at least min_p times as probable as the best; 0 keeps all."""

    seed: int = 0
    """Any integer; its low 64 bits key the noise."""

    @property
    def is_greedy(self) -> bool:
        """Whether the draw is the plain argmax."""
        return self.temperature == 0

    @property
    def signed_seed(self) -> int:
        """The int64 with the seed's low 64 bits."""
        return (self.seed + 2**63) % 2**64 - 2**63


def draw(z_BV: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], samples: Sequence[int]) -> Tensor:
    """Return one token per row, int64 [B].

    token = argmax_v(log p(v) + g_v) over the tokens that the row's filters keep, p = softmax(z / T); the argmax of z
    where T = 0. Ties go to the lowest token.

    Args:
        z_BV: guided logits, float32.
        samplings: each row's settings.
        positions: each row's position in its output.
        samples: each row's sample index within its request.
    """
    tokens_B = z_BV.argmax(dim=-1)
    rows = [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]
    if rows:
        chosen = [samplings[row] for row in rows]
        scores_SV = keep_likely(scale(z_BV[rows], chosen), chosen)
        device = z_BV.device
        counters = (
            torch.tensor([positions[row] for row in rows], device=device),
            torch.tensor([samples[row] for row in rows], device=device),
            torch.tensor([sampling.signed_seed for sampling in chosen], device=device),
        )
        tokens_B[rows] = _gumbel_argmax(scores_SV, *counters)
    return tokens_B


def scale(z_SV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return (z - max z) / T in float64: log p but for a constant per row, 0 at the best token."""
    temperatures_S = torch.tensor([s.temperature for s in samplings], dtype=torch.float64, device=z_SV.device)
    z_SV = z_SV.double()
    return (z_SV - z_SV.amax(dim=-1, keepdim=True)) / temperatures_S[:, None]


def keep_likely(scores_SV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return the scores with -inf where top-k, then top-p, then min-p drop a token. Changes `scores_SV` in place.

    Args:
        scores_SV: as from `scale`, with 0 at each row's best token.
        samplings: each row's settings.
    """
    num_tokens = scores_SV.shape[-1]
    for scores_V, sampling in zip(scores_SV, samplings, strict=True):
        if 0 < sampling.top_k < num_tokens:
            smallest = scores_V.topk(sampling.top_k).values[-1]
            scores_V[scores_V < smallest] = -torch.inf
        if sampling.top_p < 1:
            scores_V[scores_V < _nucleus_floor(scores_V, sampling.top_p)] = -torch.inf
        if sampling.min_p > 0:
            scores_V[scores_V < math.log(sampling.min_p)] = -torch.inf
    return scores_SV


def _nucleus_floor(scores_V: Tensor, top_p: float) -> Tensor:
    """The score of the last token that the nucleus needs to hold a probability of `top_p`."""
    ordered_V = scores_V.sort(descending=True).values
    before_V = ordered_V.softmax(dim=-1).cumsum(dim=-1).roll(1)
    before_V[0] = 0
    return ordered_V[(before_V < top_p).sum() - 1]


def _gumbel_argmax(scores_SV: Tensor, positions_S: Tensor, samples_S: Tensor, seeds_S: Tensor) -> Tensor:
    """argmax_v(scores + noise) of each row; one row at a time, which stays in the processor's cache."""
    counters = zip(positions_S[:, None], samples_S[:, None], seeds_S[:, None], strict=True)
    return torch.stack(
        [_noisy_argmax(scores_V, *counter) for scores_V, counter in zip(scores_SV, counters, strict=True)]
    )


def _noisy_argmax(scores_V: Tensor, position: Tensor, sample: Tensor, seed: Tensor) -> Tensor:
    """argmax_v(scores + noise), with words only where a token is in reach and noise only where it can still win."""
    blocks_NW = pad(scores_V, (0, -len(scores_V) % WORDS), value=-torch.inf).view(-1, WORDS)
    # The noisy score of the best token's block is a bar that the winner must reach.
    best = scores_V.argmax(dim=-1, keepdim=True) // WORDS
    bar = (blocks_NW[best] + noise(best, position, sample, seed)).amax()
    if not bar.isfinite():
        return best[0] * WORDS  # nothing can be drawn from such scores; it is for the caller to see
    reachable = (blocks_NW.amax(dim=-1) > bar - REACH).nonzero()[:, 0]
    words_MW = token_words(reachable, position, sample, seed)
    scores_MW = blocks_NW[reachable]
    # The winner has e^-g = -log u <= e^(score - bar), and 1 - u is less than -log u: no logarithm is needed to see that
    # nearly all the others cannot be it.
    complements_MW = (2**32 - 0.5 - words_MW.double()) / 2**32
    can_win = complements_MW <= (scores_MW - bar).exp_() * SLACK
    winner = (scores_MW[can_win] + gumbel(words_MW[can_win])).argmax()
    block, word = can_win.nonzero()[winner]
    return reachable[block] * WORDS + word
