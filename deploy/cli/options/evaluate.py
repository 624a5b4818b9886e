"""Options of `trimtab evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.command import Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which plan, and how much of it."""

    plan: Annotated[Path, typer.Argument(help="evaluation.yaml")]
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="for the report and the answers")]
    only: Annotated[list[str] | None, typer.Option(metavar="ROW ...", help="have only these rows written")] = None
    report: Annotated[
        bool, typer.Option("--report", help="only make the report again, of the answers that are kept")
    ] = False


def _work(options: Options) -> None:
    from deploy.cli.evaluate import run

    run(options)


COMMAND = Command(
    name="evaluate",
    options=Options,
    work=_work,
    interrupted="stopped; the same command continues",
    spread="--only",
    description="Measure ways of writing on held-out prompts: report.md, results.json and two pictures.",
    epilog="Answers are kept under <output>/answers: the same command goes on where a run stopped, and a changed plan "
    "costs only the rows that changed. Relative paths in the plan start at the checkout; under `ray job submit` that "
    "is the job's own copy, so give absolute paths there, also for --output. Exit status: 0 if there is a report, 2 if "
    "not.",
)
