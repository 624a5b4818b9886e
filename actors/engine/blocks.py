"""Which blocks of the cache hold which tokens: a tree of blocks that sequences with equal beginnings share.

Bookkeeping only; the keys and values lie in `passes.cache`. A block holds up to `block_size` tokens that follow those
of its parent. What a closed sequence leaves stays until its room is needed, the longest unused first, so that a prompt
which begins like an earlier one finds that beginning computed. Sharing is exact to the token: where a sequence leaves
the others in the middle of a block, it gets a block of its own and a `Copy` of the common part.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK_SIZE = 16
"""Positions of a block of an engine's cache."""


class Copy(NamedTuple):
    """Keys and values that a block takes over from another one."""

    source: int
    """Number of a block."""

    target: int
    start: int
    """First position within both blocks."""

    stop: int


@dataclass(slots=True, eq=False)
class Block:
    """A place in the cache and the tokens whose keys and values lie there."""

    number: int
    parent: "Block | None" = None
    """In the tree; none for its root, and for a block that holds nothing yet."""

    tokens: list[int] = field(default_factory=list)
    children: dict[int, list["Block"]] = field(default_factory=dict)
    """By their first token."""

    num_users: int = 0


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in order; those behind its length are reserved."""

    blocks: list[Block] = field(default_factory=list)
    length: int = 0
    """Tokens."""


class BlockPool:
    """All blocks of a cache. Block 0 is nobody's: it is the root of the tree, and holds no tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._root = Block(0)
        self._free = list(range(num_blocks, 0, -1))
        # Children come before their parents: a sequence gives its last block back first.
        self._idle: OrderedDict[int, Block] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free) + len(self._idle)

    def reuse(self, table: BlockTable, tokens: Sequence[int]) -> tuple[int, list[Copy]]:
        """Let a sequence take over what the pool holds of the tokens that follow.

        Returns:
            How many tokens that were, and what must be copied before the sequence reads its blocks.
        """
        self._drop_reserved(table)
        start, copies = table.length, list[Copy]()
        while (taken := table.length - start) < len(tokens):
            num_own = table.length % self.block_size
            own = table.blocks[-1].tokens[:num_own] if num_own else []
            parent = self._parent(table, len(table.blocks) - (1 if num_own else 0))
            wanted = [*own, *tokens[taken : taken + self.block_size - num_own]]
            found, num_equal = _longest(parent, wanted)
            if found is None or num_equal <= num_own:
                break
            if num_equal == self.block_size:
                if num_own:
                    self._release(table.blocks.pop())
                self._acquire(found)
                table.blocks.append(found)
                table.length += num_equal - num_own
                continue
            copy = self._take_part(table, found, num_own, num_equal)
            if copy is None:
                break
            copies += copy
            self.commit(table, wanted[num_own:num_equal])
            break
        return table.length - start, copies

    def reserve(self, table: BlockTable, num_tokens: int) -> list[Copy] | None:
        """Make room for so many more tokens.

        Returns:
            What must be copied before they are written; None if there are not enough blocks, and nothing has changed.
        """
        num_own = table.length % self.block_size
        tail = table.blocks[table.length // self.block_size] if num_own else None
        # A block in which others read on, or which holds something else behind, is not written to.
        is_shared = tail is not None and (tail.num_users > 1 or bool(tail.children) or len(tail.tokens) != num_own)
        num_wanted = -(-(table.length + num_tokens) // self.block_size)
        if num_wanted - len(table.blocks) + is_shared > self.num_available:
            return None
        copies = []
        if tail is not None and is_shared:
            own = self._allocate()
            table.blocks[table.length // self.block_size] = own
            self._attach(own, self._parent(table, table.length // self.block_size), tail.tokens[:num_own])
            copies.append(Copy(tail.number, own.number, 0, num_own))
            self._release(tail)
        while len(table.blocks) < num_wanted:
            table.blocks.append(self._allocate())
        return copies

    def commit(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Note that the sequence's next tokens are in the blocks that were reserved for them."""
        taken = 0
        while taken < len(tokens):
            index, num_own = divmod(table.length, self.block_size)
            block = table.blocks[index]
            part = tokens[taken : taken + self.block_size - num_own]
            if block.parent is None:
                self._attach(block, self._parent(table, index), part)
            else:
                block.tokens += part
            table.length += len(part)
            taken += len(part)

    def truncate(self, table: BlockTable, length: int) -> None:
        """Roll a sequence back to its first `length` tokens."""
        table.length = length
        self._drop_reserved(table)
        num_own = length % self.block_size
        if num_own:
            tail = table.blocks[-1]
            if tail.num_users == 1 and not tail.children:
                del tail.tokens[num_own:]

    def forget(self) -> None:
        """Free all blocks that no sequence holds."""
        while self._idle:
            self._evict()

    def _drop_reserved(self, table: BlockTable) -> None:
        """Give back the blocks behind the sequence's length, the last one first."""
        while len(table.blocks) > -(-table.length // self.block_size):
            self._release(table.blocks.pop())

    def _take_part(self, table: BlockTable, found: Block, num_own: int, num_equal: int) -> list[Copy] | None:
        """Reserve a block of the sequence's own for a part of another's; None if there is none."""
        # The found block must outlive the search for room.
        self._acquire(found)
        copies = self.reserve(table, num_equal - num_own)
        self._release(found)
        if copies is None:
            return None
        own = table.blocks[-1]
        return [*copies, Copy(found.number, own.number, num_own, num_equal)]

    def _parent(self, table: BlockTable, index: int) -> Block:
        return table.blocks[index - 1] if index else self._root

    def _allocate(self) -> Block:
        if not self._free:
            self._evict()
        return Block(self._free.pop(), num_users=1)

    def _evict(self) -> None:
        number, oldest = self._idle.popitem(last=False)
        _detach(oldest)
        self._free.append(number)

    def _attach(self, block: Block, parent: Block, tokens: Sequence[int]) -> None:
        block.parent, block.tokens = parent, list(tokens)
        parent.children.setdefault(tokens[0], []).append(block)

    def _acquire(self, block: Block) -> None:
        if block.num_users == 0:
            del self._idle[block.number]
        block.num_users += 1

    def _release(self, block: Block) -> None:
        block.num_users -= 1
        if block.num_users == 0:
            if block.parent is None:
                self._free.append(block.number)
            else:
                self._idle[block.number] = block


def _detach(block: Block) -> None:
    assert block.parent is not None
    assert not block.children
    siblings = block.parent.children[block.tokens[0]]
    siblings.remove(block)
    if not siblings:
        del block.parent.children[block.tokens[0]]


def _longest(parent: Block, wanted: Sequence[int]) -> tuple[Block | None, int]:
    """The child of `parent` that begins with the most of the wanted tokens, and how many these are."""
    best, num_best = None, 0
    for child in parent.children.get(wanted[0], ()):
        num_equal = num_common(child.tokens, wanted)
        if num_equal > num_best:
            best, num_best = child, num_equal
            if num_equal == len(wanted):
                break
    return best, num_best


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
