"""Where rows come from: files of several kinds, and data sets of the Hugging Face hub.

Owns their numbers and the digest of what was read. Does not know what a row holds: it may be no object at all.
"""

import codecs
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.training.data_formats import UnusableRow
from cluster.errors import InvalidConfiguration

Rows = Iterator[tuple[int, Any]]
"""Rows by number: whatever stands there, or the UnusableRow that says why nothing does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A source about to be read."""

    name: str
    unit: str
    """What its numbers count."""

    rows: Rows
    digest: Any
    """A hashlib object that has taken everything in once all rows are read."""


def open_source(source: str, split: str) -> Opened:
    """Find a file or, where the source looks like no path, a data set of the hub; its rows are read as they are taken.

    Raises:
        InvalidConfiguration: there is no such file, or its kind is not known; and as rows are taken, the source cannot
            be read.
    """
    digest = hashlib.sha256()
    path = Path(os.path.expanduser(source))
    suffix = path.suffix.lower()
    # Not Path.exists, which raises for names that are too long.
    is_there = os.path.exists(path)
    if not (is_there or source.startswith(("/", "./", "../", "~")) or suffix in _READERS):
        return Opened(name=source, unit="row", rows=_read_hub(source, split, digest), digest=digest)
    known = ", ".join(_READERS)
    if not is_there:
        raise InvalidConfiguration(f"{path.absolute()} does not exist; correct the path")
    if path.is_dir():
        raise InvalidConfiguration(f"{path.absolute()} is a directory; give one file of {known}")
    if suffix not in _READERS:
        raise InvalidConfiguration(f"{source}: files ending in {suffix!r} are not known; convert it to one of {known}")
    if split != "train":
        raise InvalidConfiguration(f"--split: {split!r} is for data sets of the hub, and {source} is a file")
    unit, read = _READERS[suffix]
    return Opened(name=source, unit=unit, rows=_read_file(read, path, digest), digest=digest)


def _read_file(read: Callable[[Path, Any], Rows], path: Path, digest: Any) -> Rows:
    try:
        yield from read(path, digest)
    except OSError as error:
        raise InvalidConfiguration(f"{path.absolute()} cannot be read: {error}") from error


def _read_lines(path: Path, digest: Any) -> Rows:
    """One line in memory at a time."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            digest.update(raw)
            if not _is_blank(raw):
                yield number, _parse(raw)


def _read_json(path: Path, digest: Any) -> Rows:
    """A list, or else lines."""
    with path.open("rb") as file:
        start = next((raw for raw in file if not _is_blank(raw)), b"")
    if not start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _read_lines(path, digest)
        return
    content = path.read_bytes()
    digest.update(content)
    rows = _parse(content)
    if isinstance(rows, UnusableRow):
        raise InvalidConfiguration(f"{path.absolute()}, a list of rows, is {rows}; mend it") from rows
    yield from enumerate(rows, 1)


def _is_blank(raw: bytes) -> bool:
    return not raw.removeprefix(codecs.BOM_UTF8).strip()


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        # Also text that is not UTF-8, and nesting without end.
        return UnusableRow("not JSON", str(error))


def _read_parquet(path: Path, digest: Any) -> Rows:
    """One batch of rows in memory at a time."""
    parquet = _library("pyarrow.parquet", path)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ValueError, NotImplementedError) as error:
        raise InvalidConfiguration(f"{path.absolute()} cannot be read as Parquet: {error}") from error


def _read_hub(source: str, split: str, digest: Any) -> Rows:
    datasets = _library("datasets", source)
    try:
        rows = datasets.load_dataset(source, split=split)
    except ConnectionError as error:
        raise InvalidConfiguration(
            f"{source} is no file here, and the Hugging Face hub cannot be reached ({error}); "
            f"give a file of {', '.join(_READERS)}"
        ) from error
    except Exception as error:  # the library lets those of its many parts through
        raise InvalidConfiguration(
            f"{source}, split {split!r}, is no file here and cannot be had from the Hugging Face hub: {error}"
        ) from error
    for number, row in enumerate(rows, 1):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
        yield number, row


def _library(name: str, source: object) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidConfiguration(
            f"{source}: reading it takes {name.partition('.')[0]}, which is not installed; pip install 'trimtab[train]'"
        ) from error


_READERS: dict[str, tuple[str, Callable[[Path, Any], Rows]]] = {
    ".jsonl": ("line", _read_lines),
    ".json": ("row", _read_json),
    ".parquet": ("row", _read_parquet),
}
"""By suffix: what the numbers of rows count, and the function that yields them."""
