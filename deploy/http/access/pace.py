"""How fast refusals go out: those who send nonsense as fast as they can take little from the others."""

import math
import time
from collections.abc import Callable

LONGEST_S = 1.0
"""No refusal waits longer, however many there are."""


class Pace:
    """Gives places in time, so many a second; the first of a second's worth are at once."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with a whole second's worth.

        Args:
            per_second: places, at least 1.
            clock: in seconds.
        """
        self._per_second = per_second
        self._clock = clock
        self._next = -math.inf

    def take(self) -> float:
        """Take the next place; return in how many seconds it is, at most `LONGEST_S`."""
        now = self._clock()
        place = min(max(self._next, now - 1), now + LONGEST_S)
        self._next = place + 1 / self._per_second
        return max(0.0, place - now)
