"""A model over several ranks: processes that each hold a slice of its large weights.

transformers slices the weights as it reads them, and sums or gathers what the ranks compute. Here is which models can
be sharded, and the process group in which ranks meet.
"""

from datetime import timedelta
from math import gcd
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from cluster.errors import InvalidConfiguration

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Ranks read their slices at different speeds, and then wait for each other."""


def check_shardable(config: Any, name: str, num_ranks: int) -> None:
    """Check that a model with this configuration can be sharded.

    Args:
        config: transformers' configuration of the model.
        name: says in messages which model that is.
        num_ranks: two or more.

    Raises:
        InvalidConfiguration: it has no plan for that, or not so many ranks can share its heads.
    """
    config = config.get_text_config(decoder=True)
    if not getattr(config, "base_model_tp_plan", None):
        raise InvalidConfiguration(
            f"model {name}: tensor_parallel is {num_ranks}, but transformers has no sharding plan for the family "
            f"{config.model_type!r} (base_model_tp_plan). Set tensor_parallel to 1, or use a Llama, Mistral, Qwen, "
            "Gemma or another model with a plan."
        )
    num_heads = config.num_attention_heads
    num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads
    common = gcd(num_heads, num_key_heads)
    if common % num_ranks:
        possible = [str(number) for number in range(1, common + 1) if common % number == 0]
        raise InvalidConfiguration(
            f"model {name}: tensor_parallel is {num_ranks}, which does not divide its {num_heads} attention heads and "
            f"{num_key_heads} key-value heads. Set it to one of {', '.join(possible)}."
        )


def join_group(store: distributed.Store, *, rank: int, num_ranks: int, device: str) -> None:
    """Join the process group of a model's ranks, in the thread that will compute; returns when all have come.

    Args:
        store: one that all ranks reach.
        rank: of this process, from 0.
        num_ranks: in the group.
        device: where the model computes, "cuda" or "cpu"; of GPUs the process must see its own alone.
    """
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_device(0)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=torch.device("cuda", 0) if on_gpu else None,
    )


def unwrap_slices(model: PreTrainedModel) -> None:
    """Give linear modules their slices as plain tensors: the same numbers, without what a `DTensor` costs each call.

    Call it after all that reads the weights as a whole.
    """
    for module in model.modules():
        if type(module) is not nn.Linear:
            continue
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                setattr(module, name, nn.Parameter(weight.to_local(), requires_grad=False))


def elements(weight: Tensor, stride: int) -> Tensor:
    """Return elements 0, stride, 2 * stride, ... of a weight in row-major order; -0.0 comes as 0.0.

    If the weight is sliced, all ranks must call this together; only the elements travel, not the weight.
    """
    if not isinstance(weight, DTensor) or any(type(placement) is not Shard for placement in weight.placements):
        return whole(weight).flatten()[::stride] + 0.0
    own = weight.to_local()
    _, first = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    indices = torch.arange(0, weight.numel(), stride, device=own.device)
    places = torch.stack(torch.unravel_index(indices, weight.shape)) - torch.tensor(first, device=own.device)[:, None]
    is_own = ((places >= 0) & (places < torch.tensor(own.shape, device=own.device)[:, None])).all(0)
    values = own.new_zeros(len(indices))
    values[is_own] = own[tuple(places[:, is_own])]
    # Each is on one rank, and 0 on the others.
    return DTensor.from_local(values, weight.device_mesh, [Partial()]).full_tensor()


def whole(weight: Tensor) -> Tensor:
    """Return a weight as one tensor, gathered from all ranks if it is sliced; they must all ask for it together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
