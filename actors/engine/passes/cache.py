"""One layer's keys and values, allocated once for all sequences.

Shapes: P positions of all blocks together, K key-value heads, D key width, E value width, N tokens of a step,
B sequences, L keys of each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.blocks import BLOCK_SIZE, Copy
from actors.engine.models.inspection import Layer


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The cache of one attention layer."""

    keys: Tensor
    """[P, K, D]"""

    values: Tensor
    """[P, K, E]"""

    window: int | None
    """How many positions a token sees, itself included; none for all."""

    @classmethod
    def allocate(cls, layer: Layer, num_positions: int) -> "LayerCache":
        """Allocate a layer's cache, all of it at once; sliding layers get all positions too, so that rolling back
        stays free.
        """

        def zeros(width: int) -> Tensor:
            shape = (num_positions, layer.num_heads, width)
            # Written, not merely promised: memory that is missing is missed now, not under load.
            return torch.empty(shape, dtype=layer.dtype, device=layer.device).zero_()

        return cls(zeros(layer.key_width), zeros(layer.value_width), layer.window)

    def write(self, key: Tensor, value: Tensor, positions_N: Tensor) -> None:
        """Write keys [1, K, N, D] and values [1, K, N, E] of a step's tokens to where they belong."""
        self.keys.index_copy_(0, positions_N, key[0].transpose(0, 1))
        self.values.index_copy_(0, positions_N, value[0].transpose(0, 1))

    def read(self, places_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys [B, K, L, D] and values [B, K, L, E] that lie at places."""
        places = places_BL.view(-1)
        keys = self.keys.index_select(0, places).view(*places_BL.shape, *self.keys.shape[1:])
        values = self.values.index_select(0, places).view(*places_BL.shape, *self.values.shape[1:])
        return keys.transpose(1, 2), values.transpose(1, 2)

    def copy(self, sources_N: Tensor, targets_N: Tensor) -> None:
        """Copy keys and values from positions to others."""
        self.keys[targets_N] = self.keys[sources_N]
        self.values[targets_N] = self.values[sources_N]


def copy_blocks(caches: Iterable[LayerCache], copies: Sequence[Copy], device: torch.device) -> None:
    """Copy keys and values between blocks, one copy after the other, in the caches of all layers."""
    for source, target, start, stop in copies:
        positions = torch.arange(start, stop, device=device)
        for cache in caches:
            cache.copy(source * BLOCK_SIZE + positions, target * BLOCK_SIZE + positions)
