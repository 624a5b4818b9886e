"""The guided distribution's logits: base plus weighted guides.

Shapes: B rows, V the base's vocabulary, U a guide's vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Guidance(NamedTuple):
    """One guide's say in one row."""

    weight: float
    """w = 1 / beta in the paper's notation; negative to move away from the guide."""

    logits: Tensor
    """The guide's next-token logits [U], over the common tokens or more."""


class Spelled:
    """The tokens that a vocabulary holds: models have columns for others, which are never to be drawn."""

    def __init__(self, tokens: Collection[int]) -> None:
        """Take the ids of all tokens, at least one."""
        self._tokens = frozenset(tokens)
        self._num_columns = max(tokens) + 1
        self._gaps: Tensor | None = None
        if len(self._tokens) < self._num_columns:
            self._gaps = torch.full((self._num_columns,), -torch.inf)
            self._gaps[torch.tensor(sorted(self._tokens))] = 0.0

    def __contains__(self, token: int) -> bool:
        return token in self._tokens

    @property
    def num_columns(self) -> int:
        """Columns up to the last token."""
        return self._num_columns

    def cut(self, row_V: Tensor) -> Tensor:
        """Return a view of a row that ends with the last token."""
        return row_V[: self._num_columns]

    def guidance(self) -> list[Guidance]:
        """Return what forbids the columns between tokens, to be summed after the guides; nothing if there are none."""
        return [] if self._gaps is None else [Guidance(1.0, self._gaps)]


def merge(base: Sequence[Tensor], guidance: Sequence[Sequence[Guidance]]) -> Tensor:
    """Return the guided logits z_BV = base + sum_i w_i * guide_i, in float32.

    A constant per row changes nothing after the softmax, so raw logits stand in for log-probabilities
    (GenARM, arXiv 2410.08193: p proportional to p_base * prod_i p_i^(w_i)). What a guide has beyond V is cut off;
    tokens of the base beyond a guide's U get -inf, since that guide gives them probability 0.

    Args:
        base: B rows of the base's logits, each [V], of any floating dtype.
        guidance: for each row its guides, always in the same order, since sums round by order.
    """
    z_BV = torch.stack(list(base)).float()
    for z_V, guides in zip(z_BV, guidance, strict=True):
        for weight, logits_U in guides:
            num_common = min(len(z_V), len(logits_U))
            z_V[:num_common].add_(logits_U[:num_common], alpha=weight)
            if weight < 0:
                # What the guide forbids stays forbidden: minus times minus infinity would make it certain.
                z_V[:num_common].masked_fill_(logits_U[:num_common] == -torch.inf, -torch.inf)
            z_V[num_common:] = -torch.inf
    return z_BV
