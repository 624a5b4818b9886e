"""Counter-based Gumbel noise: a pure function of (seed, sample, position, token).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives four 32-bit words per
counter. Token v at a position takes word v % 4 of counter (v // 4, position, sample, 0), keyed by the request's seed.
So a draw depends on nothing but its request: not on the batch, the replica, or what was computed before.
"""

import torch
from torch import Tensor

WORDS = 4
"""Words per counter: tokens 4c .. 4c + 3 share counter c."""

REACH = 22.9
"""No noise is larger: -log(-log(1 - 2**-33)) = 22.87."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Return the ten-round Philox words of each counter, int64 in [0, 2**32), shape [..., 4].

    Args:
        counter: four int64 tensors of 32-bit words that broadcast together.
        key: two int64 tensors of 32-bit words that broadcast with them.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    # Ten rounds mix every word into every other, so all four have the full broadcast shape by now.
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words."""
    # int64 wraps where uint64 would not, with the same 64 bits; the mask drops the sign that the shift drags in.
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


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
    key = (seeds & _MASK, (seeds >> 32) & _MASK)
    return gumbel(philox4x32((blocks, positions, samples, torch.zeros_like(blocks)), key))
