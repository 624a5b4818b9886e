"""A gateway that is stopped: what is being written comes to its end or is told so, and nothing new begins."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from actors.api import Piece
from cluster.errors import ReplicaLost
from deploy.http.closing import Closing
from deploy.http.openai_answer import Answer
from deploy.http.openai_schema import CompletionRequest
from deploy.http.responses import stream_events
from deploy.http.several import interleave

STEP_S = 0.02


def piece(text: str, *, is_last: bool = False) -> Piece:
    usage: Any = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return Piece(text=text, token_ids=[1], finish_reason="stop" if is_last else None, usage=usage, seed=0)


async def write(closing: Closing, texts: Sequence[str], pause_s: float = STEP_S) -> AsyncGenerator[list[Piece], None]:
    """What a gateway reads of an answer, a piece a step."""
    with closing.answer():
        for number, text in enumerate(texts, 1):
            async with closing.wait(60, "late"):
                await asyncio.sleep(pause_s)
            yield [piece(text, is_last=number == len(texts))]


async def read(closing: Closing, texts: Sequence[str], pause_s: float = STEP_S) -> str:
    """A stream as its client gets it."""
    pieces = interleave([write(closing, texts, pause_s)])
    first = await anext(pieces)
    answer = Answer(CompletionRequest(model="base", prompt=["a"], stream=True))
    return "".join([event async for event in stream_events(answer, first, pieces)])


async def test_every_stream_ends_with_its_rest_or_with_an_error_event() -> None:
    closing = Closing()
    short = [asyncio.create_task(read(closing, "abcdef")) for _ in range(3)]
    long = [asyncio.create_task(read(closing, "abcdef" * 100)) for _ in range(3)]
    stuck = asyncio.create_task(read(closing, "ab", 0.5))
    await asyncio.sleep(2 * STEP_S)
    await asyncio.wait_for(closing.close(1.0), 5)
    for stream in [*short, stuck]:
        assert (await stream).endswith("data: [DONE]\n\n")
    for stream in long:
        *_, last = (await stream).split("data: ")
        assert '"error"' in last
        assert "the service was stopped before the answer was finished" in last


async def test_what_is_over_before_anything_is_written_is_an_error_of_its_own() -> None:
    closing = Closing()
    stuck = asyncio.create_task(read(closing, "ab", 100))
    await asyncio.sleep(STEP_S)
    await closing.close(0)
    with pytest.raises(ReplicaLost, match="the service was stopped"):
        await stuck


async def test_nothing_begins_once_it_is_closing() -> None:
    closing = Closing()
    begun = asyncio.create_task(read(closing, "abcdef"))
    await asyncio.sleep(STEP_S)
    closing_task = asyncio.create_task(closing.close(10))
    await asyncio.sleep(0)
    with pytest.raises(ReplicaLost, match="is being stopped"), closing.answer():
        pass
    await closing_task
    assert begun.done()


async def test_without_answers_it_closes_at_once() -> None:
    await asyncio.wait_for(Closing().close(60), 1)


async def test_a_wait_that_is_too_long_says_so() -> None:
    with pytest.raises(ReplicaLost, match=r"^late$"):
        async with Closing().wait(0.01, "late"):
            await asyncio.sleep(5)
