"""One linear product as compiled code, for any model's layers.

Shapes: I inputs, O columns, P panels of `LANES` columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.engine.passes.compiled import kernels
from actors.engine.passes.compiled.layout import panels
from actors.engine.passes.compiled.team import run_in_team


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """x W^T + b. Every element is summed in one order, whatever the number of rows."""

    panels: Tensor
    """[P, I, LANES]"""

    bias: Tensor
    """[P * LANES]"""

    num_columns: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Product":
        """Return the product with a matrix [O, I] and a bias [O]."""
        packed = panels([weight])
        padded = torch.zeros(packed.shape[0] * kernels.LANES)
        if bias is not None:
            padded[: len(bias)] = bias
        return cls(packed, padded, len(weight))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return products [..., O] of float32 inputs [..., I]."""
        inputs = inputs.contiguous()
        num_panels, num_inputs, _ = self.panels.shape
        result = inputs.new_empty(inputs.numel() // num_inputs, num_panels * kernels.LANES)
        if len(result):
            job = np.zeros(kernels.NUM_PRODUCT_FIELDS, np.int64)
            job[kernels.PRODUCT_ROWS] = len(result)
            job[kernels.PRODUCT_INPUT] = inputs.data_ptr()
            job[kernels.PRODUCT_INPUTS] = num_inputs
            job[kernels.PRODUCT_PANELS] = self.panels.data_ptr()
            job[kernels.PRODUCT_NUM_PANELS] = num_panels
            job[kernels.PRODUCT_BIAS] = self.bias.data_ptr()
            job[kernels.PRODUCT_RESULT] = result.data_ptr()
            run_in_team(kernels.product_address(), job.ctypes.data, torch.get_num_threads())
        return result[:, : self.num_columns].reshape(*inputs.shape[:-1], self.num_columns)
