"""Answers a file of prompts: `python -m deploy.batch --input prompts.jsonl --output results.jsonl`.

Runs on a machine of the cluster, by itself or under `ray job submit --working-dir . -- python -m deploy.batch ...`.
What it reads is in `deploy.jobs.batch.lines`, what it writes in `deploy.jobs.batch.results`; neither knows of Ray.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray.exceptions import RayError

from actors.coordinator.request import invalid_request
from cluster.errors import InvalidConfiguration, TrimtabError
from deploy.jobs.batch.lines import BatchLine, Defaults, Pending, read_lines
from deploy.jobs.batch.results import ResultFile
from deploy.jobs.progress import Progress
from deploy.jobs.requests import answer_all, connect


def parse_json(text: str) -> Any:
    """Return the value that an option gives as JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Defaults]:
    """Return the command line's choices. Exits with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.batch",
        description="Answer a file of prompts through the running service, one JSON object a line in and out.",
        epilog="An input line holds `prompt` or `messages`, any other field of a request (model, weights or "
        "guidance, max_tokens, temperature, seed, stop and the others of docs/api.md) and an `id` (default: the line's "
        "number). "
        "Results come in the order in which they finish: line, digest, id, the request's fields, and text, token_ids, "
        "finish_reason, usage, or error. The same command again continues where the last run stopped: answers are "
        "kept, failures tried again. Exit status: 0 all answered, 1 some failed, 2 nothing was started. Under "
        "`ray job submit` files are those of the machine where the job runs, and relative paths start in the job's own "
        "copy of the working folder: give --output as an absolute path.",
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="the requests")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the results, in order of completion"
    )
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="open requests at a time (16)")
    guidance = parser.add_mutually_exclusive_group()
    guidance.add_argument("--model", help="profile of lines that name neither a model nor weights")
    guidance.add_argument("--weights", type=parse_json, metavar="JSON", help='instead of --model: {"<guide>": 1.0}')
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of lines that do not say")
    parser.add_argument("--temperature", type=float, metavar="T", help="of lines that do not say")
    parser.add_argument(
        "--seed", type=int, default=0, help="lines without a seed get one from this and their number (0)"
    )
    parser.add_argument("--redo-changed", action="store_true", help="drop results of lines that have changed since")
    options = parser.parse_args(arguments)
    if options.concurrency < 1:
        parser.error(f"--concurrency: at least 1, not {options.concurrency}")
    fields = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    guided = {"model": options.model, "weights": options.weights}
    defaults = Defaults(
        fields={name: value for name, value in fields.items() if value is not None},
        guidance={name: value for name, value in guided.items() if value is not None},
        seed=options.seed,
    )
    try:
        BatchLine.model_validate(defaults.complete({"prompt": "a line"}, 1))
    except ValidationError as error:
        parser.error(f"--{invalid_request(error.errors()[0])}".replace("max_tokens", "max-tokens"))
    return options, defaults


def run(options: argparse.Namespace, defaults: Defaults) -> int:
    """Do the batch and return how many requests failed.

    Raises:
        InvalidConfiguration: it could not be started.
        OSError: a file cannot be read or written.
    """
    source, target = options.input.resolve(), options.output.resolve()
    if not source.is_file():
        raise InvalidConfiguration(f"--input: there is no file {source}")
    if not target.parent.is_dir():
        raise InvalidConfiguration(f"--output: there is no folder {target.parent}; make it first")
    if source == target:
        raise InvalidConfiguration(f"--output: {target} is the input")
    if target.exists() and not target.is_file():
        raise InvalidConfiguration(f"--output: {target} is no file")
    pending = Pending(read_lines(source, defaults))
    total = len(pending)
    client = connect()
    results = ResultFile(target)
    try:
        num_done = results.resume(pending, redo_changed=options.redo_changed)
        progress = Progress(total=total, num_done=num_done, file=sys.stderr)
        progress.note(f"{total} requests, {num_done} of them done before; results go to {target}")
        if ray.get_runtime_context().runtime_env.working_dir() and not options.output.is_absolute():
            progress.note("which is in the job's copy of the working folder: give an absolute --output to keep them")
        lines = (line for line in read_lines(source, defaults) if line.number in pending)
        try:
            asyncio.run(answer_all(lines, client.generate, results.append, progress, concurrency=options.concurrency))
        finally:
            progress.close()
    finally:
        results.close()
    return progress.num_failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, 1 if a request failed, 2 if the batch could not be done."""
    options, defaults = parse_arguments(arguments)
    try:
        return 1 if run(options, defaults) else 0
    except KeyboardInterrupt:
        print("deploy.batch: stopped; the same command continues", file=sys.stderr)
        return 130
    except (TrimtabError, OSError, RayError) as error:
        print(f"deploy.batch: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
