"""How much a text repeats itself, in words; punctuation and case do not count."""

import itertools
import re
from collections.abc import Iterable

LONGEST_PERIOD = 60
"""Words after which a text may begin again: a long sentence."""


def words(text: str) -> list[str]:
    """Return the text's words in lower case."""
    return re.findall(r"\w+", text.lower())


def distinct_2(texts: Iterable[str]) -> float | None:
    """Different pairs of adjacent words over all such pairs (Li et al., 2016); None where there is no pair."""
    pairs = [pair for text in texts for pair in itertools.pairwise(words(text))]
    return len(set(pairs)) / len(pairs) if pairs else None


def longest_repeat(text: str) -> int:
    """Return how many words in a row, at most, say again what was said just before them.

    'and happy and happy and happy' has four: a stretch counts from where it has said all of what is repeated once more.
    """
    spoken = words(text)
    longest = 0
    for period in range(1, min(LONGEST_PERIOD, len(spoken) // 2) + 1):
        run = 0
        for earlier, later in zip(spoken, spoken[period:], strict=False):
            run = run + 1 if earlier == later else 0
            if run >= period:
                longest = max(longest, run)
    return longest
