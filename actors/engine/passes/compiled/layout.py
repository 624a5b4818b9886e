"""Weights as the compiled passes read them.

Shapes: O columns of a product, I inputs, P panels of `LANES` columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.engine.passes.compiled.kernels import LANES


def num_panels(num_columns: int) -> int:
    """Return how many panels hold so many columns."""
    return -(-num_columns // LANES)


def panels(weights: Sequence[Tensor]) -> Tensor:
    """Return matrices [O, I], one below the other, as panels [P, I, LANES]; columns that are missing are zeros."""
    num_columns = sum(map(len, weights))
    padding = weights[0].new_zeros(num_panels(num_columns) * LANES - num_columns, weights[0].shape[1])
    panels_PLI = torch.cat([*weights, padding]).view(-1, LANES, weights[0].shape[1])
    return panels_PLI.transpose(1, 2).contiguous()
