"""Models that keep no replica while nobody asks for them."""

import time
from pathlib import Path
from typing import Any

from ray import serve

from deploy.client import Client
from tests import tiny
from tests.cluster.conftest import Deploy, model_args, service_config

WAKE_S = 150
SLEEPY: dict[str, Any] = {
    "min_replicas": 0,
    "max_replicas": 1,
    "target_ongoing_requests": 2,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1,
    "upscale_delay_s": 0,
    "downscale_delay_s": 1,
}


def test_a_guided_request_wakes_a_base_and_a_guide_that_sleep(deploy: Deploy, tmp_path: Path) -> None:
    base, kind = (tiny.save(tiny.talkative(tiny.llama(80, seed=seed)), tmp_path / f"{seed}") for seed in range(2))
    config = service_config(model_args(base), {"kind": model_args(kind, base=base)})
    names = {"trimtab-base": "BaseModel", "trimtab-guide-kind": "Guide"}
    for application in config["applications"]:
        if name := names.get(application["name"]):
            application["deployments"] = [{"name": name, "autoscaling_config": SLEEPY}]
    deploy(config)
    guided: dict[str, Any] = {"prompt": "hello", "max_tokens": 20, "seed": 3, "weights": {"kind": 0.8}}
    texts = []
    for _ in range(2):
        wait_until_asleep(names)
        texts.append(Client().generate(**guided, timeout=WAKE_S)["text"])
    assert texts[0] == texts[1]


def wait_until_asleep(names: dict[str, str]) -> None:
    deadline = time.monotonic() + WAKE_S
    while any(
        serve.status().applications[application].deployments[name].replica_states for application, name in names.items()
    ):
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.5)
