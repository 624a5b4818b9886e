"""Compiled filters of one row: top-k, top-p and min-p keep all scores above a floor, and at the floor the tokens
before an end. Both are found without a sort.

A row is float32 [V], its best logit finite; a token's score is (z - max z) / T in float64, as in `kernels`. Calls
nothing of `kernels`, whose changes its cache would not see (see `actors.jit`). No index is checked in compiled code.
"""

import math

import numpy as np
from numpy.typing import NDArray

from actors.jit import compiled

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

NUM_BINS = 512
"""Of the histogram by which the nucleus is found."""

WAYS = 4
"""Neighbours add to copies of the histogram of their own, so that none waits for the one before it."""

LANES = 256
"""Tokens whose exponentials are computed together: few enough for the first-level cache."""

_LOG2_E, _LOG_2 = 1 / math.log(2), math.log(2)
_ROUNDER = 1.5 * 2**52
_INVERSE_FACTORIALS = tuple(1 / math.factorial(n) for n in range(14))


@compiled
def filter_floor(
    z: Floats, maxima: Floats, best: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[float, int]:
    """Return the least score that top-k, then top-p, then min-p keep, and the end of the tokens kept that have it.

    `maxima` are the largest logits of each four, and `best` the largest of all. `reference` cuts by the same rules.
    """
    floor, num_ties = -np.inf, len(z)
    kept = z
    if 0 < top_k < len(z):
        floor = (np.float64(kth_largest(z, maxima, best, temperature, top_k)) - best) / temperature
        kept, num_ties = drop_ties(gather(z, maxima, best, temperature, floor), best, temperature, floor, top_k)
    if top_p < 1:
        floor, num_ties = nucleus_floor(kept, best, temperature, top_p)
    if min_p > 0 and math.log(min_p) > floor:
        floor, num_ties = math.log(min_p), len(z)
    return floor, end_of_ties(z, maxima, best, temperature, floor, num_ties)


@compiled
def drop_ties(logits: Floats, best: float, temperature: float, floor: float, k: int) -> tuple[Floats, int]:
    """Return k of logits none of which is below the floor, and how many of those at the floor are among them."""
    num_above = 0
    for i in range(len(logits)):
        num_above += int((np.float64(logits[i]) - best) / temperature > floor)
    kept = np.empty(k, np.float32)
    num_kept, num_ties = 0, k - num_above
    num_left = num_ties
    for i in range(len(logits)):
        is_above = (np.float64(logits[i]) - best) / temperature > floor
        if is_above or num_left > 0:
            kept[num_kept] = logits[i]
            num_kept += 1
            num_left -= not is_above
    return kept, num_ties


@compiled
def end_of_ties(z: Floats, maxima: Floats, best: float, temperature: float, floor: float, num_ties: int) -> int:
    """Return the token after the first `num_ties` of those that have exactly this score."""
    if num_ties < len(z):
        for b in range(len(maxima)):
            if (np.float64(maxima[b]) - best) / temperature >= floor:
                for v in range(4 * b, min(4 * b + 4, len(z))):
                    num_ties -= (np.float64(z[v]) - best) / temperature == floor
                    if num_ties == 0:
                        return v + 1
    return len(z)


@compiled
def kth_largest(z: Floats, maxima: Floats, best: float, temperature: float, k: int) -> np.float32:
    """Return the k-th largest logit of a row."""
    if k > len(maxima):
        return select_largest(z, k)
    # k blocks have a logit of at least this.
    least = (np.float64(select_largest(maxima, k)) - best) / temperature
    return select_largest(gather(z, maxima, best, temperature, least), k)


@compiled
def gather(z: Floats, maxima: Floats, best: float, temperature: float, floor: float) -> Floats:
    """Return the logits whose scores are at or above a floor, in the order of their tokens."""
    logits = np.empty(len(z), np.float32)
    num_logits = 0
    for b in range(len(maxima)):
        if (np.float64(maxima[b]) - best) / temperature >= floor:
            for v in range(4 * b, min(4 * b + 4, len(z))):
                logits[num_logits] = z[v]
                num_logits += int((np.float64(z[v]) - best) / temperature >= floor)
    return logits[:num_logits]


@compiled
def select_largest(values: Floats, k: int) -> np.float32:
    """Return the k-th largest value, none of which is NaN: by halving the range of floats that it can be in."""
    bits = np.empty(1, np.int32)
    value = bits.view(np.float32)
    # Floats are ordered as their bits are, but for the negative ones, which go the other way.
    low, high = -(2**31) + 0x7FFFFF, 0x7F800000
    while high - low > 1:
        middle = (low + high) >> 1
        bits[0] = middle if middle >= 0 else middle ^ 0x7FFFFFFF
        least = value[0]
        count = 0
        for i in range(len(values)):
            count += values[i] >= least
        if count >= k:
            low = middle
        else:
            high = middle
    bits[0] = low if low >= 0 else low ^ 0x7FFFFFFF
    return value[0]


@compiled
def nucleus_floor(z: Floats, best: float, temperature: float, top_p: float) -> tuple[float, int]:
    """Return the score of the last token that the nucleus of these logits needs, and how many with it are needed.

    A histogram of mass by score shows in which bin that token is, and only this bin is sorted. Tokens of probability
    below (1 - p) / V are never needed, so the bins cover the scores above that, and one more all the others.
    """
    bins_per_score = NUM_BINS / math.log((1 - top_p) / (1 + len(z)))
    masses = np.zeros((NUM_BINS + 1, WAYS))
    bins = np.empty(len(z), np.int32)
    scores, powers = np.empty(LANES), np.empty(LANES)
    for start in range(0, len(z), LANES):
        num_tokens = min(LANES, len(z) - start)
        for i in range(num_tokens):
            scores[i] = (np.float64(z[start + i]) - best) / temperature
            bins[start + i] = np.int32(min(scores[i] * bins_per_score, np.float64(NUM_BINS)))
        exponentials(scores[:num_tokens], powers)
        for i in range(num_tokens):
            masses[bins[start + i], i % WAYS] += powers[i]
    mass_by_bin = masses.sum(axis=1)
    wanted = top_p * mass_by_bin.cumsum()[-1]
    mass, last = 0.0, 0
    while mass + mass_by_bin[last] < wanted:
        mass += mass_by_bin[last]
        last += 1
    members = np.sort(z[bins == last])[::-1]
    floor, num_ties = 0.0, 0
    for member in members:
        if mass >= wanted:
            break
        score = (np.float64(member) - best) / temperature
        num_ties = num_ties + 1 if score == floor else 1
        floor = score
        mass += math.exp(score)
    return floor, num_ties


@compiled
def log_sum_exp(z: Floats, best: float) -> float:
    """Return log sum_v e^z_v of a row whose largest logit is `best`."""
    scores, powers = np.empty(LANES), np.empty(LANES)
    total = 0.0
    for start in range(0, len(z), LANES):
        num_tokens = min(LANES, len(z) - start)
        for i in range(num_tokens):
            scores[i] = np.float64(z[start + i]) - best
        exponentials(scores[:num_tokens], powers)
        for i in range(num_tokens):
            total += powers[i]
    return best + math.log(total)


@compiled
def exponentials(scores: Doubles, powers: Doubles) -> None:
    """Write e^x of scores x <= 0, LANES at most, within 1e-14 of its size; 0 is given as e^-700.

    A polynomial without branches, which is vectorised where `math.exp` is a call for each.
    """
    bits = np.empty(LANES, np.int64)
    doubles = bits.view(np.float64)
    for i in range(len(scores)):
        x = max(scores[i], -700.0) * _LOG2_E
        # Adding 1.5 * 2^52 rounds to an integer n, and leaves it in the low bits.
        doubles[i] = x + _ROUNDER
        r = (x - (doubles[i] - _ROUNDER)) * _LOG_2
        sum_ = _INVERSE_FACTORIALS[13]
        for n in range(12, -1, -1):
            sum_ = sum_ * r + _INVERSE_FACTORIALS[n]
        powers[i] = sum_
    for i in range(len(scores)):
        bits[i] = (bits[i] + 1023) << 52
    for i in range(len(scores)):
        powers[i] *= doubles[i]
