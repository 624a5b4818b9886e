"""A frozen base and the law that it and a guide have together, for training a guide under it.

Where both end in the same output layer E, as a guide does that was cut out of its base, the guided logits are
E (h_base + M h_guide) with M the guide's map (`derive.SilentOutput`): one product with E in place of two. What the base
says of a response, which never changes, is then its hidden states, and these are kept from one pass over the data to
the next.

Shapes: B sequences, T positions of the response, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actors.training.derive import SilentOutput
from actors.training.objective import (
    IGNORED,
    Batch,
    divergence,
    guided_logits,
    response_log_probs,
    response_logits,
    steered_law,
)

KEPT_BYTES = 2**31
"""Of hidden states, in each worker; those of later responses are computed anew each time."""

PROBE = (1, 2, 3, 4, 5)
"""Tokens by which two ways to the same logits are compared."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What two laws say of responses, in nats."""

    before_B: Tensor
    """log p(response | prompt) under the base."""

    guided_B: Tensor
    """The same under base and guide together."""

    divergence_B: Tensor
    """KL(both together || base), summed over the response's tokens."""


class BaseLaw:
    """What the base says of responses, and base and guide together at weight 1."""

    def __init__(self, base: Any, guide: Any) -> None:
        """Take both as they are before an adapter is added to the guide; the base is changed and no longer of use."""
        self._base = base.eval().requires_grad_(False)
        self._kept: dict[bytes, Tensor] = {}
        self._room = KEPT_BYTES
        self._weight_VD = shared_output(base, guide)
        if self._weight_VD is not None:
            guide.get_output_embeddings().ends_in_hidden = True
            base.set_output_embeddings(nn.Identity())

    def compare(self, model: Any, batch: Batch) -> Compared:
        """Return what the base says of the responses, and the base together with the guide `model`."""
        if self._weight_VD is None:
            with torch.no_grad():
                base_BTV = response_logits(self._base, batch)
            guided_BTV = guided_logits(base_BTV, response_logits(model, batch), 1.0)
            return Compared(
                before_B=response_log_probs(base_BTV, batch.targets_BT),
                guided_B=response_log_probs(guided_BTV, batch.targets_BT),
                divergence_B=divergence(guided_BTV, base_BTV, batch.targets_BT),
            )
        hidden_BTD = self._hidden(batch, self._weight_VD)
        shift_BTD = response_logits(model, batch)
        return Compared(*steered_law(shift_BTD, hidden_BTD, self._weight_VD, batch.targets_BT))

    @torch.no_grad()
    def _hidden(self, batch: Batch, weight_VD: Tensor) -> Tensor:
        """The base's last hidden states at the responses' tokens, [B, T, D]."""
        keys = [_key(tokens, mask) for tokens, mask in zip(batch.tokens_BL, batch.mask_BL, strict=True)]
        if not all(key in self._kept for key in keys):
            hidden_BTD = response_logits(self._base, batch)
            for key, hidden_TD, targets_T in zip(keys, hidden_BTD, batch.targets_BT, strict=True):
                self._keep(key, hidden_TD[targets_T != IGNORED].to(weight_VD.dtype))
            return hidden_BTD
        hidden_BTD = nn.utils.rnn.pad_sequence([self._kept[key] for key in keys], batch_first=True).float()
        num_missing = batch.targets_BT.shape[1] - hidden_BTD.shape[1]
        return F.pad(hidden_BTD, (0, 0, 0, num_missing))

    def _keep(self, key: bytes, hidden_TD: Tensor) -> None:
        size = hidden_TD.numel() * hidden_TD.element_size()
        if key not in self._kept and size <= self._room:
            self._kept[key] = hidden_TD.clone()
            self._room -= size


def shared_output(base: Any, guide: Any) -> Tensor | None:
    """Return the output layer [V, D] that base and guide share, if logits are nothing but its product."""
    output = guide.get_output_embeddings()
    own = base.get_output_embeddings()
    is_same = (
        isinstance(output, SilentOutput)
        and isinstance(own, nn.Linear)
        and own.bias is None
        and own.weight.shape == output.weight.shape
        and torch.equal(own.weight.to(output.weight.dtype), output.weight)
    )
    if not is_same or not _is_all(base, own):
        return None
    weight: Tensor = own.weight.detach()
    return weight


@torch.no_grad()
def _is_all(base: Any, output: nn.Linear) -> bool:
    """Whether the base's logits are its output layer's product and nothing more: some scale or cap it."""
    tokens = torch.tensor([PROBE], device=output.weight.device) % base.config.get_text_config(decoder=True).vocab_size
    logits = base(input_ids=tokens, use_cache=False).logits
    base.set_output_embeddings(nn.Identity())
    hidden = base(input_ids=tokens, use_cache=False).logits
    base.set_output_embeddings(output)
    return hidden.shape[-1] == output.in_features and torch.equal(output(hidden), logits)


def _key(tokens_L: Tensor, mask_L: Tensor) -> bytes:
    """A sequence's tokens without its padding."""
    return tokens_L[mask_L.bool()].cpu().numpy().tobytes()
