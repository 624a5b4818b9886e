"""Checks a deploy.yaml before anything starts: `trimtab check deploy.yaml`.

The first mistake is told by its path, in seconds and without loading a model. What this machine lacks is a warning,
since other nodes may have it.
"""

import sys
from collections.abc import Sequence

import yaml

from cluster.errors import InvalidConfiguration
from deploy.cli.command import complain, default_file
from deploy.cli.options.check import COMMAND, Options
from deploy.cli.trimtab import old_way
from deploy.jobs.outcome import BadOutcome
from deploy.jobs.progress import busy
from deploy.service.verdict import judge


def run(options: Options) -> None:
    """Say whether the file is fine, and what this machine lacks.

    Raises:
        BadOutcome: there is a mistake in it.
        OSError: it cannot be read.
    """
    file = options.file or default_file()
    try:
        with busy(f"checking {file}"):
            warnings = judge(yaml.safe_load(file.read_bytes()))
    except (yaml.YAMLError, InvalidConfiguration) as error:
        raise BadOutcome(f"{file}: {error}") from error
    for warning in warnings:
        complain(COMMAND.name, f"{file}: warning: {warning}")
    print(f"{file}: fine" if not warnings else f"{file}: fine, but for what this machine lacks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, 1 if there is a mistake, 2 if the file cannot be read."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("check"))
