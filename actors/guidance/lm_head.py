"""From a model's last hidden state to its logits, apart from the model: z = W h, and what an architecture adds to it.

Shapes: R rows, D hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutputFunction:
    """A model's output function, on the processor: z = softcap(W h + b, divided).

    Its pickle (protocol 5) brings the tensors as buffers, which Ray's object store hands over without a copy; they
    are read-only memory then.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    divisor: float | None = None
    """What products are divided by (Granite)."""

    softcap: float | None = None
    """The bound c of c * tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2)."""

    @torch.inference_mode()
    def __call__(self, hidden_RD: Tensor) -> Tensor:
        """Return the logits [R, V] in the dtype of weights and hidden states, rounded where the model rounds."""
        logits_RV = linear(hidden_RD, self.weight_VD, self.bias_V)
        if self.divisor is not None:
            logits_RV.div_(self.divisor)
        if self.softcap is not None:
            logits_RV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_RV

    def __reduce__(self) -> tuple[Callable[..., "OutputFunction"], tuple[Any, ...]]:
        # A tensor would pickle itself through several copies in memory.
        bias = None if self.bias_V is None else _to_bytes(self.bias_V)
        return _restore, (_to_bytes(self.weight_VD), bias, self.weight_VD.dtype, self.divisor, self.softcap)


def _restore(
    weight: NDArray[np.uint8],
    bias: NDArray[np.uint8] | None,
    dtype: torch.dtype,
    divisor: float | None,
    softcap: float | None,
) -> OutputFunction:
    return OutputFunction(
        weight_VD=_from_bytes(weight, dtype),
        bias_V=None if bias is None else _from_bytes(bias, dtype),
        divisor=divisor,
        softcap=softcap,
    )


def _to_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The tensor's own memory; its last dimension in bytes, since numpy has no bfloat16."""
    array: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return array


def _from_bytes(array: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    # `from_numpy` takes no read-only memory without a warning; nothing writes to it here.
    return torch.from_dlpack(array).view(dtype)
