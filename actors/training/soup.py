"""Averages of models: the weights of fine-tuned copies of one model, mixed tensor by tensor.

Rewarded Soups (arXiv 2306.04488) trains one copy for each objective and serves their averages. Works on directories as
`save_pretrained` leaves them; knows nothing of what the models compute.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cluster.errors import InvalidConfiguration

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx"}
"""Files of weights; what else lies beside them is copied as it is."""

SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor is kept, and its shape."""

    file: Path
    shape: tuple[int, ...]


def read_tensor_places(directory: Path) -> dict[str, TensorPlace]:
    """Return every tensor of a model by name, from the headers of its safetensors files alone.

    Raises:
        InvalidConfiguration: it has no such file, or one that cannot be read.
    """
    places: dict[str, TensorPlace] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    places[name] = TensorPlace(file, tuple(tensors.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise InvalidConfiguration(f"{file} is no safetensors file: {error}") from error
    if not places:
        raise InvalidConfiguration(f"{directory} has no *.safetensors; save the model with save_pretrained first")
    return places


def count_parameters(directory: Path) -> int:
    """Return how many numbers a model's tensors hold; those that are tied are kept, and counted, once."""
    return sum(math.prod(place.shape) for place in read_tensor_places(directory).values())


def check_average(directories: Mapping[Path, float]) -> None:
    """Check, from the headers alone, that the models can be averaged with these weights.

    Raises:
        InvalidConfiguration: the weights do not sum to 1, or the tensors differ in name or shape.
    """
    total = math.fsum(directories.values())
    if not math.isclose(total, 1.0, rel_tol=0, abs_tol=SUM_TOLERANCE):
        raise InvalidConfiguration(f"the weights {list(directories.values())} sum to {total:g}; make them sum to 1")
    first, *others = directories
    wanted = {name: place.shape for name, place in read_tensor_places(first).items()}
    for other in others:
        found = {name: place.shape for name, place in read_tensor_places(other).items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise InvalidConfiguration(
                    f"{first} and {other} cannot be averaged: the tensor {name!r} is {_shown(wanted.get(name))} in the "
                    f"first and {_shown(found.get(name))} in the second; take copies of one model"
                )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"


def average_models(directories: Mapping[Path, float], target: Path) -> None:
    """Write the weighted average of the models to a new directory.

    The tensors are summed in float32 and kept in the first model's dtype; configuration, tokenizer and the division
    into files are the first model's.

    Raises:
        InvalidConfiguration: the weights do not sum to 1, or the tensors differ in name or shape.
        FileExistsError: there is something at `target`.
    """
    check_average(directories)
    places = {directory: read_tensor_places(directory) for directory in directories}
    first = next(iter(directories))
    target.mkdir(parents=True)
    for file in first.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_SUFFIXES:
            shutil.copy(file, target)
    for file in sorted({place.file for place in places[first].values()}):
        averaged = {
            name: _average({places[directory][name].file: weight for directory, weight in directories.items()}, name)
            for name, place in places[first].items()
            if place.file == file
        }
        save_file(averaged, target / file.name, metadata={"format": "pt"})


def _average(files: Mapping[Path, float], name: str) -> torch.Tensor:
    """The weighted sum of the tensor of that name in each file."""
    total: torch.Tensor | None = None
    dtype = torch.float32
    for file, weight in files.items():
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        if total is None:
            total, dtype = torch.zeros(tensor.shape), tensor.dtype
        total.add_(tensor.float(), alpha=weight)
    assert total is not None
    return total.to(dtype)
