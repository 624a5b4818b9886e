"""Runs a service in the foreground: `trimtab serve deploy.yaml`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from actors.settings import START
from cluster.errors import InvalidConfiguration
from deploy.cli.command import complain, default_file
from deploy.cli.options.serve import COMMAND, Options
from deploy.jobs.progress import busy
from deploy.service.verdict import judge, models_in

VARIABLES: Mapping[str, str] = {
    # Serve's proxy talks gRPC to the gateway, which halves what a streamed token costs.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # Serve kills what fails its health checks instead of waiting `drain_s` for it.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
"""What Serve is to do otherwise than by itself, where the environment does not say. A cluster that runs already keeps
what it was started with."""


def run(options: Options) -> None:
    """Check the file, make the models that it needs and that ship, and serve until Ctrl-C.

    Raises:
        InvalidConfiguration: it cannot be served; nothing was started.
        OSError: the file cannot be read.
    """
    file = options.file or default_file()
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    # Ray reads them when it is imported.
    from deploy.service.foreground import prepare, read
    from deploy.service.foreground import run as serve

    try:
        config = read(file)
        url = prepare(config)
        make_shipped_models(config)
        _check(config)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"{file}: {error}") from error
    serve(file, config, url)


def _check(config: Any) -> None:
    """Find the mistakes of a deploy.yaml, and say what this machine lacks.

    Raises:
        InvalidConfiguration: the first of them.
    """
    with busy("checking"):
        warnings = judge(config)
    for warning in warnings:
        complain(COMMAND.name, f"warning: {warning}")


def make_shipped_models(config: Any) -> None:
    """Make the models that ship, if a deploy.yaml names one of them.

    Raises:
        InvalidConfiguration: they cannot be made.
    """
    from deploy.cli.models import MODELS, NAMES, make_models

    if {str(MODELS / name) for name in NAMES} & {str(START / model) for model in models_in(config)}:
        make_models(MODELS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, or 2 if nothing was started."""
    return COMMAND.main(arguments)
