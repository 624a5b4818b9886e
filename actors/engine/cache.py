"""One layer's keys and values, allocated once for all sequences.

Shapes: S slots, K key-value heads, C positions of a slot, D key width, E value width, N tokens of a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.inspection import Layer


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The cache of one attention layer."""

    keys: Tensor
    """[S, K, C, D]"""

    values: Tensor
    """[S, K, C, E]"""

    window: int | None
    """How many positions a token sees, itself included; none for all."""

    @classmethod
    def allocate(cls, layer: Layer, num_slots: int, num_positions: int) -> "LayerCache":
        """Allocate a layer's cache; sliding layers get all positions too, so that rolling back stays free."""

        def zeros(width: int) -> Tensor:
            shape = (num_slots, layer.num_heads, num_positions, width)
            return torch.zeros(shape, dtype=layer.dtype, device=layer.device)

        return cls(zeros(layer.key_width), zeros(layer.value_width), layer.window)

    def write(self, key: Tensor, value: Tensor, slots_N: Tensor, positions_N: Tensor) -> None:
        """Write keys [1, K, N, D] and values [1, K, N, E] of a step's tokens to where they belong."""
        self.keys[slots_N, :, positions_N] = key[0].transpose(0, 1)
        self.values[slots_N, :, positions_N] = value[0].transpose(0, 1)

    def clear(self, slot: int, length: int) -> None:
        """Zero the first positions of a slot.

        Masked positions are multiplied by zero, which leaves nothing of them unless they are infinite or NaN.
        """
        self.keys[slot, :, :length].zero_()
        self.values[slot, :, :length].zero_()
