"""A local Ray cluster with a dashboard, and services deployed on it from a deploy.yaml as users write one."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from openai import OpenAI
from ray import serve
from ray.util.state import list_actors

from actors.names import BASE, COORDINATOR, GATEWAY, TRIMTAB, guide_application
from actors.settings import CHECKOUT

START_TIMEOUT_S = 240
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Service:
    """Where a service that is ready can be reached."""

    port: int
    dashboard: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class ServeRun:
    """A `serve run` that goes on until its test is over."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Wait until something holds or the process has ended."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_true() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.output()[-5000:]
            time.sleep(0.5)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def serve_run(
    config: dict[str, Any], folder: Path, command: Sequence[str] = (str(BIN / "serve"), "run"), **environment: str
) -> Iterator[ServeRun]:
    """`serve run` on a cluster of its own, whatever else runs here; Ctrl-C ends it and all of its processes."""
    (folder / "deploy.yaml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(folder / "deploy.yaml")],
            cwd=CHECKOUT,
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_ADDRESS": "local", **environment},
            start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )
    family: list[psutil.Process] = []
    try:
        yield ServeRun(process, folder / "log")
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            assert family
            process.send_signal(signal.SIGINT)
            process.wait(120)
            _, left = psutil.wait_procs(family, timeout=60)
            assert left == []
    finally:
        if process.poll() is None:
            family = [*family, *psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            if member.is_running():
                member.kill()
        process.wait(60)


def _hear_ctrl_c() -> None:
    # A shell starts what it runs in the background, this test perhaps, with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def model_args(model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "max_sequences": 24,
        "max_context": 128,
        "threads": 1,
        "resources": {"cpus": 0.1},
        **more,
    }


def service_config(
    base: dict[str, Any],
    guides: dict[str, dict[str, Any]],
    *,
    profiles: Mapping[str, Any] | None = None,
    **args: Any,
) -> dict[str, Any]:
    """A deploy.yaml: the base's args, each guide's, and those of the coordinator."""
    user_config = {"guides": list(guides), "profiles": profiles or {}}
    models = [
        {"name": BASE, "import_path": "deploy.applications:base", "args": base},
        *(
            {"name": guide_application(name), "import_path": "deploy.applications:guide", "args": guide}
            for name, guide in guides.items()
        ),
    ]
    trimtab = {
        "name": TRIMTAB,
        "route_prefix": "/",
        "import_path": "deploy.applications:trimtab",
        "args": args,
        "deployments": [{"name": name, "user_config": user_config} for name in (GATEWAY, COORDINATOR)],
    }
    return {"applications": [*({**model, "route_prefix": None} for model in models), trimtab]}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Service]:
    """A one-node Ray cluster; the service on it is whatever was deployed last."""
    port, dashboard_port = free_port(), free_port()
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_port=dashboard_port,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield Service(port, f"http://127.0.0.1:{dashboard_port}")
    finally:
        serve.shutdown()
        ray.shutdown()


def process_of(deployment: str) -> int:
    """The process of a deployment's only replica."""
    (actor,) = [
        actor
        for actor in list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")], detail=True)
        if f"#{deployment}#" in (actor.name or "")
    ]
    assert actor.pid is not None
    return int(actor.pid)


StartDeploy = Callable[[dict[str, Any]], Service]
Deploy = Callable[[dict[str, Any]], Service]


@pytest.fixture(scope="session")
def start_deploy(cluster: Service, tmp_path_factory: pytest.TempPathFactory) -> StartDeploy:
    """`serve deploy`, which takes the configuration and returns."""

    def start(config: dict[str, Any]) -> Service:
        path = tmp_path_factory.mktemp("deploy") / "deploy.yaml"
        http_options = {"host": "127.0.0.1", "port": cluster.port}
        path.write_text(yaml.safe_dump({"http_options": http_options, **config}))
        command = [str(BIN / "serve"), "deploy", str(path), "--address", cluster.dashboard]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return cluster

    return start


@pytest.fixture(scope="session")
def deploy(start_deploy: StartDeploy) -> Deploy:
    """`serve deploy`, then wait until every application runs."""

    def deploy_and_wait(config: dict[str, Any]) -> Service:
        service = start_deploy(config)
        statuses = wait_for_applications({application["name"] for application in config["applications"]})
        assert statuses == dict.fromkeys(statuses, "RUNNING"), serve.status()
        return service

    return deploy_and_wait


def wait_for_applications(names: set[str]) -> dict[str, str]:
    """Wait until every application has come up or failed; return their statuses."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        applications = serve.status().applications
        statuses = {name: str(status.status.value) for name, status in applications.items()}
        if set(statuses) == names and not {"DEPLOYING", "NOT_STARTED", "DELETING"} & set(statuses.values()):
            return statuses
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.25)
