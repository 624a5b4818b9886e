"""A service that cannot work says so when it starts, and the rest of it runs all the same."""

from pathlib import Path

import pytest
import requests
from ray import serve

from deploy.client import Client
from tests import tiny
from tests.cluster.conftest import Service, StartDeploy, model_args, service_config, wait_for_applications


@pytest.fixture(scope="module")
def service(start_deploy: StartDeploy, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A base, a guide whose tokenizer has another letter at one place, and one that cannot be sharded."""
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.talkative(tiny.llama(60)), root / "base")
    other = tiny.tokenizer(60)
    other._tokenizer = other.backend_tokenizer.from_str(other.backend_tokenizer.to_str().replace('"e":8,', '"é":8,'))
    guide = tiny.save(tiny.llama(60), root / "other", with_tokenizer=other)
    planless = tiny.save(tiny.gpt2(60), root / "planless")
    guides = {
        "other": model_args(guide, base=base),
        "planless": model_args(planless, base=base, tensor_parallel=2),
    }
    config = service_config(model_args(base), guides)
    service = start_deploy(config)
    wait_for_applications({application["name"] for application in config["applications"]})
    return service


def test_a_guide_with_another_tokenizer_does_not_start_and_names_the_token(service: Service) -> None:
    applications = serve.status().applications
    assert applications["trimtab-guide-other"].status == "DEPLOY_FAILED"
    messages = [deployment.message for deployment in applications["trimtab-guide-other"].deployments.values()]
    assert "guide 'other' has another tokenizer than the base: token 8 is 'é' in the guide and 'e' in" in messages[0]
    assert applications["trimtab-base"].status == "RUNNING"


@pytest.mark.usefixtures("service")
def test_a_guide_that_cannot_be_sharded_does_not_start_and_is_named() -> None:
    application = serve.status().applications["trimtab-guide-planless"]
    assert application.status == "DEPLOY_FAILED"
    (deployment,) = application.deployments.values()
    assert "/planless: tensor_parallel is 2, but transformers has no sharding plan" in deployment.message


def test_health_names_the_guides_that_are_missing(service: Service) -> None:
    answer = requests.get(f"{service.url}/health", timeout=60)
    assert answer.status_code == 503
    assert answer.json()["missing"] == ["trimtab-guide-other", "trimtab-guide-planless"]
    assert answer.headers["Retry-After"]


@pytest.mark.usefixtures("service")
def test_the_base_answers_all_the_same() -> None:
    assert Client().generate(prompt="hello", max_tokens=3, temperature=0.0)["finish_reason"] == "length"
