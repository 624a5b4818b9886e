"""A pass through transformers' own modules, and its plan of a step: which token goes where, and who attends together.

Sequences that append equally many tokens and have similar lengths attend in one call, on keys and values gathered from
their blocks.

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
from transformers import PreTrainedModel

from actors.engine.blocks import Copy
from actors.engine.models.attention import attending, soft_capped_attention
from actors.engine.passes.cache import LayerCache, copy_blocks
from actors.engine.work import PlacedWork

MAX_PADDING = 2
"""A group may read at most this many times the keys that its sequences need."""


@dataclass(slots=True)
class _Group:
    """Sequences that append equally many tokens and are neighbours in the step."""

    first_token: int
    num_tokens: int
    """T, of each sequence."""

    members: list[PlacedWork]

    def can_take(self, placed: PlacedWork) -> bool:
        """Whether a sequence, at least as long as these, can attend with them without reading much for nothing."""
        num_needed = sum(len(member.places) for member in self.members) + len(placed.places)
        num_read = len(placed.places) * (len(self.members) + 1)
        return placed.num_tokens == self.num_tokens and num_read <= MAX_PADDING * num_needed


@dataclass(frozen=True, slots=True)
class _Reach:
    """What a group sees of a layer's cache."""

    places_BL: Tensor
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
        # Sequences that can attend together are neighbours among the tokens too.
        order = sorted(range(len(work)), key=lambda index: (work[index].num_tokens, len(work[index].places)))
        ordered = [work[index] for index in order]
        first_tokens = [0, *accumulate(placed.num_tokens for placed in ordered)]
        self._groups = list(_groups(ordered, first_tokens[:-1]))
        self.tokens_N = torch.tensor([token for placed in ordered for token in placed.work.tokens], device=device)
        self.positions_N = torch.tensor(
            [position for placed in ordered for position in range(placed.length, len(placed.places))], device=device
        )
        self._places_N = torch.cat([placed.places[placed.length :] for placed in ordered]).to(device)
        first_token_of = dict(zip(order, first_tokens[:-1], strict=True))
        rows = [first_token_of[index] + row for index, placed in enumerate(work) for row in placed.work.rows]
        self.rows_R = torch.tensor(rows, dtype=torch.int64, device=device)
        """Indices into the N tokens, in the order of the work and of each one's rows."""

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, options: dict[str, Any]
    ) -> Tensor:
        """Write the step's keys and values into the layer's cache, and attend; see `AttentionPass`."""
        cache = self._caches[layer]
        cache.write(key, value, self._places_N)
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
            group.members.append(placed)
            continue
        if group is not None:
            yield group
        group = _Group(first_token, placed.num_tokens, [placed])
    if group is not None:
        yield group


def _reach(group: _Group, window: int | None, query: Tensor) -> _Reach:
    """Work out which keys a group's queries see in layers of one window."""
    lengths = [member.length for member in group.members]
    end_key = max(lengths) + group.num_tokens
    first_key = 0 if window is None else max(0, min(lengths) - window + 1)
    # What is missing of the shorter ones reads place 0, which holds zeros and is masked.
    places_BL = torch.zeros(len(lengths), end_key - first_key, dtype=torch.int64)
    for places_L, member in zip(places_BL, group.members, strict=True):
        places_L[: len(member.places) - first_key] = member.places[first_key:]
    places_BL = places_BL.to(query.device)
    is_windowed = window is not None and window < end_key - first_key
    if len(set(lengths)) == 1 and not is_windowed:
        if group.num_tokens == 1:
            return _Reach(places_BL, False, None)
        if lengths[0] == 0:
            return _Reach(places_BL, True, None)
    lengths_B = torch.tensor(lengths, device=query.device)
    queries_BT1 = (lengths_B[:, None] + torch.arange(group.num_tokens, device=query.device))[..., None]
    keys_L = torch.arange(first_key, end_key, device=query.device)
    is_seen = keys_L <= queries_BT1
    if window is not None:
        is_seen &= keys_L > queries_BT1 - window
    mask = torch.zeros(is_seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~is_seen, -torch.inf)
    return _Reach(places_BL, False, mask[:, None])


def _attend_group(group: _Group, reach: _Reach, query: Tensor, cache: LayerCache, options: dict[str, Any]) -> Tensor:
    """Return a group's attention output [1, B * T, H, D]."""
    num_sequences = len(group.members)
    num_tokens = num_sequences * group.num_tokens
    tokens = query[0, :, group.first_token : group.first_token + num_tokens]
    num_heads, _, width = tokens.shape
    query_BHTD = tokens.view(num_heads, num_sequences, group.num_tokens, width).transpose(0, 1)
    keys, values = cache.read(reach.places_BL)
    scaling, softcap = options.get("scaling"), options.get("softcap")
    if softcap is not None:
        mask = _causal_mask(group.num_tokens, query) if reach.is_causal else reach.mask
        output = soft_capped_attention(query_BHTD, keys, values, mask, scaling=scaling, softcap=softcap)
    elif group.num_tokens == 1:
        # Queries that share a key-value head attend like so many tokens of it: fewer and larger products.
        shared = query_BHTD.reshape(num_sequences, keys.shape[1], -1, width)
        output = scaled_dot_product_attention(shared, keys, values, attn_mask=reach.mask, scale=scaling)
        output = output.reshape(num_sequences, num_heads, 1, -1)
    else:
        output = scaled_dot_product_attention(
            query_BHTD,
            keys,
            values,
            attn_mask=reach.mask,
            is_causal=reach.is_causal,
            scale=scaling,
            enable_gqa=keys.shape[1] != num_heads,
        )
    return output.transpose(1, 2).reshape(1, num_tokens, num_heads, output.shape[3])


def _causal_mask(num_tokens: int, query: Tensor) -> Tensor:
    mask = torch.full((num_tokens, num_tokens), -torch.inf, dtype=query.dtype, device=query.device)
    return mask.triu(diagonal=1)


class TransformersPass:
    """A pass through transformers' own modules, with the engine's attention: for any architecture and device."""

    def __init__(
        self, model: PreTrainedModel, caches: Mapping[nn.Module, LayerCache], *, gives_hidden_states: bool
    ) -> None:
        self._model = model
        self._gives_hidden_states = gives_hidden_states
        self._caches = caches

    @property
    def description(self) -> str:
        """How it computes."""
        return "transformers' modules, keys and values gathered for every step"

    def run(self, work: Sequence[PlacedWork], room: Tensor | None = None) -> Tensor:
        """Append tokens and return the asked rows; see `ForwardPass`."""
        plan = StepPlan(work, self._caches, self._model.device)
        inputs = {"input_ids": plan.tokens_N[None], "position_ids": plan.positions_N[None], "use_cache": False}
        with attending(plan):
            if self._gives_hidden_states:
                hidden: Tensor = self._model.base_model(**inputs).last_hidden_state[0]
                return hidden[plan.rows_R]
            logits: Tensor = self._model(**inputs, logits_to_keep=plan.rows_R).logits[0]
            return logits

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy keys and values between blocks; see `ForwardPass`."""
        copy_blocks(self._caches.values(), copies, self._model.device)
