"""What arithmetic must know of a model, from its configuration alone: the model is built without its weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.models.inspection import inspect_model
from cluster.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's sizes. Counts of numbers, not of bytes."""

    parameters: int
    """All weights; those that two places share count once."""

    read_parameters: int
    """Those that a step reads and multiplies: without an embedding table that is not the output matrix too."""

    layers: int
    hidden: int
    vocabulary: int
    """Columns of the logits."""

    cache_per_token: int
    """Keys and values of one token, in all layers together."""

    cache_heads: int
    """Key-value heads of a layer; they are what tensor parallelism shares out."""

    can_be_sharded: bool
    """Whether transformers has a plan for sharing it out."""


def read_shape(model: str, *, max_context: int) -> Shape:
    """Return the shape of the model in a directory or under a hub id.

    Raises:
        InvalidConfiguration: there is no such model, or the engine cannot run it.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InvalidConfiguration(
            f"the configuration of {model!r} cannot be read: {error} Give its directory, or log in where it is gated."
        ) from error
    return shape_of(config, max_context=max_context)


def shape_of(config: Any, *, max_context: int) -> Shape:
    """Return the shape of the model that a configuration describes.

    Raises:
        InvalidConfiguration: the engine cannot run such a model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval()
    except ValueError as error:
        raise InvalidConfiguration(
            f"a {config.model_type!r} model is no causal language model of transformers"
        ) from error
    except Exception as error:
        # Sizes that cannot be, or kinds of positions and activations that transformers does not have.
        raise InvalidConfiguration(
            f"no model can be made of the configuration of {config.name_or_path!r}: {error!r}; correct its config.json"
        ) from error
    # The engine's own look at a model: what it would refuse at start is refused here.
    inspection = inspect_model(model, max_context)
    layers = list(inspection.layers.values())
    parameters = model.num_parameters()
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return Shape(
        parameters=parameters,
        read_parameters=parameters if head is table else parameters - table.numel(),
        layers=len(layers),
        hidden=config.get_text_config(decoder=True).hidden_size,
        vocabulary=inspection.num_columns,
        cache_per_token=sum(layer.num_heads * (layer.key_width + layer.value_width) for layer in layers),
        cache_heads=min(layer.num_heads for layer in layers),
        can_be_sharded=bool(model.tp_plan),
    )
