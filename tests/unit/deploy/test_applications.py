"""What Serve and Ray are told about deployments comes from their settings."""

from typing import Any

import pytest
from ray import serve

from actors.replica.base import BaseModel
from actors.replica.router import LeaseRouter
from actors.settings import BaseModelSettings, CoordinatorSettings, Health, Limits
from deploy.applications import model_options, trimtab

HEALTH = Health(period_s=0.5, timeout_s=1.5)
EXPECTED = {
    "health_check_period_s": 0.5,
    "health_check_timeout_s": 1.5,
    "graceful_shutdown_timeout_s": 7,
    "graceful_shutdown_wait_loop_s": 0.5,
}


def options(*, tensor_parallel: int = 1, **resources: Any) -> dict[str, Any]:
    settings = {"model": "hub/model", "max_sequences": 7, "resources": resources, "tensor_parallel": tensor_parallel}
    return model_options(BaseModelSettings.model_validate(settings))


def test_replicas_go_where_resources_accelerator_and_labels_say() -> None:
    placed = options(cpus=2, gpus=1, custom={"base_node": 1}, accelerator_type="H100", labels={"pool": "!guides"})
    actor = placed["ray_actor_options"]
    assert (actor["num_cpus"], actor["num_gpus"], actor["resources"]) == (2, 1, {"base_node": 1})
    assert (actor["accelerator_type"], actor["label_selector"]) == ("H100", {"pool": "!guides"})


@pytest.mark.parametrize("key", ["accelerator_type", "label_selector"])
def test_nothing_is_asked_for_that_was_not_set(key: str) -> None:
    assert key not in options(cpus=1)["ray_actor_options"]


def test_serve_lets_in_what_the_engine_has_room_for_and_routes_leases() -> None:
    made = options()
    assert made["max_ongoing_requests"] == 7
    assert made["request_router_config"].get_request_router_class() is LeaseRouter


def test_a_model_of_one_rank_takes_no_placement_group() -> None:
    made = options(cpus=1)
    assert "placement_group_bundles" not in made
    assert "CUDA_VISIBLE_DEVICES" not in made["ray_actor_options"]["runtime_env"]["env_vars"]


@pytest.mark.parametrize(
    ("resources", "bundle"),
    [
        ({"cpus": 0.5}, {"CPU": 0.5}),
        ({"cpus": 2, "gpus": 1, "custom": {"big": 1}}, {"CPU": 2, "GPU": 1, "big": 1}),
        ({"cpus": 0, "gpus": 1}, {"GPU": 1}),
        ({"cpus": 0, "gpus": 1, "accelerator_type": "H100"}, {"GPU": 1, "accelerator_type:H100": 0.001}),
    ],
)
def test_each_rank_has_a_bundle_into_which_the_replica_fits(
    resources: dict[str, Any], bundle: dict[str, float]
) -> None:
    made = options(tensor_parallel=3, **resources)
    assert made["placement_group_bundles"] == [bundle] * 3
    hides_gpus = made["ray_actor_options"]["runtime_env"]["env_vars"].get("CUDA_VISIBLE_DEVICES") == ""
    assert hides_gpus == ("GPU" not in bundle)
    # Serve itself refuses a replica that its first bundle does not hold.
    serve.deployment(BaseModel, num_replicas=2, **made)


def test_labels_place_the_ranks_and_not_the_replica_in_their_group() -> None:
    made = options(tensor_parallel=2, cpus=1, labels={"pool": "base"})
    assert made["placement_group_bundle_label_selector"] == [{"pool": "base"}] * 2
    assert "label_selector" not in made["ray_actor_options"]
    serve.deployment(BaseModel, **made)


def test_a_models_health_checks_and_drain_time_are_its_settings() -> None:
    made = model_options(BaseModelSettings(model="hub/model", health=HEALTH, drain_s=7))
    assert {name: made[name] for name in EXPECTED} == EXPECTED


@pytest.mark.parametrize("name", ["Gateway", "Coordinator"])
def test_so_are_those_of_gateway_and_coordinator(name: str) -> None:
    gateway = trimtab(CoordinatorSettings(health=HEALTH, limits=Limits(drain_s=7)))._bound_deployment
    coordinator = gateway.init_args[0]._bound_deployment
    config = {deployment.name: deployment._deployment_config for deployment in (gateway, coordinator)}[name]
    assert {name: getattr(config, name) for name in EXPECTED} == EXPECTED
