"""Without keys the service does not start on an address that others can reach, however Serve came to bind it."""

from pathlib import Path

import pytest
import requests

from deploy.cli import keys
from tests import tiny
from tests.cluster.conftest import free_port, model_args, serve_run, service_config

REFUSAL = "and nobody needs a key: give the service API keys"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.llama(60), tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("environment", [{}, {"RAY_SERVE_ENABLE_HA_PROXY": "1"}], ids=["proxy", "HAProxy"])
def test_a_public_address_without_keys_is_refused(base: str, tmp_path: Path, environment: dict[str, str]) -> None:
    port = free_port()
    config = service_config(model_args(base), {})
    # All interfaces are Serve's own default.
    config["http_options"] = {"port": port}
    with serve_run(config, tmp_path, **environment) as running:
        running.wait_until(lambda: REFUSAL in running.output())
        assert f"HTTP listens on 0.0.0.0 port {port}, {REFUSAL}" in running.output()


def test_a_public_address_with_keys_is_served(base: str, tmp_path: Path) -> None:
    port = free_port()
    secret = keys.add(tmp_path / "keys.yaml", "alice")
    config = service_config(model_args(base), {}, security={"keys_file": str(tmp_path / "keys.yaml")})
    config["http_options"] = {"port": port}
    statuses: set[int] = set()

    def is_served() -> bool:
        try:
            for headers in ({}, {"Authorization": f"Bearer {secret}"}):
                statuses.add(
                    requests.get(f"http://127.0.0.1:{port}/v1/models", headers=headers, timeout=10).status_code
                )
        except requests.RequestException:
            return False
        return 200 in statuses

    with serve_run(config, tmp_path) as running:
        running.wait_until(is_served)
        assert {200, 401} <= statuses, running.output()[-5000:]
