"""How a transformers model reaches the engine's cache: one attention function and one mask function.

Both are registered under one name with transformers' `AttentionInterface` and `AttentionMaskInterface`. The pass that a
forward call belongs to is a context variable, since not every architecture hands unknown keyword arguments down to its
attention. Threads have contexts of their own, so that any number of engines share a process.

Shapes: N tokens of a step, H query heads, D head width, C positions of a slot, S slots, K key-value heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATION = "trimtab"
"""The name of the attention implementation that an engine sets on its model."""

MaskFunction = Callable[[int, int, Tensor, Tensor], Tensor]
"""transformers' index form of a mask: (batch, head, query position, key position) -> may attend."""


class AttentionPass(Protocol):
    """What one forward call does where a layer attends."""

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, options: dict[str, Any]
    ) -> Tensor:
        """Return the attention's output [1, N, H, D].

        Args:
            layer: the attention module that asks.
            query: [1, H, N, D], rotated as the model does it; key and value likewise, [1, K, N, D].
            mask: what `_keep_mask_function` returned for this layer.
            options: the model's other arguments: `scaling`, `softcap`, ...
        """
        ...


_current_pass: ContextVar[AttentionPass] = ContextVar("trimtab_attention_pass")


@contextmanager
def attending(attention_pass: AttentionPass) -> Iterator[None]:
    """Let the forward calls in this block attend as `attention_pass` does."""
    token = _current_pass.set(attention_pass)
    try:
        yield
    finally:
        _current_pass.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **options: Any
) -> tuple[Tensor, None]:
    return _current_pass.get().attend(module, query, key, value, attention_mask, options), None


def _keep_mask_function(*, mask_function: MaskFunction, **_: Any) -> MaskFunction:
    """Hand the mask's definition to the layers in place of a mask.

    The engine's masks depend on the plan of a step; only which window a layer has depends on the model.
    """
    return mask_function


# A registration by name is the public way in; it adds an entry and changes nothing for other models.
AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _keep_mask_function)


def soft_capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None, softcap: float
) -> Tensor:
    """Return attention over scores c * tanh(score / c), as Gemma 2 has it (arXiv 2408.00118, section 2).

    Args:
        query: [B, H, T, D].
        key: [B, K, L, D], value alike; H is a multiple of K.
        mask: additive, [B, 1, T, L] or [T, L]; none where all queries see all keys.
        scaling: factor of the scores, D ** -0.5 if none.
        softcap: the bound c.
    """
    num_queries_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(num_queries_per_key, dim=1)
    value = value.repeat_interleave(num_queries_per_key, dim=1)
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
