"""Without keys the service does not start on an address that others can reach, however Serve came to bind it."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from deploy import keys
from tests import tiny
from tests.cluster.conftest import BIN, START_TIMEOUT_S, free_port, model_args, service_config
from tests.cluster.test_serve_run import hear_ctrl_c

REFUSAL = "and nobody needs a key: give the service API keys"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.llama(60), tmp_path_factory.mktemp("models") / "base")


def run_until(folder: Path, config: dict[str, Any], environment: dict[str, str], is_over: Any) -> str:
    """`serve run` a file, until its output or the service says what is waited for; return the output."""
    (folder / "deploy.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [str(BIN / "serve"), "run", str(folder / "deploy.yaml")],
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=hear_ctrl_c,
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_over(log.read_text(errors="replace")) and server.poll() is None:
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-5000:]
            time.sleep(0.5)
        family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        try:
            server.wait(120)
        except subprocess.TimeoutExpired:
            server.kill()
        _, left = psutil.wait_procs(family, timeout=60)
        for process in left:
            process.kill()
    return log.read_text(errors="replace")


@pytest.mark.parametrize("environment", [{}, {"RAY_SERVE_ENABLE_HA_PROXY": "1"}], ids=["proxy", "HAProxy"])
def test_a_public_address_without_keys_is_refused(base: str, tmp_path: Path, environment: dict[str, str]) -> None:
    port = free_port()
    config = service_config(model_args(base), {})
    # All interfaces are Serve's own default.
    config["http_options"] = {"port": port}
    output = run_until(tmp_path, config, environment, lambda text: REFUSAL in text)
    assert f"HTTP listens on 0.0.0.0 port {port}, {REFUSAL}" in output


def test_a_public_address_with_keys_is_served(base: str, tmp_path: Path) -> None:
    port = free_port()
    secret = keys.add(tmp_path / "keys.yaml", "alice")
    config = service_config(model_args(base), {}, security={"keys_file": str(tmp_path / "keys.yaml")})
    config["http_options"] = {"port": port}
    statuses: set[int] = set()

    def is_served(_: str) -> bool:
        try:
            for headers in ({}, {"Authorization": f"Bearer {secret}"}):
                statuses.add(
                    requests.get(f"http://127.0.0.1:{port}/v1/models", headers=headers, timeout=10).status_code
                )
        except requests.ConnectionError:
            return False
        return 200 in statuses

    output = run_until(tmp_path, config, {}, is_served)
    assert {200, 401} <= statuses, output[-5000:]
