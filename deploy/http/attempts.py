"""A request that outlives its coordinator: sent again, with its seed and with what has come of the answer."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from actors.api import Piece, Resume
from actors.coordinator.request import choose_seed
from actors.settings import Limits
from cluster.errors import AnswerLost, Overloaded, in_brief

REPEATABLE = (AnswerLost, Overloaded)
"""What an attempt may fail with so that another one makes sense; `Attempts.pause_s` knows whether it does."""

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
"""Between two attempts."""

DEADLINE_S = Limits().deadline_s
"""Of a request without a timeout, where the service's own is not known."""


class Attempts:
    """What to send, each time, and what has been received."""

    def __init__(self, fields: Mapping[str, Any], *, deadline_s: float | None = None) -> None:
        """Begin with a request's fields, checked or not.

        deadline_s: the service's own, if known: every attempt but the first then says how much of it is left.
        """
        timeout = fields.get("timeout")
        self._fields = dict(fields)
        if self._fields.get("seed") is None:
            self._fields["seed"] = choose_seed()
        self._says_time = timeout is not None or deadline_s is not None
        self._end = time.monotonic() + (timeout if isinstance(timeout, int | float) else deadline_s or DEADLINE_S)
        self._pause_s = FIRST_PAUSE_S
        self._is_first = True
        self._was_lost = False
        self._token_ids: list[int] = []
        self._num_chars = 0
        self.is_finished = False
        """Whether the answer's last piece has come."""

    @property
    def left_s(self) -> float:
        """Time until the request's deadline."""
        return max(0.0, self._end - time.monotonic())

    def fields(self) -> dict[str, Any]:
        """Return the request's fields for the next attempt."""
        fields = dict(self._fields)
        if self._says_time and not self._is_first:
            fields["timeout"] = max(self.left_s, 1e-3)
        self._is_first = False
        return fields

    def resume(self) -> Resume | None:
        """Return what the next attempt goes on behind."""
        return Resume(tuple(self._token_ids), self._num_chars) if self._token_ids else None

    def take(self, pieces: Iterable[Piece]) -> None:
        """Note what has come."""
        for piece in pieces:
            self._token_ids += piece["token_ids"]
            self._num_chars += len(piece["text"])
            self.is_finished = piece["finish_reason"] is not None
            self._pause_s = FIRST_PAUSE_S

    def pause_s(self, error: AnswerLost | Overloaded) -> float:
        """Return how long to wait before the next attempt.

        Raises:
            AnswerLost: the error, when there is no time for another attempt.
            Overloaded: likewise; or when the request was never let in.
        """
        self._was_lost = self._was_lost or isinstance(error, AnswerLost)
        pause_s = self._pause_s
        if pause_s >= self.left_s or not self._was_lost:
            raise error
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s


@contextmanager
def own_errors() -> Iterator[None]:
    """Turn what Ray says of a call to a coordinator into the errors of `cluster.errors`."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except (RayError, RayServeException) as error:
        raise AnswerLost(f"the coordinator was lost: {in_brief(error)}") from error
