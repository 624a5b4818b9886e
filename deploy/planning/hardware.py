"""Figures of accelerators, of coordinators, and of the ways between processes.

An accelerator's figures are its vendor's, for dense products: half of what a data sheet gives with sparsity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """What one device, or the processors of one machine, can do."""

    name: str
    memory_gb: float
    """10^9 bytes, as vendors count."""

    memory_gb_s: float
    """Of its memory's bandwidth, 10^9 bytes a second."""

    tflops: Mapping[str, float]
    """Of dense matrix products, by dtype."""

    link_gb_s: float = 0.0
    """To the other devices of its machine, one way; 0 where there are none."""

    bandwidth_share: float = 0.8
    tflops_share: float = 0.6
    """What products reach of the two figures above."""

    layer_s: float = 50e-6
    """Small operations of a layer, one after the other."""

    attention_passes: float = 1.2
    """How often attention passes keys and values through memory: read where they lie, once and at less than the
    products' speed; gathered first, they are read, written and read."""

    is_processor: bool = False
    """Whether models on one machine share it."""

    source: str


def _gpu(
    name: str, memory_gb: float, memory_gb_s: float, half: float, single: float, link_gb_s: float, source: str
) -> Accelerator:
    tflops = {"bfloat16": half, "float16": half, "float32": single}
    return Accelerator(
        name=name,
        memory_gb=memory_gb,
        memory_gb_s=memory_gb_s,
        tflops=MappingProxyType(tflops),
        link_gb_s=link_gb_s,
        source=source,
    )


ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            _gpu("a100-40g", 40, 1555, 312, 19.5, 300, "NVIDIA A100 data sheet, SXM"),
            _gpu("a100-80g", 80, 2039, 312, 19.5, 300, "NVIDIA A100 data sheet, SXM"),
            _gpu("h100", 80, 3350, 989, 67, 450, "NVIDIA H100 data sheet, SXM"),
            _gpu("h200", 141, 4800, 989, 67, 450, "NVIDIA H200 data sheet, SXM"),
            _gpu("l4", 24, 300, 121, 30.3, 32, "NVIDIA L4 data sheet"),
            _gpu("l40s", 48, 864, 362, 91.6, 32, "NVIDIA L40S data sheet"),
            _gpu("a10g", 24, 600, 70, 35, 32, "NVIDIA A10G data sheet"),
            _gpu("rtx4090", 24, 1008, 165, 82.6, 32, "NVIDIA Ada architecture white paper"),
        )
    }
)
"""By the name that `--accelerator` takes, which is Ray's accelerator type in small letters."""

THIS_MACHINE = "this-machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way for rows from a replica to a coordinator."""

    name: str
    fixed_s: float
    """Of one step with a model, whatever it carries."""

    bytes_per_s: float


REPLICA_S = 0.4e-3
"""Of each further replica of a model that a step needs: one more message there and back."""

# docs/performance.md, "A step" and "Rows between two processes": two cores, Python at both ends.
SHARED_MEMORY = Link(name="shared memory", fixed_s=1.2e-3, bytes_per_s=3e9)
LOOPBACK = Link(name="gRPC", fixed_s=1.5e-3, bytes_per_s=1.0e9)


def network(gbit_s: float) -> Link:
    """Return the link between two machines: gRPC, and no faster than the network."""
    return Link(name="network", fixed_s=LOOPBACK.fixed_s, bytes_per_s=min(LOOPBACK.bytes_per_s, gbit_s * 1e9 / 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorCosts:
    """What one coordinator, which has one processor core, spends. docs/performance.md, "A step"."""

    step_s: float = 0.6e-3
    """Of a step, whatever its sequences."""

    draw_s_per_logit: float = 1.6e-9
    merge_s_per_logit: float = 1.0e-9
    """Of each guide's."""

    product_flops: float = 80e9
    product_bytes_s: float = 20e9
    """Of a guide's output matrix, where its rows are hidden states."""

    full_share: float = 0.7
    """Of its time that it can be busy before sequences wait for it."""


def find_accelerator(name: str) -> Accelerator | None:
    """Return an accelerator by its name or by Ray's name for it."""
    return ACCELERATORS.get(name.lower())
