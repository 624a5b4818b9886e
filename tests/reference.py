"""Comparing a service with the one-process reference, by what 'the same' means."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.guidance.reference import ReferenceText

MARGIN = 1e-4
"""Where the reference's two best scores are closer, rounding may choose either, and the comparison stops."""

MAX_TIES = 1 / 5000
"""Such places per token, at most (and one in any comparison)."""


@dataclass
class Comparison:
    """Collects sequences; `finish` judges them together."""

    num_tokens: int = 0
    num_ties: int = 0

    def add(self, label: Any, tokens: Sequence[int], reference: ReferenceText) -> None:
        """Check that a sequence has the reference's tokens, up to a tie."""
        for position, (ours, theirs) in enumerate(zip(tokens, reference.tokens, strict=False)):
            self.num_tokens += 1
            if ours != theirs:
                margin = reference.margins[position]
                assert margin <= MARGIN, f"{label}: token {position} is {ours}, not {theirs} (margin {margin:.2g})"
                print(f"{label}: tie at token {position}, margin {margin:.2g}")
                self.num_ties += 1
                return
        assert len(tokens) == len(reference.tokens), label

    def finish(self) -> None:
        """Check that there was something to compare and that ties are rare."""
        assert self.num_tokens > 0
        assert self.num_ties <= max(1, self.num_tokens * MAX_TIES)
