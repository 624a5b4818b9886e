"""What a coordinator counts of its requests and steps, as plain numbers; `actors.telemetry` brings them to Ray."""

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from actors.api import Piece
from actors.telemetry import Telemetry

MAX_DURATIONS = 10_000
"""Kept until they are reported; beyond that the oldest are dropped."""


def _durations() -> deque[float]:
    return deque(maxlen=MAX_DURATIONS)


@dataclass(slots=True)
class Figures:
    """One coordinator's figures since its start; durations since they were last reported."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    first_token_s: deque[float] = field(default_factory=_durations)
    token_s: deque[float] = field(default_factory=_durations)
    replays: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0
    step_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def request(self) -> Iterator["RequestFigures"]:
        """A request, from its arrival to its end, well or not."""
        watched = RequestFigures(self, time.perf_counter())
        outcome = "cancelled"
        try:
            yield watched
            outcome = "ok"
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self.outcomes["ok" if watched.is_finished else outcome] += 1
            watched.end()

    def report(self, telemetry: Telemetry) -> None:
        """Bring all figures to Ray."""
        for outcome, number in self.outcomes.items():
            telemetry.total("requests", number, outcome=outcome)
        for model, number in self.replays.items():
            telemetry.total("replays", number, model=model)
        for part, seconds in self.step_s.items():
            telemetry.total("step_seconds", seconds, part=part)
        telemetry.total("steps", self.num_steps)
        telemetry.total("prompt_tokens", self.num_prompt_tokens)
        telemetry.total("output_tokens", self.num_output_tokens)
        telemetry.durations("first_token_seconds", self.first_token_s)
        telemetry.durations("token_seconds", self.token_s)


class RequestFigures:
    """What is seen of one request."""

    def __init__(self, figures: Figures, begin_s: float) -> None:
        self.is_finished = False
        self._figures = figures
        self._begin_s = begin_s
        self._first_s: float | None = None
        self._last_s = begin_s
        self._num_first_tokens = 0
        self._num_tokens = 0

    def take(self, piece: Piece) -> None:
        """Note a piece of the answer."""
        self._last_s = time.perf_counter()
        self._num_tokens += len(piece["token_ids"])
        self._figures.num_output_tokens += len(piece["token_ids"])
        self.is_finished = piece["finish_reason"] is not None
        if self._first_s is None:
            self._first_s, self._num_first_tokens = self._last_s, self._num_tokens
            self._figures.num_prompt_tokens += piece["usage"]["prompt_tokens"]
            self._figures.first_token_s.append(self._first_s - self._begin_s)

    def end(self) -> None:
        """Note the mean time of the tokens after the first piece."""
        num_later = self._num_tokens - self._num_first_tokens
        if self._first_s is not None and num_later > 0:
            self._figures.token_s.append((self._last_s - self._first_s) / num_later)
