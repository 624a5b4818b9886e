"""A service in the foreground: `serve run`, but that a port which is taken is refused before anything starts, and that
it is said when the service is ready.

To be imported where the variables are set that Serve reads.
"""

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli

from cluster.errors import InvalidConfiguration
from deploy.service.port import announce, check_port, names_a_cluster, url_of


def prepare(config: Any, environment: Mapping[str, str] = os.environ) -> str | None:
    """Check that a deploy.yaml's port is free; return the service's address, none where this machine may not have it.

    Raises:
        InvalidConfiguration: it is not, or the file is no deploy.yaml.
    """
    try:
        schema = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        raise InvalidConfiguration(f"{error}; `trimtab check` says more") from error
    if names_a_cluster(environment) or schema.proxy_location == ProxyLocation.Disabled:
        return None
    check_port(schema.http_options.host, schema.http_options.port)
    return url_of(schema.http_options)


def serve(file: Path, url: str | None) -> None:
    """Run the service until Ctrl-C; say at which address it is ready, where that is known."""
    if url is not None:
        threading.Thread(target=announce, args=(url, _say), daemon=True, name="announce").start()
    cli.main(args=["run", str(file)], prog_name="serve")


def read(file: Path) -> Any:
    """Return what a deploy.yaml holds.

    Raises:
        InvalidConfiguration: it is no YAML.
        OSError: it cannot be read.
    """
    try:
        return yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise InvalidConfiguration(f"{error}; `trimtab check` says more") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
