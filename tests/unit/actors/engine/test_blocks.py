"""Blocks are shared by equal beginnings, to the token, and nothing that somebody reads is ever written to.

A pool is compared with a plain model of it: each sequence's tokens, written to and read from a fake cache.
"""

import random

import pytest

from actors.engine.blocks import BlockPool, BlockTable, Copy, num_common

BLOCK_SIZE = 4


class Cache:
    """What would lie in the cache: a token for every position."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.positions: list[int | None] = [None for _ in range((num_blocks + 1) * BLOCK_SIZE)]
        self.num_computed = 0

    def place(self, table: BlockTable, position: int) -> int:
        return table.blocks[position // BLOCK_SIZE].number * BLOCK_SIZE + position % BLOCK_SIZE

    def copy(self, copies: list[Copy]) -> None:
        for source, target, start, stop in copies:
            for offset in range(start, stop):
                self.positions[target * BLOCK_SIZE + offset] = self.positions[source * BLOCK_SIZE + offset]

    def reuse(self, table: BlockTable, tokens: list[int]) -> int:
        num_tokens, copies = self.pool.reuse(table, tokens)
        self.copy(copies)
        return num_tokens

    def append(self, table: BlockTable, tokens: list[int]) -> bool:
        copies = self.pool.reserve(table, len(tokens))
        if copies is None:
            return False
        self.copy(copies)
        for i, token in enumerate(tokens):
            self.positions[self.place(table, table.length + i)] = token
        self.num_computed += len(tokens)
        self.pool.commit(table, tokens)
        return True

    def read(self, table: BlockTable) -> list[int | None]:
        return [self.positions[self.place(table, position)] for position in range(table.length)]


def test_a_sequence_finds_what_another_computed_to_the_token() -> None:
    cache = Cache(16)
    one, two = BlockTable(), BlockTable()
    cache.append(one, [*range(10), 99, 98])
    assert cache.reuse(two, [*range(10), 50, 51]) == 10
    assert cache.read(two) == list(range(10))
    cache.append(two, [50, 51])
    assert cache.read(one) == [*range(10), 99, 98]
    assert cache.read(two) == [*range(10), 50, 51]
    # Two whole blocks are the same ones.
    assert [block.number for block in one.blocks[:2]] == [block.number for block in two.blocks[:2]]


def test_what_a_closed_sequence_leaves_is_found_until_its_room_is_needed() -> None:
    cache = Cache(4)
    table = BlockTable()
    cache.append(table, list(range(8)))
    cache.pool.truncate(table, 0)
    assert cache.pool.num_available == 4
    assert cache.reuse(table, list(range(8))) == 8
    cache.pool.truncate(table, 0)
    other = BlockTable()
    assert cache.append(other, [70 + i for i in range(12)])
    assert cache.reuse(table, list(range(8))) == 4
    assert cache.read(table) == list(range(4))
    assert cache.read(other) == [70 + i for i in range(12)]


def test_a_sequence_that_rolls_back_into_a_shared_block_leaves_it_as_it_is() -> None:
    cache = Cache(8)
    one, two = BlockTable(), BlockTable()
    cache.append(one, list(range(8)))
    assert cache.reuse(two, list(range(8))) == 8
    cache.pool.truncate(two, 6)
    cache.append(two, [60, 61, 62])
    assert cache.read(one) == list(range(8))
    assert cache.read(two) == [0, 1, 2, 3, 4, 5, 60, 61, 62]


def test_a_search_goes_on_in_the_middle_of_a_block() -> None:
    cache = Cache(16)
    one, two = BlockTable(), BlockTable()
    cache.append(one, list(range(6)))
    assert cache.reuse(two, list(range(6))) == 6
    cache.append(one, list(range(6, 13)))
    assert cache.reuse(two, list(range(6, 14))) == 7
    assert cache.read(two) == list(range(13))


def test_room_that_is_not_there_changes_nothing() -> None:
    cache = Cache(3)
    one, two = BlockTable(), BlockTable()
    assert cache.append(one, list(range(8)))
    assert not cache.append(two, list(range(20, 25)))
    assert cache.pool.num_available == 1
    assert cache.append(two, list(range(20, 24)))
    assert cache.read(one) == list(range(8))


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_work_keeps_every_sequences_tokens(seed: int) -> None:
    generator = random.Random(seed)
    cache = Cache(generator.randint(6, 24))
    tables: list[tuple[BlockTable, list[int]]] = [(BlockTable(), []) for _ in range(4)]
    texts: list[list[int]] = [[]]
    for _ in range(400):
        table, tokens = generator.choice(tables)
        match generator.randrange(4):
            case 0:
                new = [generator.randrange(3) for _ in range(generator.randint(1, 9))]
                if cache.append(table, new):
                    tokens += new
            case 1:
                wanted = generator.choice(texts)[len(tokens) :]
                num_tokens = cache.reuse(table, wanted)
                tokens += wanted[:num_tokens]
            case 2:
                length = generator.randint(0, len(tokens))
                cache.pool.truncate(table, length)
                del tokens[length:]
            case 3:
                copies = cache.pool.reserve(table, generator.randint(1, 6))
                if copies is None:
                    cache.pool.truncate(table, 0)
                    tokens.clear()
                else:
                    cache.copy(copies)
        texts.append(list(tokens))
        for some, held in tables:
            assert cache.read(some) == held
    for table, _ in tables:
        cache.pool.truncate(table, 0)
    assert cache.pool.num_available == cache.pool.num_blocks


def test_a_common_beginning_is_counted() -> None:
    assert num_common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert num_common([], [1]) == 0
