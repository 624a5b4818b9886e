"""Requests over HTTP, what came of each, and for how long it stood still."""

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import requests

TIMEOUT_S = 180.0
"""Of a request, and of its client's patience with a connection."""

GUIDANCE: list[dict[str, float]] = [{"kind": 0.8}, {"kind": 0.6, "terse": 0.7}, {"terse": 1.0}, {"terse": -0.4}, {}]
PROMPT = "the quick brown fox jumps over the lazy dog. "


class Broken(Exception):
    """A connection ended before its answer did."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: everything that its text depends on, and how it is sent."""

    number: int
    prompt: str
    weights: dict[str, float]
    seed: int
    max_tokens: int
    streams: bool

    @property
    def body(self) -> dict[str, Any]:
        """As it is posted."""
        stream = {"stream": True, "stream_options": {"include_usage": True}} if self.streams else {}
        return {
            "model": "base",
            "prompt": self.prompt,
            "guidance": {"weights": self.weights},
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "timeout": TIMEOUT_S,
            **stream,
        }


def make_asks(count: int, *, seed: int) -> list[Ask]:
    """So many requests of 60 to 150 tokens, every other one a stream."""
    chance = random.Random(seed)
    return [
        Ask(
            number=number,
            prompt=PROMPT[: chance.randint(1, len(PROMPT))],
            weights=GUIDANCE[number % len(GUIDANCE)],
            seed=chance.randrange(2**31),
            max_tokens=chance.randint(60, 150),
            streams=number % 2 == 0,
        )
        for number in range(count)
    ]


@dataclass(slots=True)
class Answer:
    """What came of a request that was sent once."""

    ask: Ask
    start: float
    end: float = 0.0
    text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    """As `usage` counts them."""

    error: str | None = None
    arrivals: list[float] = field(default_factory=list)
    """When each part came."""

    @property
    def pauses(self) -> Iterator[tuple[float, float]]:
        """Every time in which nothing came: its begin and end."""
        return itertools.pairwise([self.start, *self.arrivals, self.end])

    def had(self, moments: Sequence[float]) -> bool:
        """Whether one of these moments was during the request."""
        return any(self.start <= moment <= self.end for moment in moments)


def send(url: str, ask: Ask) -> Answer:
    """Send a request and read its answer, which may be an error."""
    answer = Answer(ask, time.monotonic())
    try:
        with requests.post(f"{url}/v1/completions", json=ask.body, stream=ask.streams, timeout=TIMEOUT_S) as response:
            if response.status_code != 200:
                raise Broken(f"{response.status_code}: {response.text[:300]}")
            parts = _events(response) if ask.streams else [response.json()]
            for part in parts:
                answer.arrivals.append(time.monotonic())
                _take(answer, part)
        if answer.finish_reason is None or answer.num_tokens is None:
            raise Broken("the stream ended before its answer")
    except (requests.RequestException, Broken) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.end = time.monotonic()
    return answer


def _take(answer: Answer, part: dict[str, Any]) -> None:
    if "error" in part:
        raise Broken(part["error"]["message"])
    for choice in part["choices"]:
        answer.text += choice["text"]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    if part.get("usage"):
        answer.num_tokens = part["usage"]["completion_tokens"]


def _events(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


class Load:
    """So many clients at once, each with one request after the other."""

    def __init__(self, url: str, asks: Sequence[Ask], *, num_clients: int) -> None:
        """Begin. Every request is sent once at least, and again from the first on until `finish`."""
        self.answers: list[Answer] = []
        """Of every sending, in the order in which they ended."""
        self._url = url
        self._asks = asks
        self._num_due = len(asks)
        self._numbers = itertools.count()
        self._is_over = threading.Event()
        self._clients = ThreadPoolExecutor(num_clients)
        self._running = [self._clients.submit(self._run) for _ in range(num_clients)]

    def _run(self) -> None:
        while (number := next(self._numbers)) < self._num_due or not self._is_over.is_set():
            self.answers.append(send(self._url, self._asks[number % len(self._asks)]))

    def abandon(self) -> None:
        """Send nothing more."""
        self._num_due = 0
        self._is_over.set()

    def finish(self) -> list[Answer]:
        """Send nothing that has been sent already, wait for all answers and return them."""
        self._is_over.set()
        for client in self._running:
            client.result()
        self._clients.shutdown()
        return self.answers


def leave(url: str, ask: Ask, num_parts: int) -> None:
    """Begin a stream, read so many parts of it, and end the connection."""
    with requests.post(f"{url}/v1/completions", json=ask.body, stream=True, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200, response.text
        for part in itertools.islice(_events(response), num_parts):
            assert "error" not in part, part


def at_once(num_clients: int, calls: Sequence[Callable[[], None]]) -> None:
    """Make calls, so many at a time."""
    with ThreadPoolExecutor(num_clients) as clients:
        for call in [clients.submit(call) for call in calls]:
            call.result()
