"""Options of `trimtab batch`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from actors.coordinator.request import invalid_request
from cluster.errors import InvalidConfiguration
from deploy.cli.command import Command
from deploy.jobs.batch.lines import BatchLine, Defaults


def parse_json(text: str) -> Any:
    """Return the value that an option gives as JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which requests, and what lines have that do not say."""

    input: Annotated[Path, typer.Option(metavar="FILE", help="the requests")]
    output: Annotated[Path, typer.Option(metavar="FILE", help="the results, in order of completion")]
    concurrency: Annotated[int, typer.Option(metavar="N", help="open requests at a time (16)")] = 16
    model: Annotated[str | None, typer.Option(help="profile of lines that name neither a model nor weights")] = None
    weights: Annotated[
        Any, typer.Option(parser=parse_json, metavar="JSON", help='instead of --model: {"<guide>": 1.0}')
    ] = None
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="of lines that do not say")] = None
    temperature: Annotated[float | None, typer.Option(metavar="T", help="of lines that do not say")] = None
    seed: Annotated[int, typer.Option(help="lines without a seed get one from this and their number (0)")] = 0
    redo_changed: Annotated[
        bool, typer.Option("--redo-changed", help="drop results of lines that have changed since")
    ] = False

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise InvalidConfiguration(f"--concurrency: at least 1, not {self.concurrency}")
        if self.model is not None and self.weights is not None:
            raise InvalidConfiguration("--weights: not allowed with --model; leave one of them out")
        try:
            BatchLine.model_validate(self.defaults.complete({"prompt": "a line"}, 1))
        except ValidationError as error:
            told = f"--{invalid_request(error.errors()[0])}".replace("max_tokens", "max-tokens")
            raise InvalidConfiguration(told) from error

    @property
    def defaults(self) -> Defaults:
        """What lines have that do not say."""
        fields = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        guided = {"model": self.model, "weights": self.weights}
        return Defaults(
            fields={name: value for name, value in fields.items() if value is not None},
            guidance={name: value for name, value in guided.items() if value is not None},
            seed=self.seed,
        )


def _work(options: Options) -> None:
    from deploy.cli.batch import run

    run(options)


COMMAND = Command(
    name="batch",
    options=Options,
    work=_work,
    interrupted="stopped; the same command continues",
    description="Answer a file of prompts through the running service, one JSON object a line in and out.",
    epilog="An input line holds `prompt` or `messages`, any other field of a request (model, weights or guidance, "
    "max_tokens, temperature, seed, stop and the others of docs/api.md) and an `id` (default: the line's number). "
    "Results come in the order in which they finish: line, digest, id, the request's fields, and text, token_ids, "
    "finish_reason, usage, or error. The same command again continues where the last run stopped: answers are kept, "
    "failures tried again. Exit status: 0 all answered, 1 some failed, 2 nothing was started. Under `ray job submit` "
    "files are those of the machine where the job runs, and relative paths start in the job's own copy of the working "
    "folder: give --output as an absolute path.",
)
