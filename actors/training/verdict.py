"""Whether a trained guide is of use, in words: does it rank pairs that it has not seen, and how sure can that be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIGNIFICANCE = 0.01
"""How likely a guide that knows nothing may be to pass."""

WILD_MARGIN = 50.0
"""Nats a pair: a guide that prefers by more than this has left the language, whatever weight it gets."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said of a guide at the end of its training."""

    is_useful: bool
    lines: Sequence[str]


def chance(num_right: int, num_pairs: int) -> float:
    """Return how likely `num_right` or more of so many pairs are ranked rightly by tossing a coin."""
    return sum(math.comb(num_pairs, k) for k in range(num_right, num_pairs + 1)) / 2**num_pairs


def judge(*, num_pairs: int, accuracy: float, margin: float) -> Verdict:
    """Judge a guide by the pairs that were kept back from its training.

    Args:
        num_pairs: How many were kept back.
        accuracy: The share of them that it ranks rightly.
        margin: Their mean difference of summed log-probabilities (of log p/p_base, if trained under a base), in nats.
    """
    if not num_pairs:
        return Verdict(
            True, ["no pair was kept back (--validation-share 0), so nothing is known of how it ranks unseen ones"]
        )
    num_right = round(accuracy * num_pairs)
    likely = chance(num_right, num_pairs)
    ranked = f"ranks {num_right} of {num_pairs} kept-back pairs rightly ({accuracy:.0%})"
    if likely > SIGNIFICANCE:
        return Verdict(
            False,
            [
                f"OF NO USE: it {ranked}; tossing a coin does as well with a probability of {likely:.2g}",
                _remedy(num_pairs, accuracy),
            ],
        )
    lines = [f"it {ranked}; a coin would with a probability of {likely:.1g}"]
    if margin > WILD_MARGIN:
        lines.append(
            f"its margin is {margin:.0f} nats a pair: it has left the language far behind, and will bear small weights "
            "only. Train it with --base, or with fewer --steps or a lower --learning-rate"
        )
    elif margin <= 0:
        lines.append(f"its mean margin is {margin:.1f} nats: a few pairs that it gets wrong outweigh the rest")
    return Verdict(True, lines)


def _remedy(num_pairs: int, accuracy: float) -> str:
    if chance(num_pairs, num_pairs) > SIGNIFICANCE:
        return f"{num_pairs} kept-back pairs cannot tell: bring more pairs, or raise --validation-share"
    if accuracy > 0.5:
        return "more pairs or more --steps may help; so may pairs that differ more clearly"
    return "the pairs may have no order that can be learnt: look at some, and check that chosen is the better one"
