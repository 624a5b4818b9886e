"""Two objectives at once: where the front of a curve runs, and whether a point lies below it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deploy.jobs.evaluation.measures import Mean

STEPS = 1000
"""Places at which a line between two points is looked at."""


@dataclass(frozen=True, slots=True)
class Point:
    """A row's means of two rewards."""

    row: str
    x: Mean
    y: Mean


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a point stands to a front."""

    row: str
    lead: float
    """How much the point is ahead of the front in the reward in which it does better, at the place of the front that is
    worst for it; negative below the front."""

    margin: float
    """The same with the combined half intervals added."""

    @property
    def is_on_or_above(self) -> bool:
        """Whether no place of the front is better in both rewards by more than the intervals."""
        return self.margin >= 0


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both rewards, by x."""
    ordered = sorted(points, key=lambda point: (-point.x.value, -point.y.value))
    kept: list[Point] = []
    for point in ordered:
        if not kept or point.y.value > kept[-1].y.value:
            kept.append(point)
    return kept[::-1]


def stand(point: Point, points: Sequence[Point]) -> Standing:
    """Compare a point with the piecewise-linear front of `points`.

    Half intervals of two means combine as sqrt(a^2 + b^2); along a line of the front they change as the means do.
    """
    leads, margins = [], []
    corners = front(points)
    for left, right in zip(corners, corners[1:] or corners, strict=False):
        share = np.linspace(0, 1, STEPS + 1)
        ahead, slack = [], []
        for own, a, b in ((point.x, left.x, right.x), (point.y, left.y, right.y)):
            ahead.append(own.value - (a.value + share * (b.value - a.value)))
            slack.append(np.hypot(own.interval, a.interval + share * (b.interval - a.interval)))
        leads.append(np.maximum(ahead[0], ahead[1]).min())
        margins.append(np.maximum(ahead[0] + slack[0], ahead[1] + slack[1]).min())
    return Standing(point.row, float(min(leads, default=math.inf)), float(min(margins, default=math.inf)))
