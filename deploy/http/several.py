"""Several answers at once: each is a request of its own, and all of them are one to their reader."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing

from actors.api import Piece

Pieces = AsyncGenerator[list[Piece], None]

Batch = list[tuple[int, Piece]]
"""Pieces, each with the index of its answer."""


async def all_of(answers: Sequence[Awaitable[Piece]]) -> list[Piece]:
    """Return all answers; when one of them fails, or the caller leaves, the others are given up."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def interleave(answers: Sequence[Pieces]) -> AsyncGenerator[Batch, None]:
    """Yield the pieces of all answers as they come, in the order of each; closing it closes them.

    The first failure of one is that of all.
    """
    if len(answers) == 1:
        async with aclosing(answers[0]) as pieces:
            async for some in pieces:
                yield [(0, piece) for piece in some]
        return
    arrived: asyncio.Queue[Batch | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_drain(index, answer, arrived)) for index, answer in enumerate(answers)]
    try:
        num_open = len(tasks)
        while num_open:
            match await arrived.get():
                case None:
                    num_open -= 1
                case Exception() as error:
                    raise error
                case batch:
                    yield batch
    finally:
        await _cancel(tasks)


async def _drain(index: int, answer: Pieces, arrived: "asyncio.Queue[Batch | Exception | None]") -> None:
    try:
        async with aclosing(answer) as pieces:
            async for some in pieces:
                arrived.put_nowait([(index, piece) for piece in some])
        arrived.put_nowait(None)
    except Exception as error:
        arrived.put_nowait(error)


async def _cancel(tasks: Sequence["asyncio.Future[Piece] | asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
