"""Copies of model directories whose texts do not end.

Weights are links to the originals; only the settings that name an end token lack it. A text so goes on to its last
token wherever it is written, and no system is faster because its texts happened to end.
"""

import json
from pathlib import Path

SETTINGS = {
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
}


def make_endless(model: Path, copy: Path) -> Path:
    """Make the directory `copy`, which holds the model of `model` without an end token; return it."""
    copy.mkdir(parents=True)
    for file in model.iterdir():
        name = SETTINGS.get(file.name)
        if name is None:
            (copy / file.name).symlink_to(file.resolve())
        else:
            (copy / file.name).write_text(json.dumps({**json.loads(file.read_text()), name: None}))
    generation = copy / "generation_config.json"
    if not generation.exists():
        generation.write_text("{}")
    return copy
