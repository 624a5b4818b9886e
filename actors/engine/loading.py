"""Loading a model for an engine: from a directory or the hub, safetensors only, no code of the model's own."""

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.engine.attention import IMPLEMENTATION
from cluster.errors import InvalidConfiguration

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model(model: str, *, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        model: a directory that `save_pretrained` wrote, or a hub id.
        dtype: of weights, cache and logits: float32, bfloat16 or float16.
        device: where the weights go.

    Raises:
        InvalidConfiguration: there is no such model, or it cannot be loaded with these settings.
    """
    if dtype not in DTYPES:
        raise InvalidConfiguration(f"dtype: {dtype} is not one of {', '.join(map(str, DTYPES))}")
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
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
    on_device: PreTrainedModel = loaded.to(device)
    return on_device
