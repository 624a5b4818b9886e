"""One step's plan: which token goes where, which sequences attend together, and which rows are asked for.

Sequences that lie in neighbouring slots, append equally many tokens and have similar lengths attend in one call on a
view of the cache; so nothing of the cache is ever copied.

Shapes: N tokens of the step, B sequences of a group, T tokens of each of them, L keys they see, R asked rows,
H query heads, K key-value heads, D head width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from actors.engine.attention import soft_capped_attention
from actors.engine.cache import LayerCache

MAX_PADDING = 2
"""A group may read at most this many times the keys that its sequences need."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one sequence does in a step."""

    sequence: str
    """Key of an open sequence."""

    tokens: Sequence[int]
    """Appended to its cache, at least one: a chunk of the prompt, one token, or a window of drafts."""

    rows: Sequence[int]
    """Indices into `tokens` whose next-token logits are wanted; may be empty."""


@dataclass(frozen=True, slots=True)
class PlacedWork:
    """Work and where its sequence lies."""

    work: Work
    slot: int
    length: int
    """Tokens that the sequence holds before the step."""


@dataclass(slots=True)
class _Group:
    """Sequences in neighbouring slots that append equally many tokens."""

    first_slot: int
    first_token: int
    num_tokens: int
    """T, of each sequence."""

    lengths: list[int]
    """Tokens that each of the B sequences holds before the step."""

    def can_take(self, placed: PlacedWork) -> bool:
        """Whether a sequence can attend with these without reading much that nobody needs."""
        lengths = [*self.lengths, placed.length]
        longest = max(lengths) + self.num_tokens
        needed = sum(lengths) + self.num_tokens * len(lengths)
        return (
            placed.slot == self.first_slot + len(self.lengths)
            and len(placed.work.tokens) == self.num_tokens
            and longest * len(lengths) <= MAX_PADDING * needed
        )


@dataclass(frozen=True, slots=True)
class _Reach:
    """What a group sees of a layer's cache."""

    first_key: int
    end_key: int
    is_causal: bool
    mask: Tensor | None
    """Additive, [B, 1, T, L]; none where all queries see all keys, or where `is_causal` says it."""


class StepPlan:
    """The plan of one step, and the attention pass that carries it out."""

    def __init__(
        self, work: Sequence[PlacedWork], caches: Mapping[nn.Module, LayerCache], device: torch.device
    ) -> None:
        """Lay out a step.

        Args:
            work: each sequence at most once, already checked.
            caches: the cache of each attention module of the model.
            device: where the model computes.
        """
        self._caches = caches
        self._reaches: dict[int | None, list[_Reach]] = {}
        # In the order of slots, sequences that can attend together are neighbours among the tokens too.
        order = sorted(range(len(work)), key=lambda index: work[index].slot)
        by_slot = [work[index] for index in order]
        counts = [len(placed.work.tokens) for placed in by_slot]
        first_tokens = [0, *accumulate(counts)]
        self._groups = list(_groups(by_slot, first_tokens[:-1]))
        layout = torch.tensor(
            [
                [token for placed in by_slot for token in placed.work.tokens],
                [placed.length + i for placed in by_slot for i in range(len(placed.work.tokens))],
                [placed.slot for placed in by_slot for _ in placed.work.tokens],
            ]
        ).to(device)
        self.tokens_N, self.positions_N, self._slots_N = layout
        first_token_of = dict(zip(order, first_tokens[:-1], strict=True))
        rows = [first_token_of[index] + row for index, placed in enumerate(work) for row in placed.work.rows]
        self.rows_R = torch.tensor(rows, dtype=torch.int64).to(device)
        """Indices into the N tokens, in the order of the work and of each one's rows."""

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, options: dict[str, Any]
    ) -> Tensor:
        """Write the step's keys and values into the layer's cache, and attend; see `AttentionPass`."""
        cache = self._caches[layer]
        cache.write(key, value, self._slots_N, self.positions_N)
        reaches = self._reaches.get(cache.window)
        if reaches is None:
            reaches = [_reach(group, cache.window, query) for group in self._groups]
            self._reaches[cache.window] = reaches
        outputs = [
            _attend_group(group, reach, query, cache, options)
            for group, reach in zip(self._groups, reaches, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _groups(work: Sequence[PlacedWork], first_tokens: Sequence[int]) -> Iterator[_Group]:
    group: _Group | None = None
    for placed, first_token in zip(work, first_tokens, strict=True):
        if group is not None and group.can_take(placed):
            group.lengths.append(placed.length)
            continue
        if group is not None:
            yield group
        group = _Group(placed.slot, first_token, len(placed.work.tokens), [placed.length])
    if group is not None:
        yield group


def _reach(group: _Group, window: int | None, query: Tensor) -> _Reach:
    """Work out which keys a group's queries see in layers of one window."""
    end_key = max(group.lengths) + group.num_tokens
    first_key = 0 if window is None else max(0, min(group.lengths) - window + 1)
    is_windowed = window is not None and window < end_key - first_key
    if len(set(group.lengths)) == 1 and not is_windowed:
        if group.num_tokens == 1:
            return _Reach(first_key, end_key, False, None)
        if group.lengths[0] == 0:
            return _Reach(first_key, end_key, True, None)
    lengths_B = torch.tensor(group.lengths, device=query.device)
    queries_BT1 = (lengths_B[:, None] + torch.arange(group.num_tokens, device=query.device))[..., None]
    keys_L = torch.arange(first_key, end_key, device=query.device)
    is_seen = keys_L <= queries_BT1
    if window is not None:
        is_seen &= keys_L > queries_BT1 - window
    mask = torch.zeros(is_seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~is_seen, -torch.inf)
    return _Reach(first_key, end_key, False, mask[:, None])


def _attend_group(group: _Group, reach: _Reach, query: Tensor, cache: LayerCache, options: dict[str, Any]) -> Tensor:
    """Return a group's attention output [1, B * T, H, D]."""
    num_sequences = len(group.lengths)
    num_tokens = num_sequences * group.num_tokens
    tokens = query[0, :, group.first_token : group.first_token + num_tokens]
    num_heads, _, width = tokens.shape
    query_BHTD = tokens.view(num_heads, num_sequences, group.num_tokens, width).transpose(0, 1)
    slots = slice(group.first_slot, group.first_slot + num_sequences)
    keys = cache.keys[slots, :, reach.first_key : reach.end_key]
    values = cache.values[slots, :, reach.first_key : reach.end_key]
    scaling, softcap = options.get("scaling"), options.get("softcap")
    if softcap is None:
        output = scaled_dot_product_attention(
            query_BHTD,
            keys,
            values,
            attn_mask=reach.mask,
            is_causal=reach.is_causal,
            scale=scaling,
            enable_gqa=keys.shape[1] != query_BHTD.shape[1],
        )
    else:
        mask = _causal_mask(group.num_tokens, query) if reach.is_causal else reach.mask
        output = soft_capped_attention(query_BHTD, keys, values, mask, scaling=scaling, softcap=softcap)
    return output.transpose(1, 2).reshape(1, num_tokens, output.shape[1], output.shape[3])


def _causal_mask(num_tokens: int, query: Tensor) -> Tensor:
    mask = torch.full((num_tokens, num_tokens), -torch.inf, dtype=query.dtype, device=query.device)
    return mask.triu(diagonal=1)
