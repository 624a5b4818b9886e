"""The command line of `deploy.prefer`: its options, their defaults, and what is refused before anything is sampled."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.coordinator.request import GenerationRequest, invalid_request
from actors.training.rewards import EXAMPLE
from cluster.errors import InvalidConfiguration
from deploy.cli.batch import parse_json

MIN_TEMPERATURE = 0.01
"""Below, the samples of a prompt are all the same."""

LOCAL_DEFAULTS = {"dtype": "auto", "batch": 10, "sentence": None}
SERVICE_DEFAULTS = {"profile": None, "weights": None, "concurrency": 16}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's choices, with paths that are absolute. Exits with status 2 if they make no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check_options(parser, options)
    for name in ("prompts", "output", "answers", "model"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
    if options.answers is None:
        options.answers = options.output.with_name(f"{options.output.stem}.answers.jsonl")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.prefer",
        description="Make preference pairs out of a model: sample answers to prompts, score them, pair them.",
        epilog="A line of the prompts holds `messages` or `prompt`, and an `id` (its line if absent). A line of "
        "the pairs holds that, `chosen` and `rejected`, and the finish reason and reward of each. The answers file "
        "makes a stopped run go on, and gives another reward the same answers: give the options of the first run. "
        "Exit status: 0, or 2 if there are no pairs.",
    )
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    parser.add_argument("--prompts", **file, required=True, help="the prompts, JSON Lines")
    parser.add_argument("--output", **file, required=True, help="the pairs")
    parser.add_argument("--answers", **file, help="the answers; what it holds is kept (<output's stem>.answers.jsonl)")
    parser.add_argument(
        "--reward",
        required=True,
        metavar="MODULE:FUNCTION",
        help=f"f(prompt, response) -> float, higher is better: {EXAMPLE}, actors.training.rewards:plainness, or your "
        "own; the current directory is searched too",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--samples", type=int, default=8, metavar="N", help="answers to each prompt (8)")
    sampling.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer (128)")
    sampling.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(1.0)")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(1.0)")
    sampling.add_argument("--seed", type=int, default=0, help="of the samples and of the choice of pairs (0)")
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--margin", type=float, default=0.0, metavar="R", help="smallest difference of rewards (0)")
    pairs.add_argument(
        "--max-length-difference",
        type=int,
        metavar="N",
        help="in tokens; pairs whose lengths differ by more are left out (no limit). Summed log-probabilities of "
        "answers of different lengths differ by nats for every token, which drowns the reward",
    )
    pairs.add_argument(
        "--max-length-ratio",
        type=float,
        metavar="R",
        help="of the longer answer to the shorter one, in tokens; for whole answers, which differ in length by much",
    )
    pairs.add_argument(
        "--max-repeat", type=int, metavar="N", help="words in a row that the better answer says twice (no limit)"
    )
    pairs.add_argument(
        "--pairs-per-prompt", type=int, default=8, metavar="N", help="at most, drawn at random; 0 keeps all (8)"
    )
    pairs.add_argument(
        "--widest", action="store_true", help="keep the pairs whose rewards differ the most, no answer in two of them"
    )
    _add_ways_of_sampling(parser)
    return parser


def _add_ways_of_sampling(parser: argparse.ArgumentParser) -> None:
    service = parser.add_argument_group("through the running service (default)")
    guidance = service.add_mutually_exclusive_group()
    guidance.add_argument("--profile", metavar="NAME", help="guidance of the answers (none: the base alone)")
    guidance.add_argument("--weights", type=parse_json, metavar="JSON", help='instead of --profile: {"<guide>": 1.0}')
    service.add_argument("--concurrency", type=int, metavar="N", help="open requests at a time (16)")
    local = parser.add_argument_group("from a model in this process")
    local.add_argument("--model", type=Path, metavar="DIR", help="of a transformers model; no service is needed")
    local.add_argument(
        "--sentence",
        type=int,
        metavar="N",
        help="cut answers off at the end of the first sentence behind N tokens: pairs of sentences after the same "
        "beginning teach more a token than whole answers, where the reward is one of sentences",
    )
    local.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], help="bfloat16 on processors that have it (auto)"
    )
    local.add_argument("--batch", type=int, metavar="N", help="prompts at a time (10)")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the defaults of the way of sampling that was chosen, and refuse what belongs to the other."""
    own, other = (LOCAL_DEFAULTS, SERVICE_DEFAULTS) if options.model else (SERVICE_DEFAULTS, LOCAL_DEFAULTS)
    for name in other:
        if getattr(options, name) is not None:
            parser.error(f"--{name}: means nothing {'with' if options.model else 'without'} --model; leave it out")
    for name, value in own.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    least = {
        "samples": 2,
        "concurrency": 1,
        "batch": 1,
        "max_length_difference": 0,
        "max_repeat": 0,
        "pairs_per_prompt": 0,
        "sentence": 1,
        "seed": 0,
    }
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and value < limit:
            parser.error(f"--{name.replace('_', '-')}: at least {limit}, not {value}")
    if not (math.isfinite(options.margin) and options.margin >= 0):
        parser.error(f"--margin: at least 0, not {options.margin}")
    if options.max_length_ratio is not None and not options.max_length_ratio >= 1:
        parser.error(f"--max-length-ratio: at least 1, not {options.max_length_ratio}")
    if options.temperature < MIN_TEMPERATURE:
        parser.error(f"--temperature: at least {MIN_TEMPERATURE}, not {options.temperature}; answers must differ")
    try:
        GenerationRequest.model_validate({"prompt": "a prompt", **request_fields(options)})
    except ValidationError as error:
        parser.error(f"--{invalid_request(error.errors()[0])}".replace("_", "-"))


def request_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all requests to the service have in common."""
    fields = {"model": options.profile, "weights": options.weights}
    fields |= {"max_tokens": options.max_tokens, "temperature": options.temperature, "top_p": options.top_p}
    return {name: value for name, value in fields.items() if value is not None}


def check_files(options: argparse.Namespace) -> None:
    """Look for what is to be read, and for the folders of what is to be written.

    Raises:
        InvalidConfiguration: something is not there, or two options name one file.
    """
    if not options.prompts.is_file():
        raise InvalidConfiguration(f"--prompts: there is no file {options.prompts}")
    if options.model and not options.model.is_dir():
        raise InvalidConfiguration(f"--model: there is no folder {options.model}")
    files = {"--prompts": options.prompts}
    for option, path in {"--answers": options.answers, "--output": options.output}.items():
        if not path.parent.is_dir():
            raise InvalidConfiguration(f"{option}: there is no folder {path.parent}; make it first")
        if path.exists() and not path.is_file():
            raise InvalidConfiguration(f"{option}: {path} is no file")
        if path in files.values():
            raise InvalidConfiguration(f"{option}: {path} is another file of this run; give another")
        files[option] = path
