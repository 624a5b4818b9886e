"""Command-line options that the benchmarks share."""

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.settings import CHECKOUT, locate_model
from actors.vocabularies import load_tokenizer
from bench.endless import make_endless
from bench.workload import Models, Prompts

BASE = "models/smollm2-135m-instruct"
GUIDES = ("models/positivity", "models/plainness")
RESULTS = CHECKOUT / "results" / "bench"
ROOM = 32
"""Tokens of context beyond what the longest prompt needs."""


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is measured, and where the result goes."""
    parser.add_argument("--base", default=BASE, help="model directory (default: %(default)s)")
    parser.add_argument(
        "--guide",
        action="append",
        metavar="DIRECTORY",
        help="a guide's model directory; may be repeated (default: the shipped guides)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each model (default: all cores)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for JSON and Markdown (default: %(default)s)"
    )


@contextmanager
def endless_models(
    arguments: argparse.Namespace, *, num_guides: int, max_sequences: int, max_tokens: int, **served: Any
) -> Iterator[tuple[Models, Prompts]]:
    """Make the models that the options name endless while the context lasts, and prompts for them.

    If more guides are wanted than there are directories, each is taken again under another name. `served` are other
    fields of `Models`.
    """
    paths = [Path(locate_model(path)) for path in arguments.guide or GUIDES]
    prompts = Prompts(load_tokenizer(locate_model(arguments.base)))
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        guides: dict[str, Path] = {}
        for number in range(num_guides):
            path, turn = paths[number % len(paths)], number // len(paths) + 1
            name = path.name if turn == 1 else f"{path.name}-{turn}"
            guides[name] = make_endless(path, Path(folder) / name)
        base = make_endless(Path(locate_model(arguments.base)), Path(folder) / "base")
        longest = max(prompts.num_tokens(Prompts(load_tokenizer(str(base))).batch(64, max_tokens=1, num_guides=0)))
        models = Models(
            base=base,
            guides=guides,
            dtype=arguments.dtype,
            threads=arguments.threads,
            max_sequences=max_sequences,
            max_context=64 * math.ceil((longest + max_tokens + ROOM) / 64),
            **served,
        )
        yield models, prompts


def positive(text: str) -> int:
    """Read a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def numbers(text: str) -> list[int]:
    """Read numbers with commas between them."""
    return [int(number) for number in text.split(",")]


def positives(text: str) -> list[int]:
    """Read numbers of at least 1 with commas between them."""
    return [positive(number) for number in text.split(",")]


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON takes them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
