"""A service in the foreground: `serve run`, but for three things.

A port that is taken is refused before anything starts, it is said when the service is ready, and Ctrl-C lets answers
that are being written come to their end, or to an error that says so.

To be imported where the variables are set that Serve reads.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli

from actors.names import GATEWAY, TRIMTAB
from actors.settings import Limits
from cluster.errors import InvalidConfiguration
from deploy.http.closing import LAST_WORDS_S
from deploy.service.port import announce, check_port, names_a_cluster, url_of

ASK_S = 10.0
"""For a gateway to hear that it is to end, and to say that it has."""


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


def run(file: Path, config: Any, url: str | None) -> None:
    """Run the service of a checked deploy.yaml until Ctrl-C; say at which address it is ready, where that is known."""
    if url is not None:
        threading.Thread(target=announce, args=(url, _say), daemon=True, name="announce").start()
    Stop(drain_s_of(config)).listen()
    cli.main(args=["run", str(file)], prog_name="serve")


def read(file: Path) -> Any:
    """Return what a deploy.yaml holds.

    Raises:
        InvalidConfiguration: it is no YAML.
        OSError: it cannot be read.
    """
    try:
        return yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise InvalidConfiguration(f"{error}; `trimtab check` says more") from error


def drain_s_of(config: Any) -> float:
    """Return how long a checked deploy.yaml lets answers go on that are being written when the service is stopped."""
    args = next((each.get("args") for each in config["applications"] if each["name"] == TRIMTAB), None) or {}
    return Limits.model_validate(args.get("limits") or {}).drain_s


class Stop:
    """The first Ctrl-C asks the gateways to come to their end, and then counts; another one counts at once."""

    def __init__(self, drain_s: float) -> None:
        self._deadline_s = drain_s + LAST_WORDS_S + ASK_S
        self._is_wanted = threading.Event()

    def listen(self) -> None:
        """Take Ctrl-C over, in the main thread."""
        threading.Thread(target=self._close_gateways, daemon=True, name="stop").start()
        signal.signal(signal.SIGINT, self._hear)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if self._is_wanted.is_set():
            signal.default_int_handler(signum, frame)
        self._is_wanted.set()

    def _close_gateways(self) -> None:
        self._is_wanted.wait()
        try:
            if _is_serving():
                _say("stopping: answers that are being written have limits.drain_s to end; Ctrl-C again stops at once")
                serve.get_deployment_handle(GATEWAY, TRIMTAB).broadcast("close").results(timeout_s=self._deadline_s)
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            _say(f"not every gateway came to its end: {error or type(error).__name__}")
        finally:
            os.kill(os.getpid(), signal.SIGINT)


def _is_serving() -> bool:
    """Whether there are gateways, so that somebody may be answered."""
    if not ray.is_initialized():
        return False
    application = serve.status().applications.get(TRIMTAB)
    gateway = application and application.deployments.get(GATEWAY)
    return gateway is not None and gateway.replica_states.get("RUNNING", 0) > 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
