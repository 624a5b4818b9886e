"""What this machine's processors do, measured in a few seconds with products as the engine has them."""

import math
import os
import time
from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch
from torch import nn

from actors.engine.passes.compiled import kernels
from actors.engine.passes.compiled.product import Product
from actors.engine.passes.compiled.team import has_team
from deploy.planning.hardware import LOOPBACK, THIS_MACHINE, Accelerator

PROBE_SHAPE = (8192, 2048)
"""Rows and columns of the probe's matrices: wide ones, as most of a model's weights are."""

PROBE_BYTES = 512 * 2**20
"""Of all of them together: more than caches hold."""

PROBE_ROUNDS = 5


def this_machine(*, dtype: str, rows: int) -> Accelerator:
    """Measure this machine's processors, in a few seconds.

    Bandwidth and rate are those of a product of a matrix with one row and with `rows`: small products reach less than
    large ones, and decoding is made of them.
    """
    kind: torch.dtype = getattr(torch, dtype)
    num_numbers = PROBE_BYTES // kind.itemsize
    products = _products(kind, num_numbers // math.prod(PROBE_SHAPE))
    num_rows = max(rows, 2)
    one_s, many_s = (_run_s(products, torch.full((count, PROBE_SHAPE[1]), 0.01, dtype=kind)) for count in (1, num_rows))
    gb_s, tflops = PROBE_BYTES / one_s / 1e9, 2 * num_numbers * num_rows / many_s / 1e12
    # docs/performance.md: attention reads keys and values once, at somewhat less than the products' rate, and small
    # operations take 0.5 to 2 ms of 30 layers. Without the compiled pass products take longer than one after the other
    # by themselves, and small operations 5 to 6 ms.
    is_compiled = _is_compiled(kind)
    return Accelerator(
        name=THIS_MACHINE,
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        memory_gb_s=gb_s,
        tflops=MappingProxyType({dtype: tflops}),
        bandwidth_share=0.95 if is_compiled else 0.8,
        tflops_share=0.95 if is_compiled else 0.8,
        attention_passes=1.2 if is_compiled else 3,
        layer_s=50e-6 if is_compiled else 180e-6,
        is_processor=True,
        link_gb_s=LOOPBACK.bytes_per_s / 1e9,
        source=f"measured now: {gb_s:.1f} GB/s with one row, {1e3 * tflops:.0f} GFLOP/s with {num_rows}, {dtype}",
    )


def _is_compiled(kind: torch.dtype) -> bool:
    """Whether models are computed by the engine's own kernels, as those are that they were made for."""
    return kind == torch.float32 and kernels.IS_FAST and has_team()


def _products(kind: torch.dtype, count: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Products as the engine has them on processors."""
    linears = [nn.Linear(PROBE_SHAPE[1], PROBE_SHAPE[0], bias=False, dtype=kind) for _ in range(count)]
    if _is_compiled(kind):
        return [Product.of(linear.weight.detach(), None) for linear in linears]
    return [*linears]


def _run_s(products: Sequence[Callable[[torch.Tensor], torch.Tensor]], rows: torch.Tensor) -> float:
    """The best time of all products; others may use the machine."""
    times_s = []
    with torch.inference_mode():
        for _ in range(PROBE_ROUNDS):
            start = time.perf_counter()
            for product in products:
                product(rows)
            times_s.append(time.perf_counter() - start)
    return min(times_s)
