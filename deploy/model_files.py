"""What a model's directory must hold to be served, looked at without reading any weights."""

import json
from pathlib import Path

from cluster.errors import InvalidConfiguration

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
