"""The models of an evaluation, served on a Ray cluster by the applications of deploy.yaml.

The evaluation has the cluster's Serve for itself: applications are deployed as `serve deploy` does it, which replaces
whatever was deployed before.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from actors.names import BASE, COORDINATOR, GATEWAY, TRIMTAB, guide_application
from cluster.errors import InvalidConfiguration, ReplicaLost
from deploy.jobs.evaluation.plan import Plan

START_TIMEOUT_S = 1800.0
"""For models to load; what is broken fails earlier."""

POLL_S = 0.5
UNSETTLED = {"NOT_STARTED", "DEPLOYING", "DELETING"}
LOOPBACK = "127.0.0.1"
LOCAL = {"http_options": {"host": LOOPBACK}}
"""Where the services of an evaluation listen, as a deploy.yaml says it."""


def service_config(plan: Plan, base: Path, guides: Mapping[str, Path]) -> dict[str, Any]:
    """Return a parsed deploy.yaml that serves `base` with these guides."""
    shared = {
        "dtype": plan.dtype,
        "max_sequences": plan.concurrency,
        "max_context": plan.max_context,
        "resources": plan.resources.model_dump(),
    }
    models = [
        {"name": BASE, "import_path": "deploy.applications:base", "args": {"model": str(base), **shared}},
        *(
            {
                "name": guide_application(name),
                "import_path": "deploy.applications:guide",
                "args": {"model": str(path), "base": str(base), **shared},
            }
            for name, path in guides.items()
        ),
    ]
    user_config = {"guides": list(guides), "profiles": {}}
    trimtab = {
        "name": TRIMTAB,
        "route_prefix": "/",
        "import_path": "deploy.applications:trimtab",
        "args": {},
        "deployments": [{"name": name, "user_config": user_config} for name in (GATEWAY, COORDINATOR)],
    }
    return {"applications": [*({**model, "route_prefix": None} for model in models), trimtab]}


class Cluster:
    """A Ray cluster on which nothing else is served."""

    def __init__(self, dashboard: str) -> None:
        self._serve = ServeSubmissionClient(dashboard)

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Serve exactly these applications, and wait until all of them run.

        Raises:
            ReplicaLost: one of them does not come up.
        """
        uri = ray.get_runtime_context().runtime_env.working_dir()
        # A job's own copy of the code is also what its replicas run.
        own = {"runtime_env": {"working_dir": uri}} if uri else {}
        applications = [{**application, **own} for application in config["applications"]]
        try:
            self._serve.deploy_applications({**config, "applications": applications})
        except RuntimeError as error:
            raise ReplicaLost(f"the cluster's dashboard refused to deploy: {error}") from error
        _wait_until_running({application["name"] for application in applications})


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Join the cluster of this job, or one that runs here, or start one; in the end, stop what was started.

    Raises:
        InvalidConfiguration: applications are served on it already.
    """
    # Where a cluster's address is known but nothing answers there, Ray tries for minutes without a word.
    print("connecting to the Ray cluster", os.environ.get("RAY_ADDRESS", ""), file=sys.stderr, flush=True)
    context = ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Ray aborts the process on this signal; like Ctrl-C it lets us stop what we started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not context.dashboard_url:
            raise InvalidConfiguration("the cluster has no dashboard, which deploys applications; start it with one")
        present = sorted(serve.status().applications)
        if present:
            raise InvalidConfiguration(
                f"the cluster serves {', '.join(present)} already, and an evaluation serves its own; "
                "stop them with `serve shutdown`, or run on another cluster (RAY_ADDRESS=local starts one)"
            )
        is_running = any(
            actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in ray.util.list_named_actors(all_namespaces=True)
        )
        if not is_running:
            serve.start(http_options={"host": LOOPBACK, "port": _free_port()})
        try:
            yield Cluster(f"http://{context.dashboard_url}")
        finally:
            if is_running:
                for name in serve.status().applications:
                    serve.delete(name)
            else:
                serve.shutdown()
    finally:
        ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _wait_until_running(names: set[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        applications = serve.status().applications
        statuses = {name: application.status.value for name, application in applications.items()}
        for name in names & set(statuses):
            if statuses[name] in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ReplicaLost(f"the application {name!r} does not come up: {_explain(applications[name])}")
        if set(statuses) == names and not UNSETTLED & set(statuses.values()):
            return
        time.sleep(POLL_S)
    raise ReplicaLost(f"the applications are not up after {START_TIMEOUT_S:g} s: {statuses}; see `serve status`")


def _explain(application: Any) -> str:
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return "; ".join(message for message in messages if message)
