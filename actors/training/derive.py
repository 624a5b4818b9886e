"""A small model out of a large one: some of its layers under the same embeddings, output layer and vocabulary, and what
it learns after that kept apart as an adapter.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from cluster.errors import InvalidConfiguration


def choose_layers(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Choose which layers a cut keeps: the last three in ten of it, and for the rest the first ones.

    Raises:
        InvalidConfiguration: the model does not have that many.
    """
    if not 1 <= num_kept <= num_layers:
        raise InvalidConfiguration(f"{num_kept} layers cannot be kept: the model has {num_layers}")
    num_last = min(num_kept - 1, max(1, round(0.3 * num_kept)))
    return (*range(num_kept - num_last), *range(num_layers - num_last, num_layers))


def cut_layers(model: Any, kept: Sequence[int]) -> Any:
    """Return a new model of the same class that has only the layers `kept`, in that order.

    Args:
        model: A transformers causal language model whose layers are one `ModuleList`.
        kept: Indices of its layers.

    Raises:
        InvalidConfiguration: the model has no such list of layers, or an index is outside it.
    """
    config = copy.deepcopy(model.config)
    num_layers = config.num_hidden_layers
    if not kept or not all(0 <= layer < num_layers for layer in kept):
        raise InvalidConfiguration(f"layers {list(kept)} cannot be kept: the model has layers 0 to {num_layers - 1}")
    prefix = _layer_list(model)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    small = type(model)(config).to(model.dtype)
    weights = model.state_dict()
    taken = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    for new, old in enumerate(kept):
        start = f"{prefix}{old}."
        taken |= {
            f"{prefix}{new}.{name.removeprefix(start)}": v for name, v in weights.items() if name.startswith(start)
        }
    small.load_state_dict(taken)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def _layer_list(model: Any) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return f"{name}."
    raise InvalidConfiguration(f"{type(model).__name__} has no list of {model.config.num_hidden_layers} layers to cut")


def add_adapter(model: Any, *, rank: int, seed: int, alpha: float | None = None) -> Any:
    """Wrap the model so that only a new LoRA adapter on all its projections is trained (peft's `PeftModel`).

    Args:
        model: A transformers causal language model; its own weights are frozen.
        rank: Of the adapter's matrices.
        seed: Of their first values.
        alpha: The adapter's share is alpha / rank; the rank if absent.
    """
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)


def save_adapter(adapted: Any, directory: Path) -> None:
    """Save the adapter alone, rounded to bfloat16; the directory appears when it is whole."""
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    weights = {name: value.bfloat16() for name, value in get_peft_model_state_dict(adapted).items()}
    adapted.save_pretrained(str(partial), state_dict=weights)
    (partial / "README.md").unlink(missing_ok=True)  # peft's form, not filled in
    config_file = partial / "adapter_config.json"
    # Without the path on this machine of what it was trained on.
    config = json.loads(config_file.read_text()) | {"base_model_name_or_path": None}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    partial.rename(directory)


def merge_adapter(model: Any, adapter: Path) -> Any:
    """Return the model with a saved adapter added into its weights: a plain transformers model again."""
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
