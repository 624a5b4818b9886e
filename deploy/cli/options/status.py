"""Options of `trimtab status`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from deploy.cli.command import Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How it is to be said."""

    json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False


def _work(options: Options) -> None:
    from deploy.cli.status import run

    run(options)


COMMAND = Command(
    name="status",
    options=Options,
    work=_work,
    description="Say what runs, by application and replica, with the sequences that each holds, how many requests "
    "wait, and where HTTP listens.",
    epilog="Exit status: 0 if every application runs, 1 if one does not, 2 if there is no service. RAY_ADDRESS names "
    "a Ray cluster other than this machine's.",
)
