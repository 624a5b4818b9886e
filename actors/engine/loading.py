"""Loading a model for an engine: from a directory or the hub, safetensors only, no code of the model's own."""

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, DistributedConfig, PreTrainedModel

from actors.engine.attention import IMPLEMENTATION
from cluster.errors import InvalidConfiguration

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **sharded,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise InvalidConfiguration(
            f"model: {model!r} cannot be loaded: {error} Give the directory or hub id of a causal language model "
            "with safetensors weights."
        ) from error
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers.
        raise InvalidConfiguration(
            f"model: {model!r} lacks {len(missing)} of the weights of {type(loaded).__name__}, {missing[0]} first. "
            "Save the whole model again."
        )
    # Slices are where their rank computes.
    on_device: PreTrainedModel = loaded if sharded else loaded.to(device)
    return on_device
