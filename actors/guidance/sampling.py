"""A request's filters as plainly as they can be written: temperature, top-k, top-p, min-p.

`kernels` computes the same without a sort of the whole row. Shapes: S rows that sample, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from actors.api import Sampling


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
