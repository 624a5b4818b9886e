"""The Python client; and what a lost replica, coordinator or caller leaves behind: nothing."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from ray import serve

from cluster.errors import InvalidRequest, ReplicaLost, UnknownModel
from deploy.client import AsyncClient, Client
from tests import tiny
from tests.cluster.conftest import Deploy, Service, model_args, process_of, service_config

ROOM = 4
"""Sequences that the base and the guide can hold at once."""


@pytest.fixture(scope="module", autouse=True)
def service(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> Service:
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.talkative(tiny.llama(80, max_position_embeddings=100_000)), root / "base")
    kind = tiny.save(tiny.talkative(tiny.llama(80, seed=1, max_position_embeddings=100_000)), root / "kind")
    small = {"max_sequences": ROOM, "max_context": 20_000}
    guides = {"kind": model_args(kind, base=base, **small)}
    return deploy(service_config(model_args(base, **small), guides, profiles={"kinder": {"kind": 0.8}}))


ENDLESS: dict[str, Any] = {"prompt": "hello", "max_tokens": 19_000, "temperature": 0.0, "weights": {"kind": 1.0}}


def eventually(is_true: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_generate_returns_the_answer_and_its_parts() -> None:
    answer = Client().generate(prompt="hello", max_tokens=7, seed=11, weights={"kind": 1.0})
    assert len(answer["text"]) == len(answer["token_ids"]) == 7
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert answer["seed"] == 11


def test_stream_yields_the_same_in_pieces() -> None:
    fields: dict[str, Any] = {"prompt": "hello", "max_tokens": 30, "seed": 11, "model": "kinder"}
    whole = Client().generate(**fields)
    pieces = list(Client().stream(**fields))
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [token for piece in pieces for token in piece["token_ids"]] == whole["token_ids"]
    assert pieces[-1]["usage"] == whole["usage"]
    assert [piece["finish_reason"] for piece in pieces][:-1] == [None] * (len(pieces) - 1)


def test_the_bare_handle_takes_the_same_fields() -> None:
    handle = serve.get_deployment_handle("Coordinator", "trimtab")
    answer = handle.generate.remote(messages=[{"role": "user", "content": "hi"}], max_tokens=4, seed=1).result()
    assert len(answer["token_ids"]) == 4


def test_errors_arrive_as_they_are() -> None:
    with pytest.raises(UnknownModel, match="no model 'nope'; models are: base, kinder"):
        Client().generate(prompt="x", model="nope")
    with pytest.raises(InvalidRequest, match="temprature is not supported") as caught:
        list(Client().stream(prompt="x", temprature=1))
    assert caught.value.field == "temprature"


async def test_the_asynchronous_client_raises_the_same_errors() -> None:
    with pytest.raises(InvalidRequest, match="either prompt or messages"):
        await AsyncClient().generate(prompt="x", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(InvalidRequest, match="no guide 'cruel'"):
        await anext(AsyncClient().stream(prompt="x", weights={"cruel": 1}))


async def test_more_requests_than_room_wait_and_all_are_answered() -> None:
    client = AsyncClient()
    fields: dict[str, Any] = {"prompt": "hello", "max_tokens": 10, "weights": {"kind": 1.0}}
    answers = await asyncio.gather(*(client.generate(seed=i, **fields) for i in range(3 * ROOM)))
    alone = await client.generate(seed=5, **fields)
    assert [len(answer["token_ids"]) for answer in answers if answer["finish_reason"] == "length"].count(10) > ROOM
    assert answers[5] == alone


def test_callers_that_leave_free_their_room() -> None:
    client = Client()
    for _ in range(3):
        streams = [client.stream(**ENDLESS) for _ in range(ROOM)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
    assert len(client.generate(prompt="hello", max_tokens=3, temperature=0)["token_ids"]) == 3


def test_a_killed_coordinator_leaves_no_lease_behind() -> None:
    client = Client()
    streams = [client.stream(**ENDLESS) for _ in range(ROOM)]
    for stream in streams:
        next(stream)
    os.kill(process_of("Coordinator"), signal.SIGKILL)
    # Every place was taken: they go on, so the places were given back.
    for stream in streams:
        for _ in range(100):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
    eventually(room_is_free)


def events(answer: requests.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a stream, up to its end."""
    for line in answer.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def open_streams(service: Service, stack: ExitStack) -> list[Iterator[dict[str, Any]]]:
    """As many endless streams over HTTP as there is room for, each with its first chunk read."""
    body = {"model": "kinder", "prompt": "hello", "max_tokens": 19_000, "temperature": 0, "stream": True}
    streams = []
    for _ in range(ROOM):
        answer = requests.post(f"{service.url}/v1/completions", json=body, stream=True, timeout=60)
        streams.append(events(stack.enter_context(answer)))
        assert "error" not in next(streams[-1])
    return streams


def room_is_free() -> bool:
    """Whether an answer comes, for which one of the places must have been given back."""
    try:
        return len(Client().generate(**{**ENDLESS, "max_tokens": 3})["token_ids"]) == 3
    except ReplicaLost:
        return False


def test_a_killed_gateway_frees_what_it_was_reading(service: Service) -> None:
    with ExitStack() as stack:
        streams = open_streams(service, stack)
        os.kill(process_of("Gateway"), signal.SIGKILL)
        eventually(room_is_free)
        for stream in streams:
            with contextlib.suppress(requests.RequestException):
                assert all(chunk["choices"] for chunk in stream)

    def answers() -> bool:
        try:
            return requests.get(f"{service.url}/v1/models", timeout=60).status_code == 200
        except requests.RequestException:
            return False

    eventually(answers)


@pytest.mark.parametrize("stream", [True, False])
def test_http_clients_that_leave_free_their_room(service: Service, stream: bool) -> None:
    body = {
        "model": "kinder",
        "prompt": "hello",
        "max_tokens": 19_000,
        "temperature": 0,
        "stream": stream,
    }
    for _ in range(2 * ROOM):
        # The whole answer takes far longer; a streaming one begins at once.
        with (
            contextlib.suppress(requests.Timeout),
            requests.post(f"{service.url}/v1/completions", json=body, stream=True, timeout=3) as answer,
        ):
            next(answer.iter_lines())
    last = requests.post(f"{service.url}/v1/completions", json={**body, "max_tokens": 3, "stream": False}, timeout=60)
    assert last.json()["usage"]["completion_tokens"] == 3
