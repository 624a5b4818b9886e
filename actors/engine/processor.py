"""Making a transformers model's own modules compute faster on a processor, in float32, for few rows at a time.

Decides which modules of a model get the forward calls of `operations.py`: each is compared with the module's own on a
probe first. What is not recognised, and what gives other numbers, keeps the model's own code. Knows nothing of the
cache or of sequences.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.engine.operations import Gated, Norm, Product, RotaryAttention

_MAX_TWICE_BYTES = 1 << 30
"""Matrices of a model are kept in two layouts if they take no more than this in one."""

_TOLERANCE = 1e-4
"""Largest difference from the model's own numbers, relative to the largest of a row: rounding, and nothing else."""

_NUM_PROBES = 8

_ROTARY_ATTENTIONS = frozenset(
    f"{family}Attention" for family in ("Gemma", "Gemma2", "Gemma3", "Granite", "Llama", "Mistral", "Qwen2", "Qwen3")
)
"""Classes of transformers that compute what `RotaryAttention` does. A probe alone cannot tell: others of the same shape
do more at far positions."""


def prepare_for_processor(model: PreTrainedModel) -> None:
    """Change a model's modules so that they compute the same in fewer and faster operations.

    The model is for inference from now on, and a large one loses from its `state_dict` the weights that are packed,
    unless other modules share them. Models that are not in float32 on a processor stay as they are.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32 or not torch._C._has_mkldnn:
        return
    with torch.no_grad():
        _Preparation(model).run()


class _Preparation:
    """One model's way through its modules."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        weights = [weight for module in model.modules() for weight in module.parameters(recurse=False)]
        num_uses = Counter(id(weight) for weight in weights)
        self._shared = {weight for weight, num in num_uses.items() if num > 1}
        self._merged: set[nn.Module] = set()
        self._keep_plain = sum(weight.nbytes for weight in model.parameters()) <= _MAX_TWICE_BYTES

    def run(self) -> None:
        modules = list(self._model.modules())
        for module in modules:
            _replace_norm(module)
        self._replace_attention([module for module in modules if _is_rotary_attention(module)])
        for module in modules:
            self._replace_gated(module)
        for module in modules:
            self._replace_product(module)

    def _replace_attention(self, modules: Sequence[Any]) -> None:
        siblings = {module: self._siblings(module, "q_proj", "k_proj", "v_proj") for module in modules}
        if not all(siblings.values()) or not modules:
            return
        expected = _logits(self._model)
        products = {module: Product.of(siblings[module], keep_plain=self._keep_plain) for module in modules}
        for module, product in products.items():
            module.forward = RotaryAttention.of(module, product)
        if _agree(_logits(self._model), expected):
            for module in modules:
                self._merge(siblings[module])
            return
        for module in modules:
            del module.forward

    def _replace_gated(self, module: Any) -> None:
        siblings = self._siblings(module, "gate_proj", "up_proj")
        if not siblings or not all(hasattr(module, name) for name in ("act_fn", "down_proj")):
            return
        product = Product.of(siblings, keep_plain=self._keep_plain)
        if _try_forward(module, Gated(product, module.act_fn, module.down_proj), siblings[0].in_features):
            self._merge(siblings)

    def _replace_product(self, module: Any) -> None:
        if type(module) not in (nn.Linear, Conv1D) or not _is_plain(module) or module in self._merged:
            return
        num_columns, num_inputs = module.weight.shape[:: -1 if type(module) is Conv1D else 1]
        # oneDNN's layout is no faster for products with no more columns than inputs.
        if num_columns <= num_inputs:
            return
        keep_plain = self._keep_plain or id(module.weight) in self._shared
        if _try_forward(module, Product.of([module], keep_plain=keep_plain), num_inputs) and not keep_plain:
            module.weight = None

    def _siblings(self, parent: nn.Module, *names: str) -> list[Any]:
        """Return the products of these names if they can be taken as one; none otherwise."""
        linears: list[Any] = [getattr(parent, name, None) for name in names]
        for linear in linears:
            if type(linear) is not nn.Linear or not _is_plain(linear) or id(linear.weight) in self._shared:
                return []
        is_alike = len({(linear.in_features, linear.bias is None) for linear in linears}) == 1
        return linears if is_alike else []

    def _merge(self, products: Sequence[Any]) -> None:
        """Note that products are computed elsewhere, and give their weights up unless they serve few rows."""
        self._merged.update(products)
        if not self._keep_plain:
            for product in products:
                product.weight = None


def _is_rotary_attention(module: nn.Module) -> bool:
    own = type(module)
    return own.__name__ in _ROTARY_ATTENTIONS and own.__module__.startswith("transformers.models.")


def _replace_norm(module: Any) -> None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not _is_plain(module) or epsilon is None:
        return
    # Gemma's scale is one more than its weight.
    for scale in (module.weight, 1 + module.weight):
        if _try_forward(module, Norm.of(scale, epsilon), len(scale)):
            return


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's weight is an ordinary matrix or vector, and nothing watches its calls."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and type(weight.data) is Tensor
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _try_forward(module: nn.Module, forward: Callable[[Tensor], Tensor], num_columns: int) -> bool:
    """Give a module another forward call if that computes the same."""
    probe = torch.randn(1, _NUM_PROBES, num_columns, generator=torch.Generator().manual_seed(0))
    # Small rows show an epsilon, large ones a bound.
    probe *= torch.logspace(-4, 3, _NUM_PROBES)[:, None]
    if not _agree(forward(probe), module(probe)):
        return False
    module.forward = forward
    return True


def _agree(values: Tensor, expected: Tensor) -> bool:
    difference = (values - expected).abs().amax(-1)
    return bool((difference <= _TOLERANCE * expected.abs().amax(-1)).all())


def _logits(model: PreTrainedModel) -> Tensor:
    """Return a model's logits for a few tokens, with its own attention."""
    config = model.config.get_text_config(decoder=True)
    num_tokens = model.get_input_embeddings().weight.shape[0]
    tokens = [(1 + 7 * i) % num_tokens for i in range(_NUM_PROBES)]
    implementation = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(implementation)
