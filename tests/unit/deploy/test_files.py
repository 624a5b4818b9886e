"""The files for clusters fit what reads them: Ray's launcher, Serve, KubeRay, Docker, and Trimtab's own settings."""

import fnmatch
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema
from ray.util import accelerators

from actors.settings import CHECKOUT, BaseModelSettings, GuideSettings
from cluster.errors import InvalidConfiguration
from deploy.service.check import check, parse

SERVICES = ["deploy.yaml", "deploy/files/gpu.yaml", "deploy/files/multinode.yaml", "deploy/files/kuberay.yaml"]


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories that the files name count as there."""
    monkeypatch.setattr("actors.settings.locate_model", str)


def read(name: str) -> Any:
    return yaml.safe_load((CHECKOUT / name).read_text())


def read_service(name: str) -> Any:
    """What `serve deploy` gets."""
    content = read(name)
    return yaml.safe_load(content["spec"]["serveConfigV2"]) if name.endswith("kuberay.yaml") else content


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_fits_serve_and_our_own_settings(name: str) -> None:
    config = read_service(name)
    ServeDeploySchema.model_validate(config)
    _, settings = parse(config)
    base = settings["trimtab-base"]
    assert isinstance(base, BaseModelSettings)
    for guide in settings.values():
        assert not isinstance(guide, GuideSettings) or guide.base == base.model


@pytest.mark.parametrize("name", ["deploy.yaml", "deploy/files/multinode.yaml"])
def test_a_service_of_shipped_models_passes_the_whole_check(name: str) -> None:
    if not (CHECKOUT / "models" / "positivity" / "config.json").is_file():
        pytest.skip("needs `make models`")
    check(read_service(name))


@pytest.mark.parametrize("name", SERVICES)
def test_a_key_that_serve_does_not_know_would_be_found(name: str) -> None:
    config = read_service(name)
    config["applications"][0]["deployments"] = [{"name": "BaseModel", "num_replica": 2}]
    with pytest.raises(InvalidConfiguration, match="num_replica: there is no such key"):
        parse(config)


def test_both_files_for_gpus_are_one_service() -> None:
    def apart_from_places(name: str) -> list[Any]:
        config = read_service(name)["applications"]
        for application in config:
            for key in ("model", "base", "resources"):
                application["args"].pop(key, None)
            for deployment in application["deployments"]:
                deployment.pop("ray_actor_options", None)
        return list(config)

    assert apart_from_places("deploy/files/gpu.yaml") == apart_from_places("deploy/files/kuberay.yaml")


def test_the_files_for_gpus_place_a_large_base_and_two_small_guides() -> None:
    known = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA")}
    _, settings = parse(read_service("deploy/files/gpu.yaml"))
    base, *guides = [each for each in settings.values() if isinstance(each, BaseModelSettings)]
    assert base.tensor_parallel == 8
    assert len(guides) == 2
    kinds = {each.resources.accelerator_type for each in guides}
    assert kinds <= known
    assert base.resources.accelerator_type in known - kinds


def test_the_launchers_file_fits_ray() -> None:
    config = read("ray_config.yaml")
    validate_config(prepare_config(dict(config)))
    types = config["available_node_types"]
    assert {"head", "base_worker", "guide_worker"} == set(types)
    assert sum(kind.get("min_workers", 0) for kind in types.values()) <= config["max_workers"]
    for key in ("base_node", "guide_node"):
        assert any(key in kind["resources"] for kind in types.values())
    # What is copied is there, and what is left out would be made again or is large.
    assert (CHECKOUT / config["file_mounts"]["~/trimtab"] / "constraints.txt").is_file()
    assert {"models", ".venv"} <= set(config["rsync_exclude"])


class Part(BaseModel):
    """A part of a manifest, of which keys that Trimtab does not use are left alone."""

    model_config = ConfigDict(frozen=True)


class Container(Part):
    """One with an image and limits."""

    name: str
    image: Annotated[str, Field(pattern=r"^[a-z0-9.\-/]+:[\w.\-]+$")]
    ports: list[dict[str, Any]] = []
    env: list[dict[str, Any]] = []
    resources: dict[Literal["limits", "requests"], dict[str, Any]]
    volume_mounts: list[dict[str, Any]] = Field(default=[], alias="volumeMounts")


class PodSpec(Part):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[dict[str, Any]] = []


class Pod(Part):
    spec: PodSpec


class Group(Part):
    ray_start_params: dict[str, str] = Field(alias="rayStartParams")
    template: Pod


class WorkerGroup(Group):
    name: str = Field(alias="groupName")
    replicas: Annotated[int, Field(ge=0)]
    least: Annotated[int, Field(alias="minReplicas", ge=0)]
    most: Annotated[int, Field(alias="maxReplicas", ge=1)]


class RayCluster(Part):
    ray_version: str = Field(alias="rayVersion")
    head: Group = Field(alias="headGroupSpec")
    workers: list[WorkerGroup] = Field(alias="workerGroupSpecs")


class ServiceSpec(Part):
    serve: str = Field(alias="serveConfigV2")
    cluster: RayCluster = Field(alias="rayClusterConfig")


class RayService(Part):
    """The parts of KubeRay's RayService, version ray.io/v1, that Trimtab uses."""

    api_version: Literal["ray.io/v1"] = Field(alias="apiVersion")
    kind: Literal["RayService"]
    metadata: dict[Literal["name"], str]
    spec: ServiceSpec


