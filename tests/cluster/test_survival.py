"""Processes die, stop and are replaced in mid-answer: the text stays that of an undisturbed run, or fails closed."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from cluster.errors import ReplicaLost
from deploy.client import Client
from tests import tiny
from tests.cluster.conftest import Deploy, Service, model_args, process_of, service_config

ROOM = 4
SHAPED: dict[str, Any] = {
    **{"frequency_penalty": 0.02, "repetition_penalty": 1.1, "logit_bias": {0: 3}},
    "structured_outputs": {"regex": "(once|[b-z ]+){900}"},
}
"""What depends on the tokens so far, and is made again from them."""

LONG: dict[str, Any] = {
    **{"prompt": "hello", "max_tokens": 800, "seed": 3, "weights": {"kind": 0.8}, "logprobs": 2},
    **SHAPED,
}


class Setup:
    """The models, and what is deployed of them."""

    def __init__(self, root: Path) -> None:
        long = {"max_position_embeddings": 100_000}
        self.base = tiny.save(tiny.talkative(tiny.llama(80, **long)), root / "base")
        self.kind = tiny.save(tiny.talkative(tiny.llama(80, seed=1, **long)), root / "kind")

    def config(self, **guide: Any) -> dict[str, Any]:
        small = {"max_sequences": ROOM, "max_context": 2000, "drain_s": 2}
        guides = {"kind": model_args(self.kind, base=self.base, **small, **guide)}
        return service_config(
            model_args(self.base, **small),
            guides,
            profiles={"kinder": {"kind": 0.8}},
            limits={"step_timeout_s": 4, "drain_s": 2},
            health={"period_s": 1, "timeout_s": 3},
        )


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def service(deploy: Deploy, setup: Setup) -> Service:
    return deploy(setup.config())


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> dict[str, Any]:
    return {**Client().generate(**LONG)}


def check(pieces: list[Any], undisturbed: dict[str, Any]) -> None:
    assert "".join(piece["text"] for piece in pieces) == undisturbed["text"]
    assert [token for piece in pieces for token in piece["token_ids"]] == undisturbed["token_ids"]
    assert pieces[-1]["usage"] == undisturbed["usage"]
    scores = [place for piece in pieces for place in piece["scores"]]
    for place, expected in zip(scores, undisturbed["scores"], strict=True):
        assert [score["token"] for score in place["top"]] == [score["token"] for score in expected["top"]]
        assert place["drawn"]["logprob"] == pytest.approx(expected["drawn"]["logprob"], abs=1e-4)


@pytest.mark.parametrize(
    ("deployment", "signal_number"),
    [
        ("Guide", signal.SIGKILL),
        ("BaseModel", signal.SIGKILL),
        ("Guide", signal.SIGSTOP),
        ("Coordinator", signal.SIGKILL),
        ("Coordinator", signal.SIGSTOP),
    ],
)
def test_a_process_that_is_lost_changes_no_token(
    deployment: str, signal_number: signal.Signals, undisturbed: dict[str, Any]
) -> None:
    process = process_of(deployment)
    streams = [Client().stream(**LONG) for _ in range(ROOM)]
    pieces = [[next(stream)] for stream in streams]
    os.kill(process, signal_number)
    start = time.monotonic()
    for stream, read in zip(streams, pieces, strict=True):
        read += stream
        check(read, undisturbed)
    print(f"{deployment} {signal_number.name}: all answers were there after {time.monotonic() - start:.1f} s")
    assert process_of(deployment) != process


def chunks(answer: requests.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a stream, up to its end."""
    for line in answer.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def test_http_streams_outlive_their_coordinator(service: Service, undisturbed: dict[str, Any]) -> None:
    body = {"model": "kinder", "prompt": "hello", "max_tokens": 800, "seed": 3, **SHAPED}
    url = f"{service.url}/v1/completions"
    with requests.post(url, json={**body, "stream": True}, stream=True, timeout=60) as answer:
        read = chunks(answer)
        first = next(read)
        os.kill(process_of("Coordinator"), signal.SIGKILL)
        choices = [chunk["choices"][0] for chunk in (first, *read)]
    assert "".join(choice["text"] for choice in choices) == undisturbed["text"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert requests.post(url, json=body, timeout=60).json()["choices"][0]["text"] == undisturbed["text"]


def test_an_update_lets_answers_go_on(deploy: Deploy, setup: Setup, undisturbed: dict[str, Any]) -> None:
    process = process_of("Guide")
    stream = Client().stream(**LONG)
    pieces = [next(stream)]
    # The same model with other room: the old replica drains, is killed, and another one goes on.
    deploy(setup.config(max_prompt_tokens_per_step=64))
    check([*pieces, *stream], undisturbed)
    assert process_of("Guide") != process


def eventually(is_true: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_without_its_guide_a_request_fails_closed_and_others_go_on(
    service: Service, setup: Setup, undisturbed: dict[str, Any]
) -> None:
    url = f"{service.url}/v1/completions"
    body: dict[str, Any] = {"model": "kinder", "prompt": "hello", "max_tokens": 800, "seed": 3, **SHAPED}
    away = Path(setup.kind).with_name("away")
    with requests.post(url, json={**body, "stream": True, "timeout": 8}, stream=True, timeout=60) as answer:
        read = chunks(answer)
        begun = [next(read)]
        shutil.move(setup.kind, away)
        try:
            os.kill(process_of("Guide"), signal.SIGKILL)
            for _ in range(2 * ROOM):
                refused = requests.post(url, json={**body, "timeout": 2}, timeout=60)
                assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
                assert "no place on guide 'kind' was to be had within 2 s" in refused.json()["error"]["message"]
            *written, last = [*begun, *read]
            assert "guide 'kind'" in last["error"]["message"]
            assert undisturbed["text"].startswith("".join(chunk["choices"][0]["text"] for chunk in written))
            free = requests.post(url, json={**body, "model": "base", "max_tokens": 5}, timeout=60)
            assert free.json()["usage"]["completion_tokens"] == 5
            with pytest.raises(ReplicaLost, match="guide 'kind'"):
                Client().generate(**LONG, timeout=2)
        finally:
            shutil.move(away, setup.kind)

    def answers() -> bool:
        try:
            return Client().generate(**LONG, timeout=30)["text"] == undisturbed["text"]
        except ReplicaLost:
            return False

    eventually(answers)
