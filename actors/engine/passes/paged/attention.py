"""Launching the attention kernels for a step.

Shapes: N tokens of the step, U tiles, S sequences, W blocks of the longest of them, H query heads, K key-value heads,
D key width, E value width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actors.engine.blocks import BLOCK_SIZE
from actors.engine.passes.cache import LayerCache
from actors.engine.passes.paged import kernels

NUM_SPLITS = 16
"""Programs that share the keys of a sequence's one token: few sequences occupy a whole GPU then."""

_UNLIMITED = 1 << 30
"""The window of a layer that sees all positions."""

_MIN_SIDE = 16
"""Of a matrix in a kernel's product."""

_MAX_KEY_BYTES = 2**14
"""Of the keys, or the values, that a program holds at once."""

_MAX_ROWS, _MAX_QUERY_BYTES = 64, 2**15
"""Of a prompt's tile, where one token has no more."""


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Queries of one launch, in tiles of consecutive tokens of a sequence."""

    places_3U: Tensor
    """int64: each tile's first token, number of tokens, and sequence."""

    num_tokens: int
    """Of a tile, at most."""

    num_splits: int
    """Programs that share a tile's keys."""


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What a pass reads, on the device: all int64."""

    tokens_N: Tensor

    positions_N: Tensor

    places_N: Tensor
    """Positions in the cache."""

    blocks_WS: Tensor
    """Each sequence's blocks, in order."""

    tiles: Sequence[Tiles]


class PagedAttention:
    """The attention pass of one step; see `AttentionPass`."""

    def __init__(self, caches: Mapping[nn.Module, LayerCache], inputs: StepInputs) -> None:
        self._caches = caches
        self._inputs = inputs

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, options: dict[str, Any]
    ) -> Tensor:
        """Write the step's keys and values into the layer's cache, and attend."""
        cache = self._caches[layer]
        cache.write(key, value, self._inputs.places_N)
        output_NHE = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        query_HND = query[0] if query.stride(-1) == 1 else query[0].contiguous()
        for tiles in self._inputs.tiles:
            _launch(query_HND, cache, output_NHE, self._inputs, tiles, options)
        return output_NHE[None]


def tile_tokens(*, group: int, width: int, itemsize: int) -> int:
    """Return how many tokens of a prompt attend as one tile.

    Args:
        group: query heads to a key-value head.
        width: of a query head.
        itemsize: bytes of a number.
    """
    return max(1, min(_MAX_ROWS, _MAX_QUERY_BYTES // (_lanes(width) * itemsize)) // group)


def kernel_sizes(
    *, num_heads: int, num_key_heads: int, key_width: int, value_width: int, itemsize: int, num_tokens: int
) -> dict[str, int]:
    """Return the sizes that the kernels are compiled for.

    Args:
        num_heads: of queries.
        num_key_heads: of keys and values.
        key_width: of a head.
        value_width: of a head.
        itemsize: bytes of a number in the cache.
        num_tokens: of a tile.
    """
    group = num_heads // num_key_heads
    key_lanes, value_lanes = _lanes(key_width), _lanes(value_width)
    return {
        "BLOCK_SIZE": BLOCK_SIZE,
        "NUM_HEADS": num_key_heads,
        "GROUP": group,
        "TOKENS": num_tokens,
        "ROWS": _lanes(num_tokens * group),
        "KEY_WIDTH": key_width,
        "KEY_LANES": key_lanes,
        "VALUE_WIDTH": value_width,
        "VALUE_LANES": value_lanes,
        "KEYS": max(_MIN_SIDE, min(64, _MAX_KEY_BYTES // (max(key_lanes, value_lanes) * itemsize))),
    }


def _lanes(width: int) -> int:
    """Return the side of a matrix in a kernel's product that holds so many numbers."""
    return max(_MIN_SIDE, 1 << (width - 1).bit_length())


def _launch(
    query_HND: Tensor,
    cache: LayerCache,
    output_NHE: Tensor,
    inputs: StepInputs,
    tiles: Tiles,
    options: Mapping[str, Any],
) -> None:
    """Write the attention of some tiles' queries to the output."""
    _, num_key_heads, key_width = cache.keys.shape
    sizes = kernel_sizes(
        num_heads=query_HND.shape[0],
        num_key_heads=num_key_heads,
        key_width=key_width,
        value_width=cache.values.shape[2],
        itemsize=cache.keys.itemsize,
        num_tokens=tiles.num_tokens,
    )
    num_tiles = tiles.places_3U.shape[1]
    scaling, cap = options.get("scaling"), options.get("softcap")
    grid = (num_tiles, num_key_heads, tiles.num_splits)
    parts = states = output_NHE
    if tiles.num_splits > 1:
        part = (sizes["TOKENS"] * sizes["GROUP"], sizes["VALUE_WIDTH"])
        parts = output_NHE.new_empty(*grid, *part, dtype=torch.float32)
        states = output_NHE.new_empty(*grid, 2, sizes["ROWS"], dtype=torch.float32)
    kernels.attend[grid](
        query_HND,
        cache.keys,
        cache.values,
        output_NHE,
        parts,
        states,
        inputs.positions_N,
        tiles.places_3U,
        inputs.blocks_WS,
        num_tiles,
        inputs.blocks_WS.shape[1],
        float(key_width**-0.5 if scaling is None else scaling),
        float(cap or 1.0),
        cache.window or _UNLIMITED,
        query_HND.stride(0),
        query_HND.stride(1),
        SPLITS=tiles.num_splits,
        IS_CAPPED=cap is not None,
        **sizes,
    )
    if tiles.num_splits > 1:
        used = {name: sizes[name] for name in ("NUM_HEADS", "GROUP", "TOKENS", "ROWS", "VALUE_WIDTH", "VALUE_LANES")}
        kernels.join[grid[:2]](output_NHE, parts, states, tiles.places_3U, num_tiles, SPLITS=tiles.num_splits, **used)