def test_the_manifest_is_a_ray_service_whose_nodes_carry_the_models() -> None:
    cluster = RayService.model_validate(read("deploy/files/kuberay.yaml")).spec.cluster
    assert cluster.ray_version == version("ray")
    groups = [cluster.head, *cluster.workers]
    assert len({group.template.spec.containers[0].image for group in groups}) == 1
    for group in groups:
        (container,) = group.template.spec.containers
        assert 8000 in {port["containerPort"] for port in container.ports}
        assert container.resources["limits"] == container.resources["requests"]
        assert {mount["name"] for mount in container.volume_mounts} == {
            each["name"] for each in group.template.spec.volumes
        }
    for worker in cluster.workers:
        assert worker.least <= worker.replicas <= worker.most
    # Every custom resource that a model asks for is on the nodes of some group, as often as all ranks need it.
    offered = {
        name: count
        for worker in cluster.workers
        for name, count in json.loads(json.loads(worker.ray_start_params["resources"])).items()
    }
    _, settings = parse(read_service("deploy/files/kuberay.yaml"))
    for model in settings.values():
        if isinstance(model, BaseModelSettings):
            for name, count in model.resources.custom.items():
                assert offered[name] >= count * model.tensor_parallel


def test_the_image_is_made_of_files_that_are_there() -> None:
    text = (CHECKOUT / "Dockerfile").read_text()
    kept = [line[1:] for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert {"constraints.txt", "pyproject.toml", "actors", "cluster", "deploy"} <= set(copied)
    for name in copied:
        assert (CHECKOUT / name).exists()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in kept)
    python = re.search(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)
    assert python is not None
    assert f'requires-python = ">={python[1]}"' in (CHECKOUT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["Dockerfile", "ray_config.yaml"])
def test_torch_comes_in_the_pinned_version(name: str) -> None:
    assert "grep '^torch==' constraints.txt" in (CHECKOUT / name).read_text()
    assert re.search(r"^torch==", (CHECKOUT / "constraints.txt").read_text(), re.MULTILINE)


def test_what_is_marked_for_change_is_explained() -> None:
    for name in ("ray_config.yaml", "deploy/files/kuberay.yaml"):
        text = Path(CHECKOUT / name).read_text()
        assert "marked CHANGE" in text
        assert len(re.findall(r"# CHANGE", text)) >= 3
