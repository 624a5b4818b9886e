"""Several answers are one to their reader: complete, in order, and given up together."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from actors.api import Piece
from cluster.errors import ReplicaLost
from deploy.http.several import all_of, interleave


def piece(text: str) -> Piece:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return Piece(text=text, token_ids=[1], finish_reason=None, usage=usage, seed=0)  # type: ignore[typeddict-item]


class Source:
    """An answer that is written when its test says so."""

    def __init__(self, texts: str, error: Exception | None = None) -> None:
        self.texts, self.error = texts, error
        self.is_closed = False

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        try:
            for text in self.texts:
                await asyncio.sleep(0)
                yield [piece(text)]
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True

    async def whole(self) -> Piece:
        try:
            await asyncio.sleep(0.01 if self.error is None else 0)
            if self.error is not None:
                raise self.error
            return piece(self.texts)
        except asyncio.CancelledError:
            self.is_closed = True
            raise


@pytest.mark.parametrize("texts", [["abc"], ["abc", "d", "", "efghij"]])
async def test_every_piece_comes_in_its_order(texts: list[str]) -> None:
    read = [""] * len(texts)
    async for batch in interleave([Source(text).pieces() for text in texts]):
        for index, one in batch:
            read[index] += one["text"]
    assert read == texts


@pytest.mark.parametrize("num_others", [0, 2])
async def test_a_failure_ends_all(num_others: int) -> None:
    others = [Source("x" * 1000) for _ in range(num_others)]
    sources = [Source("ab", ReplicaLost("gone")), *others]
    read: list[str] = []

    async def read_all() -> None:
        async for batch in interleave([source.pieces() for source in sources]):
            read.extend(one["text"] for index, one in batch if index == 0)

    with pytest.raises(ReplicaLost, match="gone"):
        await read_all()
    assert read == ["a", "b"]
    assert all(source.is_closed for source in sources)


async def test_a_reader_who_leaves_ends_all() -> None:
    sources = [Source("x" * 1000) for _ in range(3)]
    batches = interleave([source.pieces() for source in sources])
    for _ in range(6):
        await anext(batches)
    await batches.aclose()
    assert all(source.is_closed for source in sources)


async def test_whole_answers_come_in_order_or_fail_together() -> None:
    assert [one["text"] for one in await all_of([Source(text).whole() for text in "abc"])] == ["a", "b", "c"]
    sources = [Source("a"), Source("b", ReplicaLost("gone")), Source("c")]
    with pytest.raises(ReplicaLost, match="gone"):
        await all_of([source.whole() for source in sources])
    assert [source.is_closed for source in sources] == [True, False, True]
