"""A prompt that an answer echoes: its text, and its tokens' log probabilities.

For those the prompt is read in chunks of which every row comes back, and the row behind a token tells of the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.guidance.scoring import RowScores

CHUNK_TOKENS = 32
"""Rows of a chunk that are on their way at once, of every model."""


@dataclass(slots=True, eq=False, kw_only=True)
class Echo:
    """What is told of a prompt before its answer."""

    text: str
    tokens: Sequence[int]
    """In the base's tokens, and in those of the guides."""

    is_scored: bool
    """Whether its tokens' log probabilities are told."""

    scores: list[RowScores] = field(default_factory=list)
    """Of the tokens from the second on."""

    num_read: int = 0
    """Tokens that were handed out to be read."""

    @property
    def is_read(self) -> bool:
        """Whether nothing of it is left to be read for its scores."""
        return not self.is_scored or len(self.scores) == len(self.tokens) - 1

    def next_chunk(self) -> list[int]:
        """Return the next tokens to be read; none at the end."""
        chunk = list(self.tokens[self.num_read : self.num_read + CHUNK_TOKENS])
        self.num_read += len(chunk)
        return chunk
