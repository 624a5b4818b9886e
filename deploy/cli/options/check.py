"""Options of `trimtab check`."""

from dataclasses import dataclass

from deploy.cli.command import Command, DeployFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is to be checked."""

    file: DeployFile = None


def _work(options: Options) -> None:
    from deploy.cli.check import run

    run(options)


COMMAND = Command(
    name="check",
    options=Options,
    work=_work,
    description="Check a deploy.yaml without starting anything. The first mistake is told by its path; what this "
    "machine lacks is a warning, since other nodes may have it.",
    epilog="Exit status: 0 fine, 1 there is a mistake, 2 the file cannot be read.",
)
