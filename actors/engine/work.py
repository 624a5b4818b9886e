"""What sequences do in one step, and where they lie in the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from actors.engine.blocks import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Work:
    """What one sequence does in a step."""

    sequence: str
    """Key of an open sequence."""

    tokens: Sequence[int]
    """Appended to its cache, at least one: a chunk of the prompt, one token, or a window of drafts."""

    rows: Sequence[int]
    """Indices into `tokens` whose next-token logits are wanted; may be empty."""


@dataclass(frozen=True, eq=False)
class PlacedWork:
    """Work and where its sequence lies."""

    work: Work
    blocks: Sequence[int]
    """Numbers of the sequence's blocks, in order."""

    length: int
    """Tokens that the sequence holds before the step."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step appends."""
        return len(self.work.tokens)

    @cached_property
    def places(self) -> Tensor:
        """Of all the sequence's tokens, the step's included: their positions in the cache, int64."""
        firsts = torch.tensor(self.blocks) * BLOCK_SIZE
        return (firsts[:, None] + torch.arange(BLOCK_SIZE)).flatten()[: self.length + self.num_tokens]
