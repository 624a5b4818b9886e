"""Loading a model for an engine: from a directory or the hub, safetensors only, no code of the model's own."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, DistributedConfig, PreTrainedModel

from actors.engine.models.attention import IMPLEMENTATION
from cluster.errors import InvalidConfiguration

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TELLING = (OSError, RuntimeError, SafetensorError, ValueError, ImportError)
"""Errors whose message says what is wrong without their name."""

_BUFFER = re.compile(r"\.(attn|attention)(\.attention)?\.(bias|masked_bias)$|(^|[._])inv_freq$|(^|\.)position_ids$")
"""Causal masks, rotary frequencies and positions, which old checkpoints hold and no model learns."""


def load_model(model: str, *, dtype: torch.dtype, device: str | torch.device, num_ranks: int = 1) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        model: a directory that `save_pretrained` wrote, or a hub id.
        dtype: of weights, cache and logits: float32, bfloat16 or float16.
        device: where the weights go.
        num_ranks: the size of the group that this process has joined (`sharding.join_group`); each rank reads and
            holds its slices alone.

    Raises:
        InvalidConfiguration: there is no such model, or it cannot be loaded with these settings.
    """
    if dtype not in DTYPES:
        raise InvalidConfiguration(f"dtype: {dtype} is not one of {', '.join(map(str, DTYPES))}")
    sharded = {"distributed_config": DistributedConfig(tp_size=num_ranks)} if num_ranks > 1 else {}
    loaded = load_whole(model, dtype=dtype, attn_implementation=IMPLEMENTATION, use_safetensors=True, **sharded)
    # Slices are where their rank computes.
    on_device: PreTrainedModel = loaded if sharded else loaded.to(device)
    return on_device


def load_whole(model: str | Path, **options: Any) -> PreTrainedModel:
    """Load a causal language model with all of its weights, and with none that it would not use.

    Args:
        model: a directory that `save_pretrained` wrote, or a hub id.
        options: of transformers' `from_pretrained`.

    Raises:
        InvalidConfiguration: there is no such model, it cannot be loaded with these options, or its weights are not
            those of its class.
    """
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:
        # Any directory may come; what its configuration and its weights make transformers raise is anything.
        told = str(error) if isinstance(error, _TELLING) else f"{type(error).__name__}: {error}."
        raise InvalidConfiguration(
            f"model: {str(model)!r} cannot be loaded: {told} Give the directory or hub id of a causal language model "
            "with safetensors weights."
        ) from error
    name = type(loaded).__name__
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers.
        raise InvalidConfiguration(
            f"model: {str(model)!r} lacks {len(missing)} of the weights of {name}, {missing[0]} first. "
            "Save the whole model again."
        )
    # transformers leaves them out.
    if unused := sorted(key for key in info["unexpected_keys"] if not _BUFFER.search(key)):
        remedy = (
            "Merge the adapter into the model and save it again."
            if any("lora_" in key for key in unused)
            else "Save the model again with the configuration and the class that it was trained with."
        )
        raise InvalidConfiguration(
            f"model: {str(model)!r} holds {len(unused)} weights that {name} does not have, {unused[0]} first. {remedy}"
        )
    return loaded
