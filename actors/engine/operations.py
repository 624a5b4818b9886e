"""What modules of a model compute, in fewer and faster operations for a processor.

Each class here stands for a module's forward call. They know nothing of a model as a whole, of caches or of sequences;
`processor.py` decides which modules they fit.

Shapes: N tokens, H query heads and key heads together, D head width, I columns of an input, O columns of an output.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

_ROWS_TO_PACK_FOR = 16
"""oneDNN chooses a layout for a number of rows; this one's serves any number from 4 to 256 best."""

_MAX_PLAIN_ROWS = 3
"""So few rows read a plain matrix faster than a packed one."""

_OPTIONS = {"scaling": "scaling", "sliding_window": "sliding_window", "softcap": "attn_logit_softcapping"}
"""Arguments of attention functions, and where modules keep them."""


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """An RMS norm, scale * x / sqrt(mean(x^2) + epsilon) (arXiv 1910.07467), in four operations."""

    scale: Tensor
    """[I], times sqrt(I), for a sum of squares takes the place of their mean."""

    floor: Tensor
    """sqrt(I * epsilon), a scalar."""

    @classmethod
    def of(cls, scale: Tensor, epsilon: float) -> "Norm":
        """Return the norm of a scale [I]."""
        return cls(scale * len(scale) ** 0.5, torch.tensor((len(scale) * epsilon) ** 0.5))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Normalise inputs [..., I]."""
        length = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
        return (inputs * self.scale).div_(torch.hypot(length, self.floor))


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """x W^T + b for products that read the same input: W [O, I] are their rows, one after the other."""

    packed: Tensor
    """W in oneDNN's layout."""

    bias: Tensor | None
    num_columns: int

    plain: Sequence[nn.Module]
    """The products themselves, for few rows; empty where there is no memory for two layouts."""

    @classmethod
    def of(cls, products: Sequence[Any], *, keep_plain: bool) -> "Product":
        """Return linear modules, all with a bias or all without one, as one product."""
        weights = [product.weight.T if type(product) is Conv1D else product.weight for product in products]
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), _ROWS_TO_PACK_FOR)
        bias = None if products[0].bias is None else torch.cat([product.bias for product in products])
        return cls(packed, bias, sum(map(len, weights)), tuple(products) if keep_plain else ())

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return products [..., O] of inputs [..., I]."""
        num_rows = inputs.numel() // inputs.shape[-1]
        if self.plain and num_rows <= _MAX_PLAIN_ROWS:
            parts = [type(product).forward(product, inputs) for product in self.plain]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if num_rows == 0:
            return inputs.new_empty(*inputs.shape[:-1], self.num_columns)
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")


@dataclass(frozen=True, slots=True, eq=False)
class Gated:
    """down(activation(gate(x)) * up(x))."""

    gate_and_up: Product
    activation: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return outputs [..., O] of inputs [..., I]."""
        gate, up = self.gate_and_up(inputs).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))


@dataclass(frozen=True, slots=True, eq=False)
class RotaryAttention:
    """The forward call of an attention module with rotary positions, around transformers' attention functions."""

    module: Any
    product: Product
    """Queries, keys and values."""

    num_query_heads: int
    num_key_heads: int
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    """The architecture's own attention function."""

    @classmethod
    def of(cls, module: Any, product: Product) -> "RotaryAttention":
        """Return the forward call of a module whose queries, keys and values are one product."""
        num_query_heads, num_key_heads = (p.out_features // module.head_dim for p in (module.q_proj, module.k_proj))
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return cls(module, product, num_query_heads, num_key_heads, eager)

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs [1, N, O] of hidden states [1, N, I], and attention weights where the function gives them."""
        module = self.module
        rows = self.product(hidden_states)
        heads = rows.view(*rows.shape[:-1], -1, module.head_dim)
        num_rotated = self.num_query_heads + self.num_key_heads
        rotated, value = heads[:, :, :num_rotated], heads[:, :, num_rotated:].transpose(1, 2)
        if hasattr(module, "q_norm"):
            query, key = rotated.tensor_split([self.num_query_heads], dim=2)
            rotated = torch.cat([module.q_norm(query), module.k_norm(key)], dim=2)
        rotated = _rotate(rotated, *position_embeddings).transpose(1, 2)
        query, key = rotated.tensor_split([self.num_query_heads], dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        for name, attribute in _OPTIONS.items():
            if hasattr(module, attribute):
                options[name] = getattr(module, attribute)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, self.eager)
        output, weights = attend(module, query, key, value, attention_mask, dropout=0.0, **options)
        return module.o_proj(output.flatten(2)), weights


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate heads [1, N, H, D] by the angles of cosine and sine [1, N, D] (arXiv 2104.09864)."""
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    half = heads.shape[-1] // 2
    rotated = heads * cosine
    rotated[..., :half].addcmul_(heads[..., half:], sine[..., :half], value=-1)
    rotated[..., half:].addcmul_(heads[..., :half], sine[..., half:])
    return rotated
