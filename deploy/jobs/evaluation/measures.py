"""What an evaluation measures, as numbers out of answers that are already scored. Knows no file and no service.

A row is a list of prompts, each a list of its answers: answers to one prompt resemble each other, so each prompt is one
observation.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.prompts import Prompt, PromptEncoder
from actors.training.objective import collate, divergence, guided_logits, response_log_probs, response_logits
from actors.training.repetition import distinct_2, longest_repeat

BATCH_TOKENS = 1024
"""Of answers that are scored at once: each has a row of logits."""

TIE = 0.05
"""Rewards that differ by no more than this are level."""

NUM_RESAMPLES = 10_000
Z_95 = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """An answer and what is known of it."""

    text: str
    num_tokens: int
    has_ended: bool
    """By itself, and not at a length limit."""

    law: "Law | None"
    """What models say of it; None if that was not measured."""

    rewards: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Law:
    """What models say of an answer, at temperature 1."""

    log_prob: float
    """Of all its tokens under the base, in nats."""

    divergence: float
    """KL(what wrote it || base), in nats, summed over its tokens."""


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
    return _mean(prompt_means(row, reward))


def _mean(values: Sequence[float]) -> Mean:
    return Mean(statistics.fmean(values), Z_95 * statistics.stdev(values) / len(values) ** 0.5)


def per_token(row: Row, value: Callable[[Law], float]) -> float:
    """Return a mean over all tokens of the answers that were measured, in nats."""
    known = [(answer.law, answer.num_tokens) for answer in itertools.chain.from_iterable(row) if answer.law is not None]
    return sum(value(law) for law, _ in known) / sum(num_tokens for _, num_tokens in known)


def share_ended(row: Row) -> Mean:
    """Return the share of answers that ended by themselves, with its interval over prompts."""
    return _mean([statistics.fmean(answer.has_ended for answer in answers) for answers in row])


def mean_length(row: Row) -> float:
    """Return the mean length of an answer in tokens."""
    return statistics.fmean(answer.num_tokens for answer in itertools.chain.from_iterable(row))


def longest_repeat_95(row: Row) -> float:
    """Return the 95th percentile over answers of the longest repeated run, in words."""
    runs = [longest_repeat(answer.text) for answer in itertools.chain.from_iterable(row)]
    return float(np.percentile(runs, 95))


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
def laws(
    texts: Sequence[tuple[Prompt, Sequence[int]]],
    base: Any,
    tokenizer: Any,
    *,
    guides: Sequence[tuple[Any, float]] = (),
    writer: Any = None,
) -> list[Law]:
    """Return what the base says of answers, and how far from it what wrote them is, token by token.

    Args:
        texts: Prompts, and their answers in tokens.
        base: A causal language model of transformers.
        tokenizer: The base's.
        guides: Those that wrote beside the base, with their weights.
        writer: The model that wrote in the base's place; none if it was the base.
    """
    encoder = PromptEncoder(tokenizer)
    encoded = [(encoder.encode(prompt), answer) for prompt, answer in texts]
    order = sorted(
        (index for index, (_, answer) in enumerate(encoded) if answer), key=lambda index: len(encoded[index][1])
    )
    found = [Law(0.0, 0.0)] * len(encoded)
    while order:
        size = max(1, BATCH_TOKENS // len(encoded[order[-1]][1]))
        indices, order = order[-size:], order[:-size]
        batch = collate([encoded[index][0] for index in indices], [encoded[index][1] for index in indices])
        base_BTV = response_logits(base, batch)
        log_probs_B = response_log_probs(base_BTV, batch.targets_BT)
        divergence_B = torch.zeros(len(indices))
        if guides or writer is not None:
            law_BTV = response_logits(writer or base, batch)
            for guide, weight in guides:
                law_BTV = guided_logits(law_BTV, response_logits(guide, batch), weight)
            divergence_B = divergence(law_BTV, base_BTV, batch.targets_BT)
        for index, log_prob, nats in zip(indices, log_probs_B.tolist(), divergence_B.tolist(), strict=True):
            found[index] = Law(log_prob, nats)
    return found
