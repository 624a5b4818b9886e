"""Whether a deploy.yaml can be served from here: all checks, and what this machine lacks.

Checking takes seconds, nearly all of them for importing torch, transformers and Ray. So it is remembered what was found
fine: under a digest of all that the checks read, which are the file, the models' files, the keys, the machine, the
libraries and these sources. What was not fine is checked again. Imports nothing large for what is remembered.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actors.settings import CHECKOUT, START, cache_folder
from deploy.http.access.keys import KEYS_VARIABLE
from deploy.service.port import names_a_cluster

LIBRARIES = ("numpy", "pydantic", "ray", "tokenizers", "torch", "transformers")
SOURCES = ("actors", "cluster", "deploy")

MAX_REMEMBERED = 100
"""Files; the oldest go."""


def judge(config: Any, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Check a parsed deploy.yaml; return what this machine lacks, which matters where no other cluster is named.

    Raises:
        InvalidConfiguration: the first mistake in it.
    """
    digest = digest_of(config, environment)
    file = None if digest is None else cache_folder(environment) / "checked" / f"{digest}.json"
    # A file that another version wrote, or that was cut off, is as good as none.
    with contextlib.suppress(OSError, ValueError):
        if file is not None:
            remembered: list[str] = json.loads(file.read_text())
            return remembered
    lacks = _judge(config, environment)
    # A home that cannot be written to makes the next check slower, and nothing else.
    with contextlib.suppress(OSError):
        if file is not None:
            _remember(file, lacks)
    return lacks


def _judge(config: Any, environment: Mapping[str, str]) -> list[str]:
    from deploy.service.capacity import Machine, shortages
    from deploy.service.check import check

    schema, settings = check(config)
    return [] if names_a_cluster(environment) else list(shortages(schema, settings, Machine.here()))


def digest_of(config: Any, environment: Mapping[str, str]) -> str | None:
    """Return a digest of all that the checks read; none where a model is no directory, but on a hub."""
    if not all(os.path.isdir(_path(model)) for model in models_in(config)):
        return None
    named = [_path(text) for text in _strings(config)]
    models = [path for path in named if os.path.isfile(path / "config.json")]
    read = {
        "config": config,
        "files": [_state(path) for path in named if os.path.isfile(path)],
        "models": [[_state(file) for file in sorted(path.iterdir())] for path in models],
        "sources": [_state(path) for top in SOURCES for path in sorted((CHECKOUT / top).rglob("*.py"))],
        "libraries": [platform.python_version(), *map(importlib.metadata.version, LIBRARIES)],
        "keys": environment.get(KEYS_VARIABLE),
        "elsewhere": names_a_cluster(environment),
        "machine": [os.cpu_count(), os.sysconf("SC_PHYS_PAGES"), sorted(map(str, Path("/dev").glob("nvidia*")))],
    }
    return hashlib.sha256(repr(read).encode()).hexdigest()


def _path(text: str) -> Path:
    """What a text in a deploy.yaml means, if it is a path. `os.path` takes any text, `pathlib` raises for some."""
    return START / os.path.expanduser(text)


def _state(path: Path) -> tuple[str, int, int]:
    """What tells that a file has changed; of a broken link, the link's own."""
    stat = os.stat(path) if os.path.exists(path) else os.lstat(path)
    return str(path), stat.st_size, stat.st_mtime_ns


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in parsed YAML, which may be a path."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def models_in(config: Any) -> Iterator[str]:
    """Yield the models that parsed YAML names, as far as it is a deploy.yaml."""
    applications = config.get("applications") if isinstance(config, dict) else None
    for application in applications if isinstance(applications, list) else ():
        args = application.get("args") if isinstance(application, dict) else None
        if isinstance(args, dict):
            yield from (model for name in ("model", "base") if isinstance(model := args.get(name), str))


def _remember(file: Path, lacks: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as whole:
        json.dump(lacks, whole)
    os.replace(whole.name, file)
    for old in sorted(file.parent.iterdir(), key=lambda each: each.stat().st_mtime)[:-MAX_REMEMBERED]:
        old.unlink()
