"""A small model out of a large one: some of its layers under the same embeddings, output layer and vocabulary, and what
it learns after that kept apart as an adapter.
"""

import copy
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from actors.engine.models.loading import load_whole
from cluster.errors import InvalidConfiguration

ADAPTER = "adapter"
"""Beside a trained guide: what was trained, apart from the model that it was merged into."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAP_WEIGHTS = "map.safetensors"
MAP_UP = re.compile(r"(^|\bmap\.)up$")
"""Names the second factor of an `OutputMap` in either file."""

PROBE = (1, 2, 3, 4, 5, 6, 7, 8)
"""Tokens by which a cut is compared with the model's own layers."""

TOLERANCE = 1e-3
"""Of the logits, relative to the largest: both run the same operations."""

_OF_TOKENS = re.compile(r"token|_ids$")
_NUMBERS_LAYER = re.compile(r"^_|(^|_)(idx|id|index|number)$|^training$")


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

    What its configuration says of every layer is cut with them, and the cut is compared with the model's own layers.

    Args:
        model: A transformers causal language model whose layers are one `ModuleList`.
        kept: Indices of its layers.

    Raises:
        InvalidConfiguration: the model has no such list of layers, an index is outside it, or layers compute something
            else under another number and no configuration says otherwise.
    """
    name, layers = _layer_list(model)
    if not kept or not all(0 <= layer < len(layers) for layer in kept):
        raise InvalidConfiguration(f"layers {list(kept)} cannot be kept: the model has layers 0 to {len(layers) - 1}")
    config = copy.deepcopy(model.config)
    changes = _cut_settings(config.get_text_config(decoder=True), kept)
    for setting, value in changes.items():
        setattr(config.get_text_config(decoder=True), setting, value)
    weights = model.state_dict()
    taken = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
    for new, old in enumerate(kept):
        start = f"{name}.{old}."
        taken |= {f"{name}.{new}.{key.removeprefix(start)}": v for key, v in weights.items() if key.startswith(start)}
    try:
        # As it will be loaded: some configurations make one setting out of another.
        config = type(config).from_dict(
            json.loads(config.to_json_string()), attn_implementation=model.config._attn_implementation
        )
        # Not `to(dtype)`, which rounds rotary frequencies too.
        small: Any = type(model)._from_config(config, dtype=model.dtype)
        small.load_state_dict({key: value.clone() for key, value in taken.items()}, assign=True)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise _uncuttable(model, kept, f"they do not fit its configuration any more: {error}") from error
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    small.eval()
    _compare(model, small, name, kept, changes)
    return small


def _layer_list(model: Any) -> tuple[str, nn.ModuleList]:
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise InvalidConfiguration(f"{type(model).__name__} has no list of {num_layers} layers to cut")


def _cut_settings(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """The settings of a configuration that speak of each layer, for those that are kept."""
    num_layers = config.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        is_of_layers = isinstance(value, (list, tuple)) and len(value) == num_layers and not _OF_TOKENS.search(name)
        if is_of_layers and name != "architectures":
            changes[name] = type(value)(value[layer] for layer in kept)
    return changes


def _compare(model: Any, small: Any, name: str, kept: Sequence[int], changes: dict[str, Any]) -> None:
    """Refuse a cut that computes something else than the model's layers do, one after the other.

    Settings are compared beside logits: a window, for one, shows in long texts alone.
    """
    layers = model.get_submodule(name)
    for new, old in enumerate(kept):
        mine = dict(small.get_submodule(f"{name}.{new}").named_modules())
        for path, module in layers[old].named_modules():
            for setting, value in vars(module).items():
                is_comparable = isinstance(value, (bool, int, float, str)) and not _NUMBERS_LAYER.search(setting)
                if is_comparable and getattr(mine[path], setting, None) != value:
                    raise _uncuttable(
                        model,
                        kept,
                        f"{setting} of layer {old}, {value!r}, would be {getattr(mine[path], setting, None)!r}",
                    )
    config = model.config.get_text_config(decoder=True)
    before = {setting: getattr(config, setting) for setting in changes}
    tokens = torch.tensor([PROBE], device=model.device) % config.vocab_size
    parent, _, last = name.rpartition(".")
    try:
        for setting, value in changes.items():
            setattr(config, setting, value)
        setattr(model.get_submodule(parent), last, nn.ModuleList(layers[layer] for layer in kept))
        with torch.no_grad():
            wanted, found = (each(input_ids=tokens, use_cache=False).logits.float() for each in (model, small))
    finally:
        setattr(model.get_submodule(parent), last, layers)
        for setting, value in before.items():
            setattr(config, setting, value)
    difference = ((wanted - found).abs().max() / wanted.abs().max()).item()
    # NaN is a difference too.
    if not difference <= TOLERANCE:
        raise _uncuttable(model, kept, f"their logits would be off by {difference:.1%}")


def _uncuttable(model: Any, kept: Sequence[int], reason: str) -> InvalidConfiguration:
    return InvalidConfiguration(
        f"layers {list(kept)} of {type(model).__name__} cannot be kept: what a layer computes depends on its number, "
        f"and {reason}. Keep the first layers alone (0 to some layer), or derive from another model."
    )


class OutputMap(nn.Module):
    """A low-rank matrix between a model's last hidden state and its output layer, [D, D]; zero at first.

    Its rank is small on purpose: a whole matrix learns some hundred pairs by heart.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(width, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the mapped hidden states, [..., D]."""
        return F.linear(F.linear(hidden, self.down), self.up)


class SilentOutput(nn.Module):
    """An output layer that gives every token the logit 0 until its `map` has learnt otherwise.

    A guide that ends in it starts as no guide at all: what it multiplies the base by is uniform. The output layer's own
    weights stay as they are: the map learns directions among tokens that it already tells apart.
    """

    weight: Tensor
    ends_in_hidden: bool
    """Leave the product with the output layer to the caller, who gets mapped hidden states for logits."""

    def __init__(self, output: nn.Linear, rank: int) -> None:
        super().__init__()
        self.ends_in_hidden = False
        self.register_buffer("weight", output.weight.detach(), persistent=False)
        self.map = OutputMap(output.in_features, rank).to(output.weight.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits, [..., V]."""
        mapped: Tensor = self.map(hidden)
        return mapped if self.ends_in_hidden else F.linear(mapped, self.weight)

    def folded(self) -> nn.Linear:
        """Return the one layer that does the same, [V, D]."""
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        mapped = self.weight.float() @ self.map.up.float() @ self.map.down.float()
        layer.weight = nn.Parameter(mapped.to(self.weight.dtype))
        return layer


def silence_output(model: Any, rank: int, seed: int = 0) -> Any:
    """Put a `SilentOutput` in place of the model's output layer, and return the model.

    Args:
        model: A transformers causal language model.
        rank: Of the map.
        seed: Of its first values.

    Raises:
        InvalidConfiguration: its output layer is no linear layer.
    """
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise InvalidConfiguration(
            f"{type(model).__name__} has no linear output layer, which training under a base starts from; "
            "leave --base out"
        )
    torch.manual_seed(seed)
    model.set_output_embeddings(SilentOutput(output, rank))
    return model


def fold_output(model: Any) -> Any:
    """Put one linear layer in place of a `SilentOutput`, and return the model: a plain transformers model again."""
    model.set_output_embeddings(model.get_output_embeddings().folded())
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return model


def freeze_all_but_map(model: Any) -> Any:
    """Have only the map of the model's `SilentOutput` trained, and return the model."""
    model.requires_grad_(False)
    model.get_output_embeddings().map.requires_grad_(True)
    return model


def add_adapter(model: Any, *, rank: int, seed: int, alpha: float | None = None) -> Any:
    """Wrap the model so that only a new LoRA adapter on all its projections is trained (peft's `PeftModel`).

    The map of a `SilentOutput` is trained with it, and is part of what is saved.

    Args:
        model: A transformers causal language model; its own weights are frozen.
        rank: Of the adapter's matrices.
        seed: Of their first values.
        alpha: The adapter's share is alpha / rank; the rank if absent.
    """
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules="all-linear",
        exclude_modules=[name for name, module in model.named_modules() if _is_of_its_own(module)] or None,
        modules_to_save=["map"] if isinstance(model.get_output_embeddings(), SilentOutput) else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def _is_of_its_own(module: nn.Module) -> bool:
    """Whether a projection computes more than one, as routers do that give several tensors: none for an adapter."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def adapter_reach(model: Any) -> float:
    """Return the share of the layers' weights that an adapter on all projections reaches.

    Experts that are one parameter together, and no projections, are out of its reach.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {id(module.weight) for module in (*embeddings, model.get_output_embeddings())}
    sizes = {id(weight): weight.numel() for weight in model.parameters() if weight.dim() >= 2}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    projections = [module for module in linear if not _is_of_its_own(module)]
    reached = sum(sizes[weight] for weight in {id(module.weight) for module in projections} - outside)
    return reached / sum(size for weight, size in sizes.items() if weight not in outside)


def save_adapter(adapted: Any, directory: Path) -> None:
    """Save the adapter alone, rounded to bfloat16; the directory appears when it is whole."""
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    adapted.save_pretrained(str(partial))
    weights = load_file(partial / ADAPTER_WEIGHTS)
    save_file({name: value.bfloat16() for name, value in weights.items()}, partial / ADAPTER_WEIGHTS)
    (partial / "README.md").unlink(missing_ok=True)  # peft's form, not filled in
    config_file = partial / "adapter_config.json"
    # Without the path on this machine of what it was trained on.
    config = json.loads(config_file.read_text()) | {"base_model_name_or_path": None}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    partial.rename(directory)


def save_map(model: Any, directory: Path) -> None:
    """Save the map of the model's `SilentOutput` alone, rounded to bfloat16; the directory appears when it is whole."""
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = model.get_output_embeddings().map.state_dict()
    save_file({name: value.bfloat16().contiguous() for name, value in weights.items()}, partial / MAP_WEIGHTS)
    partial.rename(directory)


def check_can_scale(directory: Path) -> None:
    """Raise `InvalidConfiguration` unless `scale_guide` can be done; reads a model's configuration alone."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config(decoder=True)
    if config.tie_word_embeddings or getattr(config, "final_logit_softcapping", None):
        raise InvalidConfiguration(f"{directory}: its output layer cannot be scaled; leave --scale out")


def scale_guide(directory: Path, factor: float) -> None:
    """Multiply the logits of a guide that was trained under its base, in its output layer and in the map beside it.

    That is the same as a weight: weight 1 then does what weight `factor` did.

    Args:
        directory: A plain model, with the adapter or map that was merged into it in `adapter/`.
        factor: Above 0.

    Raises:
        InvalidConfiguration: its logits are not proportional to its output layer's weights, or the embedding has them
            too.
    """
    check_can_scale(directory)
    model = load_whole(directory, dtype="auto")
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(factor)
    partial = directory / "scaled.partial"
    model.save_pretrained(partial)
    for path in [*partial.glob("*.safetensors"), *partial.glob("*.safetensors.index.json")]:
        path.replace(directory / path.name)
    shutil.rmtree(partial)
    for name in (MAP_WEIGHTS, ADAPTER_WEIGHTS):
        if (path := directory / ADAPTER / name).is_file():
            weights = load_file(path)
            scaled = {key: value * factor if MAP_UP.search(key) else value for key, value in weights.items()}
            save_file(scaled, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)


def merge_adapter(model: Any, adapter: Path) -> Any:
    """Return the model with a saved adapter or map added into its weights: a plain transformers model again."""
    if (adapter / MAP_WEIGHTS).is_file():
        weights = load_file(adapter / MAP_WEIGHTS)
        model = silence_output(model, len(weights["down"]))
        model.get_output_embeddings().map.load_state_dict(weights)
        return fold_output(model)
    kept = json.loads((adapter / "adapter_config.json").read_text()).get("modules_to_save") or ()
    if "map" not in kept:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    rank = next(len(value) for name, value in load_file(adapter / ADAPTER_WEIGHTS).items() if name.endswith("map.down"))
    return fold_output(PeftModel.from_pretrained(silence_output(model, rank), str(adapter)).merge_and_unload())
