"""Runs a checked deploy.yaml in the foreground: `python -m deploy.start deploy.yaml`, part of `make serve`.

`serve run`, but for two things: a port that is taken is refused before anything starts, and it is said when the service
is ready.
"""

import argparse
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli

from cluster.errors import InvalidConfiguration
from deploy.service.port import announce, check_port, names_a_cluster, url_of


def prepare(file: Path, environment: Mapping[str, str] = os.environ) -> str | None:
    """Check that a deploy.yaml's port is free; return the service's address, none where this machine may not have it.

    Raises:
        InvalidConfiguration: it is not, or the file cannot be read.
    """
    try:
        schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InvalidConfiguration(f"{error}; `python -m deploy.check` says more") from error
    if names_a_cluster(environment) or schema.proxy_location == ProxyLocation.Disabled:
        return None
    check_port(schema.http_options.host, schema.http_options.port)
    return url_of(schema.http_options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the service until Ctrl-C; exit 1 if its port is taken."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.start", description="Run a service in the foreground, and say when it is ready."
    )
    parser.add_argument("file", type=Path, help="a deploy.yaml that `python -m deploy.check` finds fine")
    file = parser.parse_args(arguments).file
    try:
        url = prepare(file)
    except InvalidConfiguration as error:
        sys.exit(f"{file}: {error}")
    if url is not None:
        threading.Thread(target=announce, args=(url, _say), daemon=True, name="announce").start()
    cli.main(args=["run", str(file)], prog_name="serve")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
