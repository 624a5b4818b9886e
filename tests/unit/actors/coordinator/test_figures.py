"""A coordinator counts what happens to its requests."""

import asyncio
import time
from typing import Any

import pytest

from actors.api import Piece
from actors.coordinator.figures import Figures
from actors.telemetry import METRICS, Telemetry
from cluster.errors import InvalidRequest, ReplicaLost


def piece(token_ids: list[int], *, is_last: bool = False) -> Piece:
    usage: Any = {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 0}
    return Piece(text="x", token_ids=token_ids, finish_reason="stop" if is_last else None, usage=usage, seed=1)


def end(figures: Figures, last: Piece, error: BaseException) -> None:
    """A request that ends with an error after a piece."""
    with figures.request() as request:
        request.take(last)
        raise error


def test_an_answer_counts_its_tokens_and_times() -> None:
    figures = Figures()
    with figures.request() as request:
        request.take(piece([1]))
        time.sleep(0.02)
        request.take(piece([2, 3], is_last=True))
    assert figures.outcomes == {"ok": 1}
    assert (figures.num_prompt_tokens, figures.num_output_tokens) == (5, 3)
    assert len(figures.first_token_s) == 1
    (token_s,) = figures.token_s
    # Two tokens in the time between the pieces.
    assert token_s >= 0.01


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidRequest("no", "prompt"), "InvalidRequest"),
        (ReplicaLost("gone"), "ReplicaLost"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
    ],
)
def test_an_end_before_the_last_piece_counts_as_what_it_was(error: BaseException, outcome: str) -> None:
    figures = Figures()
    with pytest.raises(type(error)):
        end(figures, piece([1]), error)
    assert figures.outcomes == {outcome: 1}


def test_a_reader_that_leaves_after_the_last_piece_has_its_answer() -> None:
    figures = Figures()
    with pytest.raises(GeneratorExit):
        end(figures, piece([1], is_last=True), GeneratorExit())
    assert figures.outcomes == {"ok": 1}


def test_a_request_without_a_piece_has_no_times() -> None:
    figures = Figures()
    with pytest.raises(ReplicaLost), figures.request():
        raise ReplicaLost("gone")
    assert not figures.first_token_s
    assert not figures.token_s


class Log(Telemetry):
    """Notes what is reported."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def total(self, name: str, value: float, **tags: str) -> None:
        assert set(tags) == set(METRICS[name][2])
        self.names.add(name)

    def durations(self, name: str, seconds: Any) -> None:
        self.names.add(name)
        seconds.clear()


def test_all_figures_are_reported_under_their_names() -> None:
    figures, log = Figures(), Log()
    with figures.request() as request:
        request.take(piece([1], is_last=True))
    figures.replays["base"] += 1
    figures.step_s["plan"] += 0.1
    figures.report(log)
    assert log.names == {
        *("requests", "prompt_tokens", "output_tokens", "first_token_seconds", "token_seconds"),
        *("steps", "step_seconds", "replays"),
    }
    assert not figures.first_token_s
