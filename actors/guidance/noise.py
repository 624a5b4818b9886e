"""Counter-based Gumbel noise: a pure function of (seed, sample, position, token).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives four 32-bit words per
counter. Token v at a position takes word v % 4 of counter (v // 4, position, sample, 0), keyed by the request's seed.
So a draw depends on nothing but its request: not on the batch, the replica, or what was computed before.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORDS = 4
"""Words per counter: tokens 4c .. 4c + 3 share counter c."""

Words = NDArray[np.uint64]
"""Numbers in [0, 2**32). In numpy, since torch has no unsigned product."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> Words:
    """Return the ten-round Philox words of each counter, shape [..., 4].

    Args:
        counter: four arrays of 32-bit words that broadcast together.
        key: two arrays of 32-bit words that broadcast with them.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> _HALF) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = (product0 >> _HALF) ^ c3 ^ k1, product0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    # Ten rounds mix every word into every other, so all four have the full broadcast shape by now.
    return np.stack([c0, c1, c2, c3], axis=-1)


def gumbel(words: Tensor) -> Tensor:
    """Return g = -log(-log u), u = (x + 0.5) / 2**32, in float64: between -3.2 and 22.9."""
    u = (words.double() + 0.5) / 2**32
    return -torch.log(-torch.log(u))


def noise(blocks: Tensor, positions: Tensor, samples: Tensor, seeds: Tensor) -> Tensor:
    """Return the Gumbel noise of whole blocks of four tokens, float64 [..., 4].

    Args:
        blocks: token // 4, int64.
        positions: the drawn token's index in its output, int64.
        samples: index of the sample within its request, int64.
        seeds: the request's seed as the int64 with the same 64 bits.
    All four broadcast together.
    """
    block, position, sample, seed = (
        tensor.cpu().numpy().astype(np.uint64) for tensor in (blocks, positions, samples, seeds)
    )
    words = philox4x32((block, position, sample, np.zeros_like(block)), (seed & _MASK, seed >> _HALF))
    return gumbel(torch.from_numpy(words.view(np.int64)))
