"""Compiled loops over one row of guided logits: adding a guide, finding the best, and the draw.

They compute what `reference` computes in plain tensors. A row is float32 [V]; its tokens lie in blocks of four, which
share a counter of the noise (see `noise`). A token's score is (z - max z) / T in float64: log p but for a constant.
Knows nothing of torch, of requests, or of rows of other types. No index is checked in compiled code.
"""

import math

import numpy as np
from numpy.typing import NDArray

from actors.jit import compiled

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

NOTHING = -1
"""In place of a block: the row holds a NaN, or its best logit is not finite."""

REACH = 22.9
"""No noise is larger: -log(-log(1 - 2**-33)) = 22.87."""

LEAST = -3.2
"""No noise is smaller: -log(-log(2**-33)) = -3.13."""

LANES = 256
"""Blocks whose words are computed together: few enough for the first-level cache."""

SLACK = 1e-6
"""Far above what rounding in float64 could take from a score, relative to the numbers it came from."""

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_LOG2_E = 1 / math.log(2)


@compiled
def add_guide(z: Floats, logits: Floats, weight: float) -> None:
    """Add a guide's weighted logits [U] to a row [V] in place; where they end or forbid, so does the row.

    As torch's `add_` to the bit: in float32, product and sum fused where the processor can.
    """
    num_common = min(len(z), len(logits))
    factor = np.float32(weight)
    for v in range(num_common):
        z[v] += factor * logits[v]
    if weight < 0:
        # Minus times minus infinity would make certain what the guide forbids.
        for v in range(num_common):
            if logits[v] == -np.inf:
                z[v] = -np.inf
    z[num_common:] = -np.inf


@compiled
def find_best(z: Floats) -> tuple[Floats, int]:
    """Return the largest logit of each block, and which block has the best: the first if they tie, else NOTHING."""
    num_nan = 0
    for v in range(len(z)):
        num_nan += z[v] != z[v]
    num_whole = len(z) // 4
    maxima = np.empty(-(-len(z) // 4), np.float32)
    for b in range(num_whole):
        maxima[b] = max(max(z[4 * b], z[4 * b + 1]), max(z[4 * b + 2], z[4 * b + 3]))
    if num_whole < len(maxima):
        maxima[num_whole] = z[4 * num_whole :].max()
    best_block = 0
    for b in range(len(maxima)):
        if maxima[b] > maxima[best_block]:
            best_block = b
    if num_nan > 0 or not math.isfinite(maxima[best_block]):
        best_block = NOTHING
    return maxima, best_block


@compiled
def race(
    z: Floats,
    maxima: Floats,
    best_block: int,
    temperature: float,
    floor: float,
    end: int,
    key: tuple[int, int],
    position: int,
    sample: int,
) -> int:
    """Return argmax_v(score + g_v) over the scores > floor, and those at it of the tokens before the end.

    Words only for blocks that can still win.
    """
    best = np.float64(maxima[best_block])
    blocks, heads, words = np.empty(LANES, np.int64), np.empty(LANES, np.float32), np.empty((4, LANES), np.uint64)
    # The best block runs alone and first: its noisy score is a good bar for the others.
    blocks[0], heads[0], num_blocks = best_block, best, 1
    bar, winner = LEAST, NOTHING
    next_block = 0
    while num_blocks > 0:
        philox(blocks[:num_blocks], position, sample, 0, key, words)
        bar, winner = run_heat(z, blocks[:num_blocks], heads, words, best, temperature, floor, end, bar, winner)
        needed = least_logit(best, temperature, max(floor, bar - REACH))
        num_blocks = 0
        while next_block < len(maxima) and num_blocks < LANES:
            blocks[num_blocks], heads[num_blocks] = next_block, maxima[next_block]
            num_blocks += maxima[next_block] >= needed
            next_block += 1
    return winner


@compiled
def least_logit(best: float, temperature: float, score: float) -> np.float32:
    """A logit below all that have at least this score, if barely."""
    below = temperature * score
    return np.float32(best + below - SLACK * (abs(best) - below))


@compiled
def run_heat(
    z: Floats,
    blocks: Integers,
    heads: Floats,
    words: Words,
    best: float,
    temperature: float,
    floor: float,
    end: int,
    bar: float,
    winner: int,
) -> tuple[float, int]:
    """Return the best noisy score and its token after these blocks, whose maxima are `heads`, ran against the bar.

    The winner has e^-g = -log u <= e^(score - bar), and 1 - u is less than -log u. So its word x is at least
    2^32 (1 - e^(score - bar)): with the next power of two for e^(...), no logarithm or exponential is needed to see
    that nearly all the others cannot be it.
    """
    can_win = np.empty(LANES, np.bool_)
    for i in range(len(blocks)):
        score = (np.float64(heads[i]) - best) / temperature
        power = min(max(np.ceil((score - bar) * _LOG2_E + SLACK), -40.0), 0.0)
        least_word = 2**32 - (2**32 >> np.int64(-power))
        most = max(max(words[0, i], words[1, i]), max(words[2, i], words[3, i]))
        can_win[i] = np.int64(most) >= least_word
    for i in range(len(blocks)):
        if can_win[i]:
            for token in range(4 * blocks[i], min(4 * blocks[i] + 4, len(z))):
                score = (np.float64(z[token]) - best) / temperature
                if score > floor or (score == floor and token < end):
                    score += gumbel(words[token % 4, i])
                    if score > bar or (score == bar and token < winner):
                        bar, winner = score, token
    return bar, winner


@compiled
def gumbel(word: np.uint64) -> float:
    """Return g = -log(-log u), u = (x + 0.5) / 2**32."""
    return -math.log(-math.log((np.float64(word) + 0.5) / 2**32))


@compiled
def philox(c0: Integers, c1: int, c2: int, c3: int, key: tuple[int, int], words: Words) -> None:
    """Write the Philox4x32-10 words of the counters (c0[i], c1, c2, c3) into words[:, i]."""
    for i in range(len(c0)):
        x0, x1, x2, x3 = np.uint64(c0[i]), np.uint64(c1), np.uint64(c2), np.uint64(c3)
        k0, k1 = np.uint64(key[0]), np.uint64(key[1])
        for _ in range(10):
            product0, product1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
            x0, x1 = (product1 >> _HALF) ^ x1 ^ k0, product1 & _MASK
            x2, x3 = (product0 >> _HALF) ^ x3 ^ k1, product0 & _MASK
            k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
        words[0, i], words[1, i], words[2, i], words[3, i] = x0, x1, x2, x3
