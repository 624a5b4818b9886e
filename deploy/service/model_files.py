"""What a model's directory must hold to be served, looked at without reading any weights."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers import AutoHfQuantizer

from actors.settings import START
from cluster.errors import InvalidConfiguration
from deploy.service.validation import nearest

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

ROPE_TYPES = ("default", *sorted({*ROPE_INIT_FUNCTIONS} - {"default"}))


def check_weights(model: str) -> None:
    """Check that all files are there that hold a model's weights. A hub id is taken as it is.

    Raises:
        InvalidConfiguration: one of them is missing; it is named.
    """
    directory = Path(model)
    if not directory.is_dir() or (directory / WEIGHTS).is_file():
        return
    index = directory / INDEX
    if not index.is_file():
        others = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        remedy = f"save {others[0]} as safetensors with transformers" if others else "copy them there"
        raise InvalidConfiguration(f"{model} has no weights ({WEIGHTS}, or {INDEX} and its parts); {remedy}")
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidConfiguration(f"{index} cannot be read: {error!r}; save the model again") from error
    missing = [part for part in parts if not (directory / part).is_file()]
    if missing:
        raise InvalidConfiguration(
            f"{model} lacks {len(missing)} of its {len(parts)} files of weights, {missing[0]} first; copy them there"
        )


def read_config(model: str) -> Any:
    """Return the configuration of a model that can be loaded here, as far as it says.

    Raises:
        InvalidConfiguration: it cannot be read, or asks for what is not there.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        # transformers raises whatever a configuration makes it: KeyError, ZeroDivisionError, errors of validators.
        told = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        models = [f"models/{file.parent.name}" for file in (START / "models").glob("*/config.json")]
        remedy = nearest(model, models) or "; mend its config.json"
        raise InvalidConfiguration(f"the model {model!r} cannot be read: {told}{remedy}") from error
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        try:
            AutoHfQuantizer.from_config(quantization).validate_environment()
        except (ImportError, ValueError) as error:
            raise InvalidConfiguration(
                f"the model {model!r} is quantised in a way that cannot be read here: {error}; give the model as it "
                "was before, or install what is missing on every node"
            ) from error
        except RuntimeError as error:
            logger.warning(
                "the model %r is quantised: %s; the nodes that serve it may have what this machine lacks", model, error
            )
    for rope_type in _rope_types(getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}):
        if rope_type not in ROPE_TYPES:
            raise InvalidConfiguration(
                f"the model {model!r} cannot be read: config.json has the rope type {rope_type!r}, which is none of "
                f"{', '.join(ROPE_TYPES)}; save the model with a newer transformers ('su' is now 'longrope')"
            )
    return config


def _rope_types(parameters: Mapping[str, Any]) -> list[str]:
    """The types of rotary positions, of all layers or of each kind of layer."""
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [group["rope_type"] for group in groups if "rope_type" in group]
