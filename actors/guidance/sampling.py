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
        # The likeliest first, and those that tie as a greedy draw takes them.
        ordered_V, order_V = scores_V.sort(descending=True, stable=True)
        if 0 < sampling.top_k < num_tokens:
            ordered_V[sampling.top_k :] = -torch.inf
        if sampling.top_p < 1:
            ordered_V[_nucleus_size(ordered_V, sampling.top_p) :] = -torch.inf
        if sampling.min_p > 0:
            ordered_V[ordered_V < math.log(sampling.min_p)] = -torch.inf
        scores_V[order_V] = ordered_V
    return scores_SV


def _nucleus_size(ordered_V: Tensor, top_p: float) -> int:
    """How many tokens, the likeliest first, the nucleus needs to hold a probability of `top_p`."""
    masses_V = ordered_V.exp().cumsum(dim=-1)
    before_V = masses_V.roll(1)
    before_V[0] = 0
    return int((before_V < top_p * masses_V[-1]).sum())
