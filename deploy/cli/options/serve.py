"""Options of `trimtab serve`."""

from dataclasses import dataclass

from deploy.cli.command import Command, DeployFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is to be served."""

    file: DeployFile = None


def _work(options: Options) -> None:
    from deploy.cli.serve import run

    run(options)


COMMAND = Command(
    name="serve",
    options=Options,
    work=_work,
    description="Check a deploy.yaml, make the shipped models if it names them, and run the service until Ctrl-C. It "
    "is said when the service is ready, and where.",
    epilog="A port that is taken is refused before anything starts. On a Ray cluster that runs already, which "
    "RAY_ADDRESS may name, the service starts there.",
)
