"""Which weight a guide bears: what it does to a base's answers at several weights, and the weight to recommend.

Knows models and prompts in tokens; not where they lie, nor what is made of the result.
"""

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.calibration import Point
from actors.training.repetition import distinct_2, longest_repeat
from actors.training.sampling import decode_answer, draw_answers

WEIGHTS_UNDER_BASE = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Looked at for a guide that was trained under its base, and so for weight 1."""

WEIGHTS_ALONE = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Looked at for a guide that was trained alone."""

ENDED_WITHIN = 0.1
DISTINCT_SHARE = 0.95
ENOUGH = 0.9
"""Of the best gain in reward: what a smaller weight must reach to be recommended in place of a larger one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One answer that was drawn at one weight."""

    weight: float
    prompt: int
    text: str
    num_tokens: int
    has_ended: bool
    divergence: float
    """KL(guided || base) in nats, summed over its tokens."""


def observe(
    base: Any,
    guide: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    weights: Sequence[float],
    *,
    end_tokens: Collection[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[Observed]:
    """Draw one answer to every prompt at every weight, all in one batch."""
    rows = [(number, (weight,)) for weight in weights for number in range(len(prompts))]
    drawn = draw_answers(
        [base, guide],
        prompts,
        rows,
        max_tokens=max_tokens,
        end_tokens=end_tokens,
        generator=torch.Generator().manual_seed(seed),
        temperature=temperature,
        top_p=top_p,
        tokens={*tokenizer.get_vocab().values(), *end_tokens},
    )
    return [
        Observed(
            weight=weight,
            prompt=number,
            text=decode_answer(tokenizer, prompts[number], answer.tokens, end_tokens),
            num_tokens=len(answer.tokens),
            has_ended=answer.tokens[-1] in end_tokens,
            divergence=answer.divergence,
        )
        for (number, (weight,)), answer in zip(rows, drawn, strict=True)
    ]


def summarise(observed: Sequence[Observed], reward: Callable[[Observed], float] | None) -> list[Point]:
    """Return a point for every weight, in rising order."""
    points = []
    for weight in sorted({answer.weight for answer in observed}):
        answers = [answer for answer in observed if answer.weight == weight]
        varied = [value for answer in answers if (value := distinct_2([answer.text])) is not None]
        points.append(
            Point(
                weight=weight,
                num_answers=len(answers),
                divergence=sum(a.divergence for a in answers) / sum(a.num_tokens for a in answers),
                ended=statistics.fmean(answer.has_ended for answer in answers),
                distinct_2=statistics.fmean(varied) if varied else 1.0,
                distinct_2_error=statistics.stdev(varied) / len(varied) ** 0.5 if len(varied) > 1 else 0.0,
                longest_repeat=max(longest_repeat(answer.text) for answer in answers),
                num_tokens=statistics.fmean(answer.num_tokens for answer in answers),
                reward=None if reward is None else statistics.fmean(map(reward, answers)),
            )
        )
    return points


def recommend(points: Sequence[Point]) -> tuple[float, bool]:
    """Return the weight to recommend, and whether answers at it end and vary as the base's do.

    Of the weights at which they do: with a reward the smallest that has nine tenths of the best one's gain, without one
    the largest up to 1. If there is none, the smallest weight that was looked at.

    Args:
        points: In rising order of weights, the first of weight 0.
    """
    base, *others = points
    sound = [point for point in others if _is_sound(point, base)]
    if not sound:
        return others[0].weight, False
    if base.reward is None:
        within = [point.weight for point in sound if point.weight <= 1] or [sound[0].weight]
        return within[-1], True
    best = max(_gain(point, base) for point in sound)
    return next(point.weight for point in sound if _gain(point, base) >= ENOUGH * best), True


def _gain(point: Point, base: Point) -> float:
    assert point.reward is not None
    assert base.reward is not None
    return point.reward - base.reward


def _is_sound(point: Point, base: Point) -> bool:
    """Whether its answers end and vary as the base's do, as far as so few answers can tell.

    No fewer end than of the base's less `ENDED_WITHIN`, and they vary at least `DISTINCT_SHARE` as much; of either the
    standard error of the difference is given away.
    """
    ended_error = sum(each.ended * (1 - each.ended) / each.num_answers for each in (point, base)) ** 0.5
    varied_error = math.hypot(point.distinct_2_error, base.distinct_2_error)
    return (
        point.ended >= base.ended - ENDED_WITHIN - ended_error
        and point.distinct_2 >= DISTINCT_SHARE * base.distinct_2 - varied_error
    )
