"""Serve spreads leases over replicas."""

from pathlib import Path

import pytest

from tests import tiny
from tests.cluster.conftest import Deploy, model_args, service_config
from tests.cluster.lease_counts import take_leases

NUM_LEASES = 120


@pytest.fixture(scope="module")
def service(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A base with three replicas."""
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.llama(80), root / "base")
    config = service_config(model_args(base, max_sequences=NUM_LEASES), {})
    config["applications"][0]["deployments"] = [{"name": "BaseModel", "num_replicas": 3}]
    deploy(config)


@pytest.mark.usefixtures("service")
async def test_leases_spread_evenly_over_replicas_that_are_equally_near() -> None:
    counts = await take_leases("base", NUM_LEASES, num_in_turn=NUM_LEASES // 3)
    assert len(counts) == 3
    assert all(32 <= count <= 48 for count in counts.values()), counts
