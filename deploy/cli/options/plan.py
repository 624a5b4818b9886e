"""Options of `trimtab plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from cluster.errors import InvalidConfiguration
from deploy.cli.command import Command
from deploy.planning.hardware import ACCELERATORS, THIS_MACHINE, find_accelerator


class Choice(NamedTuple):
    """An accelerator, by name, for one application or, where that is empty, for all."""

    application: str
    accelerator: str


def _choice(text: str) -> Choice:
    """`h100` for all applications, `trimtab-guide-kind=l4` for one."""
    application, _, name = text.rpartition("=")
    if name != THIS_MACHINE and find_accelerator(name) is None:
        raise InvalidConfiguration(f"--accelerator: {name!r} is none of {', '.join([*ACCELERATORS, THIS_MACHINE])}")
    return Choice(application, name)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which service, and under which load."""

    file: Annotated[Path, typer.Argument(help="a deploy.yaml")]
    accelerator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[APPLICATION=]NAME",
            help="of all applications that name no accelerator_type, or of one; may be repeated",
        ),
    ] = None
    sequences: Annotated[int, typer.Option(metavar="N", help="that are live at the same time (64)")] = 64
    context: Annotated[int, typer.Option(metavar="N", help="tokens of each, on the average (1024)")] = 1024
    guides: Annotated[str | None, typer.Option(metavar="A,B", help="that every sequence uses; all if absent")] = None
    network_gbit_s: Annotated[float, typer.Option(metavar="N", help="of each machine (25.0)")] = 25.0
    apart: Annotated[bool, typer.Option("--apart", help="guides are on other machines than the base")] = False
    json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False

    def __post_init__(self) -> None:
        for name, number in (("sequences", self.sequences), ("context", self.context)):
            if number < 1:
                raise InvalidConfiguration(f"--{name}: at least 1, not {number}")
        if not self.network_gbit_s > 0:
            raise InvalidConfiguration(f"--network-gbit-s: above 0, not {self.network_gbit_s}")
        _ = self.accelerators

    @property
    def accelerators(self) -> list[Choice]:
        """What `--accelerator` says.

        Raises:
            InvalidConfiguration: there are no figures of one.
        """
        return [_choice(text) for text in self.accelerator or ()]

    @property
    def chosen_guides(self) -> list[str] | None:
        """The guides that every sequence uses; none if that is not said."""
        return None if self.guides is None else _names(self.guides)


def _work(options: Options) -> None:
    from deploy.cli.plan import run

    run(options)


COMMAND = Command(
    name="plan",
    options=Options,
    work=_work,
    description="""Plan a service before there is a machine for it.

From the models' configurations alone, without their weights: memory of each model, bytes that travel, the time of a
step and its bottleneck for a number of sequences, what would help, and the same service with up to 4,096 base
replicas. An estimate for choosing machines; docs/operations.md says how far off it was where it could be checked.""",
    epilog=f"Accelerators: {', '.join([*ACCELERATORS, THIS_MACHINE])}; {THIS_MACHINE} measures its processors.",
)
