"""The arithmetic of a step: time and memory of each model, what travels, and where the bottleneck is.

A decoding step of R rows, all in seconds:

    products    max(weights read / bandwidth, 2 * weights * R / rate)      per rank
    attention   p * keys and values of all R sequences / bandwidth         p: how often they pass through memory
    model       products + attention + small operations of all layers
                at least what starting them from Python takes              on GPUs with tensor parallelism: no graphs
                + two sums over all ranks for each layer                    with tensor parallelism
    step        models + exchange + coordinator                            of one lane

Models on devices of their own compute at the same time, models on one machine's processors one after the other, where
every base replica has a machine of its own and guides near it are spread over these.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploy.planning.hardware import REPLICA_S
from deploy.planning.service import Model, Service

LAUNCHES_S = 300e-6
"""To start a layer's operations on a GPU one by one from Python."""

ALL_REDUCE_S = 30e-6
"""Of one sum over ranks, whatever its size."""

MEMORY_SHARE = 0.9
"""Of a device that weights and cache may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEstimate:
    """One model of the service."""

    name: str
    accelerator: str
    devices: int
    """Of each replica."""

    replicas: int
    parameters: int
    weight_bytes: int
    cache_bytes: int
    """Of each device."""

    is_fitting: bool
    rows: int
    """Of a replica's step."""

    step_s: float
    products_s: float
    attention_s: float
    small_s: float
    ranks_s: float
    link: str
    bytes_per_step: int
    """That one replica sends."""

    bytes_per_s: float
    """That all of its replicas send together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The service with so many sequences."""

    sequences: int
    """Live ones."""

    waiting: int
    context: int
    models: tuple[ModelEstimate, ...]
    models_s: float
    exchange_s: float
    coordinator_s: float
    """Of its own work for one lane's step: merge, draw, output matrices."""

    step_s: float
    coordinators: int
    coordinator_load: float
    """Share of its time that a coordinator is busy."""

    is_coordinator_full: bool
    """Whether steps wait for coordinators that serve others."""

    bottleneck: str

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.sequences / self.step_s if self.sequences else 0.0


def weight_bytes(model: Model) -> int:
    """Return the bytes of weights on each device; norms, which every rank has whole, are shared out too."""
    return math.ceil(model.shape.parameters * model.itemsize / model.tensor_parallel)


def cache_bytes(model: Model) -> int:
    """Return the bytes of cache on each device, which are taken at start."""
    return model.cache_tokens * model.shape.cache_per_token * model.itemsize // model.tensor_parallel


def is_fitting(model: Model) -> bool:
    """Return whether weights and cache leave room for a step's own tensors."""
    return weight_bytes(model) + cache_bytes(model) <= MEMORY_SHARE * model.accelerator.memory_gb * 1e9


