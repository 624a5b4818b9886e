"""Preference pairs of a model's own answers, by their rewards.

Knows texts, lengths and rewards; neither where they come from nor which files hold what.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from actors.training.repetition import longest_repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """Which two answers to a prompt become a pair."""

    margin: float = 0.0
    """Smallest difference of their rewards; equal rewards have no order and never make a pair."""

    max_length_difference: int | None = None
    """Largest difference of their lengths, in tokens. Summed log-probabilities of answers of different lengths differ
    by nats for every token that one has more: such pairs would have the largest gradients and say little of the reward.
    """

    max_length_ratio: float | None = None
    """Largest ratio of their lengths, the longer one's over the shorter one's: what `max_length_difference` is for,
    where answers are as long as they like."""

    max_repeat: int | None = None
    """Longest repeated run, in words, of the better answer: nothing is to be learnt from one that is stuck."""

    limit: int | None = None
    """At most so many pairs of a prompt."""

    widest: bool = False
    """Keep those whose rewards differ the most, no answer in two of them, instead of drawing them at random."""

    def are_alike(self, length: int, other: int) -> bool:
        """Whether two answers are near enough in length."""
        shorter, longer = sorted((length, other))
        if self.max_length_difference is not None and longer - shorter > self.max_length_difference:
            return False
        return self.max_length_ratio is None or longer <= self.max_length_ratio * shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """The pairs among the answers to one prompt, and what became of the others."""

    pairs: list[tuple[int, int]]
    """Indices of the better and of the worse answer."""

    num_compared: int
    """Pairs of answers whose texts are different and not empty."""

    num_within_margin: int
    num_unlike_in_length: int
    """Of those beyond the margin."""

    num_stuck: int
    """Of those beyond the margin and alike in length, whose better answer repeats itself."""


def pair_answers(
    texts: Sequence[str], lengths: Sequence[int], rewards: Sequence[float], rules: PairRules, rng: random.Random
) -> Pairing:
    """Pair the answers to one prompt with every clearly worse one that the rules allow.

    Args:
        texts: The answers; empty ones are left out, and two that are the same are never compared.
        lengths: Their lengths in tokens.
        rewards: Higher is better.
        rules: What makes a pair.
        rng: Draws which pairs stay where there are more than `rules.limit`, unless the widest do.
    """
    pairs: list[tuple[int, int]] = []
    num_compared = num_within_margin = num_unlike_in_length = num_stuck = 0
    is_stuck = [rules.max_repeat is not None and longest_repeat(text) > rules.max_repeat for text in texts]
    for i, j in itertools.combinations(range(len(texts)), 2):
        if not texts[i].strip() or not texts[j].strip() or texts[i] == texts[j]:
            continue
        num_compared += 1
        difference = abs(rewards[i] - rewards[j])
        if difference == 0 or difference < rules.margin:
            num_within_margin += 1
        elif not rules.are_alike(lengths[i], lengths[j]):
            num_unlike_in_length += 1
        elif is_stuck[i if rewards[i] > rewards[j] else j]:
            num_stuck += 1
        else:
            pairs.append((i, j) if rewards[i] > rewards[j] else (j, i))
    if rules.widest:
        pairs = _widest(pairs, rewards)[: rules.limit]
    elif rules.limit is not None and len(pairs) > rules.limit:
        pairs = [pairs[k] for k in sorted(rng.sample(range(len(pairs)), rules.limit))]
    return Pairing(
        pairs=pairs,
        num_compared=num_compared,
        num_within_margin=num_within_margin,
        num_unlike_in_length=num_unlike_in_length,
        num_stuck=num_stuck,
    )


def _widest(pairs: Sequence[tuple[int, int]], rewards: Sequence[float]) -> list[tuple[int, int]]:
    """The pair whose rewards differ the most, then the next of the answers that are left, and so on."""
    taken: set[int] = set()
    kept = []
    for better, worse in sorted(pairs, key=lambda pair: rewards[pair[1]] - rewards[pair[0]]):
        if taken.isdisjoint((better, worse)):
            kept.append((better, worse))
            taken |= {better, worse}
    return kept
