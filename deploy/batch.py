"""Answers a file of prompts: `python -m deploy.batch --input prompts.jsonl --output results.jsonl`.

Runs on a machine of the cluster, by itself or under `ray job submit --working-dir . -- python -m deploy.batch ...`.
What it reads is in `deploy.batch_lines`, what it writes in `deploy.batch_results`; neither knows of Ray.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from tqdm import tqdm

from actors.api import Piece
from actors.coordinator.request import invalid_request
from cluster.errors import DeadlineExceeded, InvalidConfiguration, Overloaded, ReplicaLost, TrimtabError
from deploy.batch_lines import BatchLine, Defaults, Line, Pending, read_lines
from deploy.batch_results import ResultFile
from deploy.client import AsyncClient

TRANSIENT = (ReplicaLost, Overloaded, DeadlineExceeded)
"""Errors that another try may not meet."""

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Before each further try of a request that met such an error."""

REPORT_PERIOD_S = 10.0

Generate = Callable[..., Awaitable[Piece]]


class Progress:
    """Counts on stderr: a bar on a terminal, elsewhere one line now and then."""

    def __init__(self, *, total: int, num_done: int, file: IO[str]) -> None:
        self.num_failed = 0
        self._num_done = num_done
        self._total = total
        self._file = file
        self._reported_at = time.monotonic()
        self._bar = tqdm(total=total, initial=num_done, unit="request", file=file) if file.isatty() else None

    def succeed(self) -> None:
        """Count a request with an answer."""
        self._num_done += 1
        self._advance()

    def fail(self, line: Line, error: BaseException) -> None:
        """Count a request without one, and say why."""
        self.num_failed += 1
        self.note(f"line {line.number}: {type(error).__name__}: {error}")
        self._advance()

    def note(self, text: str) -> None:
        """Say something without disturbing the bar."""
        if self._bar is None:
            print(text, file=self._file, flush=True)
        else:
            self._bar.write(text, file=self._file)

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix(failed=self.num_failed, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._reported_at >= REPORT_PERIOD_S:
            self.report()

    def report(self) -> None:
        """Give the counts as text."""
        self._reported_at = time.monotonic()
        self.note(f"{self._num_done} done, {self.num_failed} failed of {self._total}")

    def close(self) -> None:
        """Leave the bar as it stands, and the counts below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self.report()


async def answer_all(
    lines: Iterable[Line],
    generate: Generate,
    record: Callable[[Line, Mapping[str, Any]], None],
    progress: Progress,
    *,
    concurrency: int,
    pauses_s: Sequence[float] = PAUSES_S,
) -> None:
    """Answer every line, at most `concurrency` at a time, and record each as it finishes.

    `lines` is read no faster than requests are done. What `generate` raises is recorded.

    Raises:
        OSError: what `lines` and `record` raise; calls that are open are cancelled.
    """
    waiting = iter(lines)

    async def answer_in_turn() -> None:
        for line in waiting:
            try:
                piece = await _answer(line, generate, progress, pauses_s)
            except Exception as error:
                described = {
                    "type": type(error).__name__,
                    "message": str(error),
                    "field": getattr(error, "field", None),
                }
                record(line, {"error": described})
                progress.fail(line, error)
            else:
                record(line, {**piece})
                progress.succeed()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(answer_in_turn())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _answer(line: Line, generate: Generate, progress: Progress, pauses_s: Sequence[float]) -> Piece:
    if line.error is not None:
        raise line.error
    for pause_s in pauses_s:
        try:
            return await generate(**line.fields)
        except TRANSIENT as error:
            progress.note(f"line {line.number}: {type(error).__name__}: {error}; next try in {pause_s:g} s")
            await asyncio.sleep(pause_s)
    return await generate(**line.fields)


def connect() -> AsyncClient:
    """Return a client of the service on the running cluster.

    Raises:
        InvalidConfiguration: there is no cluster, or the service on it does not run yet.
        ReplicaLost: there is no service on it.
    """
    start = "start the service with `serve run deploy.yaml` (or `serve deploy deploy.yaml` on a running cluster)"
    # Where a cluster's address is known but nothing answers there, Ray tries for minutes without a word.
    print("connecting to the Ray cluster", os.environ.get("RAY_ADDRESS", ""), file=sys.stderr, flush=True)
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise InvalidConfiguration(f"no Ray cluster runs on this machine; {start}") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    application = serve.status().applications.get("trimtab")
    if application is not None and application.status != "RUNNING":
        raise InvalidConfiguration(
            f"the application `trimtab` is {application.status.value}; wait until `serve status` says RUNNING"
        )
    return AsyncClient()


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