def capacity(model: Model, context: int) -> int:
    """Return how many sequences of that length a replica holds without preempting any."""
    return min(model.max_sequences, model.cache_tokens // context)


def products_s(model: Model, rows: int) -> float:
    """Return the time of a step's matrix products."""
    weights = model.shape.read_parameters
    if model.rows == "hidden_states":
        weights -= model.shape.vocabulary * model.shape.hidden
    accelerator, share = model.accelerator, weights / model.tensor_parallel
    read_s = share * model.itemsize / (accelerator.memory_gb_s * 1e9 * accelerator.bandwidth_share)
    compute_s = 2 * share * rows / (accelerator.tflops[model.dtype] * 1e12 * accelerator.tflops_share)
    return max(read_s, compute_s)


def attention_s(model: Model, rows: int, context: int) -> float:
    """Return the time of a step's attention, which is that of moving keys and values."""
    cached = rows * context * model.shape.cache_per_token * model.itemsize / model.tensor_parallel
    accelerator = model.accelerator
    return accelerator.attention_passes * cached / (accelerator.memory_gb_s * 1e9 * accelerator.bandwidth_share)


def ranks_s(model: Model, rows: int) -> float:
    """Return the time of a step's sums over ranks, two for each layer, in a ring."""
    ranks = model.tensor_parallel
    if ranks == 1:
        return 0.0
    travelling = 2 * (ranks - 1) / ranks * rows * model.shape.hidden * model.itemsize
    return 2 * model.shape.layers * (ALL_REDUCE_S + travelling / (model.accelerator.link_gb_s * 1e9))


def model_step_s(model: Model, rows: int, context: int) -> float:
    """Return the time of a decoding step with so many rows."""
    layers = model.shape.layers
    computing_s = products_s(model, rows) + attention_s(model, rows, context) + layers * model.accelerator.layer_s
    if model.tensor_parallel > 1 and not model.accelerator.is_processor:
        computing_s = max(computing_s, layers * LAUNCHES_S)
    return computing_s + ranks_s(model, rows)


def exchange_s(models: Sequence[Model], rows: int) -> float:
    """Return how long a lane with so many rows waits for them after the models are done."""
    return sum(model.link.fixed_s + _receive_s(model, rows) for model in models)


def _receive_s(model: Model, rows: int) -> float:
    further = min(model.replicas, rows) - 1 if model.name != "base" else 0
    return REPLICA_S * further + rows * model.row_bytes / model.link.bytes_per_s


def coordinator_s(service: Service, rows: int) -> float:
    """Return the time of a lane's step in the coordinator itself."""
    costs, vocabulary = service.costs, service.base.shape.vocabulary
    total_s = costs.step_s + rows * vocabulary * costs.draw_s_per_logit
    for guide in service.guides:
        total_s += rows * vocabulary * costs.merge_s_per_logit
        if guide.rows == "hidden_states":
            matrix = guide.shape.vocabulary * guide.shape.hidden
            total_s += max(matrix * guide.itemsize / costs.product_bytes_s, 2 * matrix * rows / costs.product_flops)
    return total_s


def estimate(service: Service, *, sequences: int, context: int) -> Estimate:
    """Return what a service reaches with so many sequences, each with so many tokens in the cache on the average."""
    live = min(sequences, *(capacity(model, context) * model.replicas for model in service.models))
    rows = {model.name: math.ceil(live / model.replicas) for model in service.models}
    times = {model.name: model_step_s(model, rows[model.name], context) for model in service.models}
    models_s = _side_by_side_s(service, times)
    # Base replicas near a coordinator are its lanes; with more coordinators than base replicas, these share one.
    lanes = max(1, math.ceil(service.base.replicas / service.coordinators))
    lane_rows = math.ceil(live / (lanes * service.coordinators))
    travel_s, own_s = exchange_s(service.models, lane_rows), coordinator_s(service, lane_rows)
    busy_s = lanes * (own_s + sum(_receive_s(model, lane_rows) for model in service.models))
    undisturbed_s = models_s + travel_s + own_s
    is_full = busy_s > service.costs.full_share * undisturbed_s
    step_s = busy_s / service.costs.full_share if is_full else undisturbed_s
    parts = {**times, "exchange": travel_s, "coordinator": own_s}
    bottleneck = "coordinator" if is_full else max(parts, key=lambda part: parts[part])
    return Estimate(
        sequences=live,
        waiting=sequences - live,
        context=context,
        models=tuple(_model(model, rows[model.name], context, live / step_s) for model in service.models),
        models_s=models_s,
        exchange_s=travel_s,
        coordinator_s=own_s,
        step_s=step_s,
        coordinators=service.coordinators,
        coordinator_load=busy_s / step_s,
        is_coordinator_full=is_full,
        bottleneck=bottleneck,
    )


def _side_by_side_s(service: Service, times: dict[str, float]) -> float:
    """The time until the last model is done."""
    by_device: dict[str, float] = {}
    for model in service.models:
        device, num_turns = model.name, 1
        if model.accelerator.is_processor:
            device = f"processors of {model.node}"
            if model.node == service.base.node:
                num_turns = math.ceil(model.replicas / service.base.replicas)
        by_device[device] = by_device.get(device, 0.0) + num_turns * times[model.name]
    return max(by_device.values())


def _model(model: Model, rows: int, context: int, tokens_per_s: float) -> ModelEstimate:
    return ModelEstimate(
        name=model.name,
        accelerator=model.accelerator.name,
        devices=model.tensor_parallel,
        replicas=model.replicas,
        parameters=model.shape.parameters,
        weight_bytes=weight_bytes(model),
        cache_bytes=cache_bytes(model),
        is_fitting=is_fitting(model),
        rows=rows,
        step_s=model_step_s(model, rows, context),
        products_s=products_s(model, rows),
        attention_s=attention_s(model, rows, context),
        small_s=model.shape.layers * model.accelerator.layer_s,
        ranks_s=ranks_s(model, rows),
        link=model.link.name,
        bytes_per_step=rows * model.row_bytes,
        bytes_per_s=tokens_per_s * model.row_bytes,
    )


def with_guide(service: Service, changed: Model) -> Service:
    """Return the service with one of its guides changed."""
    guides = tuple(changed if guide.name == changed.name else guide for guide in service.guides)
    return replace(service, guides=guides)
