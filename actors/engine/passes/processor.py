"""Making a transformers model's own products compute faster on a processor, in float32.

For architectures that no compiled pass knows. Each product is compared with the module's own on a probe first. Knows
nothing of the cache or of sequences.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.engine.passes.compiled import kernels
from actors.engine.passes.compiled.product import Product
from actors.engine.passes.compiled.team import has_team

_TOLERANCE = 1e-4
"""Largest difference from the module's own numbers, relative to the largest of a row: rounding, and nothing else."""

_NUM_PROBES = 8


def prepare_for_processor(model: PreTrainedModel) -> None:
    """Let a model's linear modules compute the same with weights laid out for few rows.

    The model is for inference from now on, and loses from its `state_dict` the weights that are laid out anew, unless
    other modules share them. Models that are not in float32 on a processor stay as they are.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32 or not kernels.IS_FAST or not has_team():
        return
    modules = list(model.modules())
    num_uses = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    with torch.no_grad():
        for module in modules:
            if type(module) in (nn.Linear, Conv1D) and _is_plain(module):
                _replace(module, is_shared=num_uses[id(module.weight)] > 1)


def _replace(module: Any, *, is_shared: bool) -> None:
    weight = module.weight.T if type(module) is Conv1D else module.weight
    product = Product.of(weight, module.bias)
    probe = torch.randn(1, _NUM_PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0))
    if _agree(product(probe), module(probe)):
        module.forward = product
        if not is_shared:
            module.weight = None


def _is_plain(module: Any) -> bool:
    """Whether a module's weight is an ordinary matrix, and nothing watches its calls."""
    return (
        type(module.weight.data) is Tensor
        and module.weight.dtype == torch.float32
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _agree(values: Tensor, expected: Tensor) -> bool:
    difference = (values - expected).abs().amax(-1)
    return bool((difference <= _TOLERANCE * expected.abs().amax(-1)).all())
