"""What an evaluation measures, as numbers out of answers that are already scored. Knows no file and no service.

A row is a list of prompts, each a list of its answers: answers to one prompt resemble each other, so each prompt is one
observation.
"""

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.prompts import Prompt, PromptEncoder
from actors.training.objective import collate, response_log_probs, response_logits

BATCH = 16
TIE = 0.05
"""Rewards that differ by no more than this are level."""

NUM_RESAMPLES = 10_000
Z_95 = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """An answer and what is known of it."""

    text: str
    num_tokens: int
    log_prob: float
    """Of all its tokens under the base at temperature 1, in nats."""

    rewards: Mapping[str, float]


Row = Sequence[Sequence[ScoredAnswer]]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over prompts with its 95 % interval."""

    value: float
    interval: float
    """Half the interval's width."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How often an answer of one row beats one of another to the same prompt, in percent."""

    win: float
    tie: float
    lose: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """How much of the way from one row to another a third goes, with a bootstrap 95 % interval over prompts."""

    share: float
    low: float
    high: float


def prompt_means(row: Row, reward: str) -> list[float]:
    """Return the mean reward of each prompt's answers."""
    return [statistics.fmean(answer.rewards[reward] for answer in answers) for answers in row]


def mean_reward(row: Row, reward: str) -> Mean:
    """Return the mean over two or more prompts, each counted as one observation."""
    means = prompt_means(row, reward)
    return Mean(statistics.fmean(means), Z_95 * statistics.stdev(means) / len(means) ** 0.5)


def log_prob_per_token(row: Row) -> float:
    """Return the mean log-probability of all answers' tokens under the base, in nats."""
    answers = list(itertools.chain.from_iterable(row))
    return sum(answer.log_prob for answer in answers) / sum(answer.num_tokens for answer in answers)


def distinct_2(texts: Iterable[str]) -> float | None:
    """Different pairs of adjacent words over all such pairs (Li et al., 2016); None where there is no pair."""
    pairs = [pair for text in texts for pair in itertools.pairwise(re.findall(r"\w+", text.lower()))]
    return len(set(pairs)) / len(pairs) if pairs else None


def distinct_2_in_answer(row: Row) -> float | None:
    """Return the mean of distinct-2 within an answer, over the answers that have a pair of words."""
    each = (distinct_2([answer.text]) for answer in itertools.chain.from_iterable(row))
    known = [value for value in each if value is not None]
    return statistics.fmean(known) if known else None


def distinct_2_over_row(row: Row, num_samples: int) -> float | None:
    """Return distinct-2 over the first `num_samples` answers to every prompt: more text repeats more."""
    return distinct_2(answer.text for answers in row for answer in answers[:num_samples])


def best_of(row: Row, num: int, reward: str) -> list[list[ScoredAnswer]]:
    """Keep the best of every `num` answers to a prompt, the first of them where they are level."""
    return [
        [
            max(answers[start : start + num], key=lambda answer: answer.rewards[reward])
            for start in range(0, len(answers), num)
        ]
        for answers in row
    ]


def compare(row: Row, other: Row, reward: str) -> Outcome:
    """Compare every answer with every one of the other row's to the same prompt; each prompt counts the same."""
    outcomes = []
    for answers, others in zip(row, other, strict=True):
        gains = [a.rewards[reward] - b.rewards[reward] for a in answers for b in others]
        num_wins, num_defeats = sum(gain > TIE for gain in gains), sum(gain < -TIE for gain in gains)
        counts = (num_wins, len(gains) - num_wins - num_defeats, num_defeats)
        outcomes.append([100 * count / len(gains) for count in counts])
    return Outcome(*(statistics.fmean(shares) for shares in zip(*outcomes, strict=True)))


def recovery(row: Row, source: Row, target: Row, reward: str) -> Recovery | None:
    """Return (row - source) / (target - source) of the mean rewards; None where there is no gap to go.

    The interval is that of resampled prompts, the same ones for all three rows.
    """
    means = np.array([prompt_means(each, reward) for each in (row, source, target)])
    drawn = np.random.default_rng(0).integers(means.shape[1], size=(NUM_RESAMPLES, means.shape[1]))
    reached, start, goal = means.mean(axis=1)
    if goal <= start:
        return None
    resampled = means[:, drawn].mean(axis=2)
    gaps = resampled[2] - resampled[1]
    shares = (resampled[0] - resampled[1])[gaps != 0] / gaps[gaps != 0]
    low, high = np.percentile(shares, (2.5, 97.5))
    return Recovery(float((reached - start) / (goal - start)), float(low), float(high))


@torch.inference_mode()
def log_probs(texts: Sequence[tuple[Prompt, Sequence[int]]], model: Any, tokenizer: Any) -> list[float]:
    """Return log p(answer's tokens | prompt) under the model, in nats; 0 for an answer without tokens."""
    encoder = PromptEncoder(tokenizer)
    encoded = [(encoder.encode(prompt), answer) for prompt, answer in texts]
    order = sorted(
        (index for index, (_, answer) in enumerate(encoded) if answer),
        key=lambda index: len(encoded[index][0]) + len(encoded[index][1]),
    )
    found = [0.0] * len(encoded)
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        batch = collate([encoded[index][0] for index in indices], [encoded[index][1] for index in indices])
        sums = response_log_probs(response_logits(model, batch), batch.targets_BT)
        for index, value in zip(indices, sums.tolist(), strict=True):
            found[index] = value
    return found
