"""What Serve is told about deployments that hold a model."""

from pathlib import Path
from typing import Any

import pytest
from ray import serve

from actors.base_model import BaseModel
from actors.settings import BaseModelSettings
from deploy.applications import model_options


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def test_a_model_of_one_rank_takes_no_placement_group(model: str) -> None:
    options = model_options(BaseModelSettings(model=model))
    assert "placement_group_bundles" not in options
    assert "CUDA_VISIBLE_DEVICES" not in options["ray_actor_options"]["runtime_env"]["env_vars"]


@pytest.mark.parametrize(
    ("resources", "bundle"),
    [
        ({"cpus": 0.5}, {"CPU": 0.5}),
        ({"cpus": 2, "gpus": 1, "custom": {"big": 1}}, {"CPU": 2, "GPU": 1, "big": 1}),
        ({"cpus": 0, "gpus": 1}, {"GPU": 1}),
    ],
)
def test_each_rank_has_a_bundle_into_which_the_replica_fits(
    model: str, resources: dict[str, Any], bundle: dict[str, float]
) -> None:
    settings = BaseModelSettings.model_validate({"model": model, "tensor_parallel": 3, "resources": resources})
    options = model_options(settings)
    assert options["placement_group_bundles"] == [bundle] * 3
    hides_gpus = options["ray_actor_options"]["runtime_env"]["env_vars"].get("CUDA_VISIBLE_DEVICES") == ""
    assert hides_gpus == ("GPU" not in bundle)
    # Serve itself refuses a replica that its first bundle does not hold.
    serve.deployment(BaseModel, num_replicas=2, **options)
