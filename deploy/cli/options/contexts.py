"""Options of `trimtab contexts`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.command import Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which answers, and how many places inside them."""

    answers: Annotated[Path, typer.Option(metavar="FILE", help="that trimtab prefer keeps")]
    model: Annotated[Path, typer.Option(metavar="DIR", help="whose template and tokens they have")]
    output: Annotated[Path, typer.Option(metavar="FILE", help="the prompts")]
    inside: Annotated[int, typer.Option(metavar="N", help="places inside answers to each prompt (2)")] = 2
    max_characters: Annotated[int, typer.Option(metavar="N", help="of an answer's beginning (500)")] = 500
    seed: Annotated[int, typer.Option(help="(0)")] = 0


def _work(options: Options) -> None:
    from deploy.cli.contexts import run

    run(options)


COMMAND = Command(
    name="contexts",
    options=Options,
    work=_work,
    description="Make prompts that end inside answers, for trimtab prefer --sentence.",
)
