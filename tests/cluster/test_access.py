"""A service with keys lets nobody else in, holds each key to its limits, and says nothing of requests in its logs."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
import requests
from openai import OpenAI

from deploy.cli import keys
from tests import tiny
from tests.cluster.conftest import Deploy, Service, model_args, service_config

PLAIN: dict[str, Any] = {"model": "base", "prompt": "once upon", "max_tokens": 12, "seed": 4}
SECRET_TEXT = "my grandmother's recipe"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.yaml"


@pytest.fixture(scope="module")
def secrets(file: Path) -> dict[str, str]:
    return {
        "free": keys.add(file, "free"),
        "two": keys.add(file, "two", max_sequences=2),
        "small": keys.add(file, "small", tokens_per_minute=30),
    }


@pytest.fixture(scope="module")
def service(
    deploy: Deploy, tmp_path_factory: pytest.TempPathFactory, file: Path, secrets: dict[str, str]
) -> Iterator[Service]:
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.talkative(tiny.llama(80, max_position_embeddings=100_000)), root / "base")
    args = model_args(base, max_context=20_000, max_sequences=4)
    limits = {"max_body_bytes": 50_000, "body_timeout_s": 2}
    yield deploy(service_config(args, {}, security={"keys_file": str(file)}, limits=limits))
    # Other tests know no keys.
    deploy(service_config(args, {}))


def post(service: Service, body: Any, key: str | None, **options: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.post(f"{service.url}/v1/completions", json=body, headers=headers, timeout=60, **options)


def test_openais_client_needs_the_right_key(service: Service, secrets: dict[str, str]) -> None:
    with OpenAI(base_url=f"{service.url}/v1", api_key=secrets["free"], max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["base"]
        assert len(client.completions.create(**PLAIN).choices[0].text) == 12
    with OpenAI(base_url=f"{service.url}/v1", api_key="trimtab-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="the API key is not known"):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(**PLAIN)


def test_only_health_needs_no_key(service: Service) -> None:
    assert requests.get(f"{service.url}/health", timeout=60).status_code == 200
    for path in ("/v1/models", "/openapi.json", "/docs", "/nowhere"):
        answer = requests.get(f"{service.url}{path}", timeout=60)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_revoked_key_is_refused_and_a_new_one_works_without_a_restart(service: Service, file: Path) -> None:
    secret = keys.add(file, "passing")
    until(lambda: post(service, PLAIN, secret).status_code == 200)
    keys.revoke(file, "passing")
    until(lambda: post(service, PLAIN, secret).status_code == 401)


def test_a_key_has_no_more_sequences_than_it_may(service: Service, secrets: dict[str, str]) -> None:
    endless = {**PLAIN, "max_tokens": 19_000, "temperature": 0, "stream": True}
    with ExitStack() as stack:
        answers = [stack.enter_context(post(service, endless, secrets["two"], stream=True)) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        for stream in (False, True):
            refused = post(service, {**PLAIN, "stream": stream}, secrets["two"])
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert "'two' has 2 requests open" in refused.json()["error"]["message"]
        assert post(service, PLAIN, secrets["free"]).status_code == 200
    until(lambda: post(service, PLAIN, secrets["two"]).status_code == 200)


def test_a_key_with_many_requests_does_not_hold_up_another(service: Service, secrets: dict[str, str]) -> None:
    long = {**PLAIN, "max_tokens": 150, "temperature": 0}
    done: list[int] = []
    with ThreadPoolExecutor(60) as pool:
        flood = [pool.submit(post, service, long, secrets["free"]) for _ in range(60)]
        for request in flood:
            request.add_done_callback(lambda request: done.append(request.result().status_code))
        until(lambda: len(done) >= 2)
        assert post(service, {**PLAIN, "max_tokens": 3}, secrets["two"]).status_code == 200
        # First in, first out would have let all of the flood go before.
        assert len(done) < 40
    assert done == [200] * 60


def test_a_key_that_has_used_up_its_tokens_is_told_when_to_come_again(
    service: Service, secrets: dict[str, str]
) -> None:
    answers = [post(service, {**PLAIN, "stream": i % 2 == 0}, secrets["small"]) for i in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    wait_s = int(answers[-1].headers["Retry-After"])
    assert 1 <= wait_s <= 30
    time.sleep(wait_s + 0.5)
    assert post(service, {**PLAIN, "max_tokens": 1}, secrets["small"]).status_code == 200


def test_a_body_that_is_too_long_is_refused_before_it_is_sent(service: Service, secrets: dict[str, str]) -> None:
    answer = post(service, {**PLAIN, "prompt": "x" * 60_000}, secrets["free"])
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "body")
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as slow:
        head = (
            f"Authorization: Bearer {secrets['free']}\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n"
        )
        slow.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}".encode() + b'{"model"')
        assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]


def test_logs_hold_no_key_and_nothing_of_a_request(service: Service, secrets: dict[str, str]) -> None:
    body = {**PLAIN, "prompt": SECRET_TEXT, "max_tokens": 30_000}
    bad = [body, {**body, "model": SECRET_TEXT}, {**body, "stop": [SECRET_TEXT, 1]}, {**body, SECRET_TEXT: 1}]
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda body: post(service, body, secrets["free"]).status_code, bad))
    assert statuses == [400, 404, 400, 400]
    assert post(service, PLAIN, f"{secrets['free']}x").status_code == 401
    logs = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1] / "logs"
    files = [path for path in logs.rglob("*") if path.is_file()]
    text = {path: path.read_text(errors="replace") for path in files}
    for word in (SECRET_TEXT, json.dumps(SECRET_TEXT), *(secret[8:] for secret in secrets.values())):
        assert [path for path in files if word in text[path]] == []
    refused = [line for each in text.values() for line in each.splitlines() if "the API key is not known" in line]
    assert refused
    assert any("refused a request: ContextExceeded, max_tokens" in each for each in text.values())


def until(is_true: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
