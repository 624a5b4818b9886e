"""What was found fine is not checked again, unless something has changed that the checks read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InvalidConfiguration
from deploy.service import verdict
from deploy.service.verdict import MAX_REMEMBERED, digest_of, judge
from tests import tiny

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A service over a tiny model, without guides."""
    model = tiny.save(tiny.llama(), tmp_path / "model")
    guidance: Config = {"guides": [], "profiles": {}}
    return {
        "http_options": {"host": "127.0.0.1"},
        "applications": [
            {
                "name": "trimtab-base",
                "import_path": "deploy.applications:base",
                "route_prefix": None,
                "args": {"model": model, "max_context": 64, "resources": {"cpus": 100_000}},
            },
            {
                "name": "trimtab",
                "import_path": "deploy.applications:trimtab",
                "route_prefix": "/",
                "deployments": [{"name": name, "user_config": guidance} for name in ("Gateway", "Coordinator")],
            },
        ],
    }


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def refuse(*_: object) -> list[str]:
    raise AssertionError("it is checked again")


def test_what_was_fine_is_remembered_with_what_the_machine_lacks(
    config: Config, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacks = judge(config, environment)
    assert any("cpus: 100000, but this machine has" in warning for warning in lacks)
    monkeypatch.setattr(verdict, "_judge", refuse)
    assert judge(config, environment) == lacks
    (file,) = (tmp_path / "cache" / "trimtab" / "checked").iterdir()
    file.write_text('["cut o')
    with pytest.raises(AssertionError):
        judge(config, environment)


def test_a_mistake_is_told_each_time(config: Config, environment: dict[str, str], tmp_path: Path) -> None:
    config["applications"][0]["args"]["max_context"] = 10**6
    for _ in range(2):
        with pytest.raises(InvalidConfiguration, match="max_context is 1000000"):
            judge(config, environment)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda config, model: config["applications"][0]["args"].update(max_context=32),
        lambda config, model: (model / "config.json").write_text((model / "config.json").read_text() + "\n"),
        lambda config, model: (model / "model.safetensors").unlink(),
        lambda config, model: os.utime(model / "tokenizer.json"),
    ],
)
def test_what_the_checks_read_changes_the_digest(
    config: Config, tmp_path: Path, change: Callable[[Config, Path], object]
) -> None:
    before = digest_of(config, {})
    assert before == digest_of(json.loads(json.dumps(config)), {}) is not None
    change(config, tmp_path / "model")
    assert digest_of(config, {}) != before


def test_keys_and_clusters_change_the_digest(config: Config, tmp_path: Path) -> None:
    before = digest_of(config, {})
    assert digest_of(config, {"TRIMTAB_KEYS": "keys: []"}) != before
    assert digest_of(config, {"RAY_ADDRESS": "10.0.0.7:6379"}) != before
    assert digest_of(config, {"RAY_ADDRESS": "auto"}) == before
    config["applications"][1]["args"] = {"security": {"keys_file": str(tmp_path / "keys.yaml")}}
    named = digest_of(config, {})
    (tmp_path / "keys.yaml").write_text("keys: []")
    assert digest_of(config, {}) != named


def test_a_model_of_a_hub_is_checked_each_time(config: Config) -> None:
    config["applications"][0]["args"]["model"] = "some/model"
    assert digest_of(config, {}) is None


def test_what_is_no_deploy_yaml_has_a_digest_too() -> None:
    configs: list[Any] = [
        None,
        [],
        "text\0",
        "x" * 300,
        "~nobody/x",
        {1: {None: "y" * 5000}},
        {"applications": 3},
        {"applications": [None, {"args": []}]},
    ]
    for config in configs:
        assert digest_of(config, {}) is not None


def test_the_oldest_verdicts_go(tmp_path: Path) -> None:
    for number in range(MAX_REMEMBERED + 5):
        verdict._remember(tmp_path / f"{number}.json", [])
        os.utime(tmp_path / f"{number}.json", (number, number))
    verdict._remember(tmp_path / "newest.json", [])
    left = {file.name for file in tmp_path.iterdir()}
    assert len(left) == MAX_REMEMBERED
    assert {"newest.json", f"{MAX_REMEMBERED + 4}.json"} <= left
    assert "0.json" not in left
