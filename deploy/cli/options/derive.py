"""Options of `trimtab derive`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from cluster.errors import InvalidConfiguration
from deploy.cli.command import Command
from deploy.jobs.training.options import RunOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(RunOptions):
    """What is to be cut, and healed by what."""

    model: Annotated[str, typer.Option(help="directory or hub id of the model to cut")]
    keep: Annotated[
        int | None,
        typer.Option(metavar="N", help="layers to keep: the last three in ten, the rest from the first"),
    ] = None
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="instead: the very layers to keep, such as 0-6,27-29")
    ] = None
    data: Annotated[str, typer.Option(metavar="FILE", help="prompts with responses: a file, or a hub id")]
    lora_rank: Annotated[int | None, typer.Option(help="of an adapter on all projections (32)")] = None
    batch_size: Annotated[int, typer.Option(metavar="N", help="texts of a step, over all workers (32)")] = 32
    epochs: Annotated[float | None, typer.Option(metavar="N", help="passes over the texts (2)")] = 2.0

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.layers is None):
            raise InvalidConfiguration("--keep, --layers: give one of them")


def _work(options: Options) -> None:
    from deploy.cli.derive import run

    run(options)


COMMAND = Command(
    name="derive",
    options=Options,
    work=_work,
    description="Cut a smaller model with the same vocabulary out of a model, and distil the model into it.",
    epilog="Data: the model's own answers are best: the file of answers that trimtab prefer keeps, a file of pairs, or "
    "rows of prompt (or messages) and response. Exit status as of trimtab train.",
)
