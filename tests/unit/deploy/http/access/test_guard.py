"""What the guard lets through, and how it answers what it does not."""

import asyncio
import gzip
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from actors.coordinator.admission import UNNAMED, Caller
from actors.settings import CoordinatorSettings
from cluster.errors import InvalidConfiguration
from deploy.cli import keys
from deploy.http.access.body import MAX_DEPTH, depth
from deploy.http.access.exposure import Ports
from deploy.http.access.guard import Access, Guard, caller_of
from deploy.http.access.keys import KeyRing
from deploy.http.access.pace import Pace

REFUSED = ((b"content-type", b"text/plain"),)
JSON = (b"content-type", b"application/json")
LIMITS = {"limits": {"max_body_bytes": 2048, "max_open_requests": 2, "body_timeout_s": 0.2}}


class Application:
    """Remembers the callers and bodies that it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[Caller | None, bytes]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        if scope["type"] == "http":
            message = await receive()
            body = message["body"]
            assert not message["more_body"]
        self.seen.append((caller_of(scope) if scope["path"] != "/health" else None, body))
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Client:
    def __init__(self, access: Access) -> None:
        self.application = Application()
        self._guard = Guard(self.application, lambda: access)

    async def ask(
        self,
        parts: Sequence[bytes | None] = (b"{}",),
        *,
        path: str = "/v1/completions",
        headers: Sequence[tuple[bytes, bytes]] = (JSON,),
        method: str = "POST",
    ) -> tuple[int, dict[str, Any], dict[bytes, bytes]]:
        """Send a body in parts, None for a client that leaves; return status, answer and headers."""
        messages = [
            {"type": "http.disconnect"}
            if part is None
            else {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
            for i, part in enumerate(parts)
        ]
        sent: list[Message] = []

        async def receive() -> Message:
            if messages:
                return messages.pop(0)
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "method": method, "headers": headers, "client": ("10.0.0.9", 4)}
        await self._guard(scope, receive, send)
        if not sent:
            return 0, {}, {}
        body = sent[1]["body"]
        return sent[0]["status"], json.loads(body) if body.startswith(b"{") else {}, dict(sent[0]["headers"])


@pytest.fixture
def settings() -> CoordinatorSettings:
    return CoordinatorSettings.model_validate(LIMITS)


@pytest.fixture
async def client(settings: CoordinatorSettings) -> Client:
    return Client(Access(settings, None, None))


async def test_without_keys_everybody_is_let_in_and_nobody_has_a_name(client: Client) -> None:
    assert (await client.ask([b'{"a":', b" 1}"]))[0] == 200
    assert client.application.seen == [(UNNAMED, b'{"a": 1}')]


async def test_a_key_is_asked_for_and_found(
    settings: CoordinatorSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = keys.add(tmp_path / "keys.yaml", "alice", max_sequences=3)
    client = Client(Access(settings, KeyRing.of_file(tmp_path / "keys.yaml"), None))
    wrong = secret[:-2] + "xx"
    for shown in (
        None,
        b"Bearer " + wrong.encode(),
        b"Basic " + secret.encode(),
        b"Bearer",
        b"\xff\xfe",
        b"Bearer \xff",
    ):
        caplog.clear()
        headers = [JSON, *([(b"authorization", shown)] if shown is not None else [])]
        with caplog.at_level(logging.INFO):
            status, answer, answer_headers = await client.ask(headers=headers)
        assert status == 401
        assert answer["error"]["code"] == "invalid_api_key"
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["param"] == "Authorization"
        assert answer_headers[b"www-authenticate"] == b'Bearer realm="trimtab"'
        assert len(caplog.records) == 1
        assert "10.0.0.9" in caplog.text
        assert secret[10:20] not in caplog.text + json.dumps(answer)
    assert (await client.ask(headers=[JSON, (b"Authorization", f"bearer {secret}".encode())]))[0] == 200
    assert (await client.ask(path="/health"))[0] == 200
    assert client.application.seen == [(Caller(name="alice", max_sequences=3), b"{}"), (None, b"{}")]


@pytest.mark.parametrize(
    ("parts", "headers", "status", "param"),
    [
        ([b"x" * 2049], [JSON], 413, "body"),
        ([b"x" * 1000] * 3, [JSON], 413, "body"),
        ([b"{}"], [JSON, (b"content-length", b"2049")], 413, "body"),
        ([b"{}"], [JSON, (b"content-length", b"9" * 5000)], 413, "body"),
        ([b"{}"], [JSON, (b"content-length", b"-1")], 413, "body"),
        ([b"{}"], [JSON, (b"x-long", b"x" * 40_000)], 431, "headers"),
        ([b"{}"], [(b"content-type", b"text/plain")], 415, "Content-Type"),
        ([b"{}"], [], 415, "Content-Type"),
        ([b'"\xff"'], [JSON], 400, "body"),
        ('"a"'.encode("utf-16").split(b"none"), [JSON], 400, "body"),
        ([b'{\x00"\x00a\x00"\x00'], [JSON], 400, "body"),
        ([b"[" * 2000], [JSON], 400, "body"),
        ([b'{"a":' * 300], [JSON], 400, "body"),
    ],
)
async def test_what_no_request_can_be_is_refused_by_name(
    client: Client, parts: list[bytes], headers: list[tuple[bytes, bytes]], status: int, param: str
) -> None:
    answered, answer, _ = await client.ask(parts, headers=headers)
    assert (answered, answer["error"]["param"]) == (status, param)
    assert param in answer["error"]["message"]
    assert client.application.seen == []


async def test_a_body_that_does_not_come_is_given_up(client: Client) -> None:
    scope: Any = {"type": "http", "path": "/v1/completions", "headers": [JSON], "client": None}
    sent: list[Message] = []

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await client._guard(scope, never, send)
    assert sent[0]["status"] == 408


async def test_a_client_that_leaves_is_not_answered(client: Client) -> None:
    assert await client.ask([b"{", None]) == (0, {}, {})


async def test_no_more_requests_are_open_than_there_may_be(client: Client) -> None:
    client.application.gate.clear()
    first = [asyncio.create_task(client.ask()) for _ in range(2)]
    while len(client.application.seen) < 2:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)
    status, answer, headers = await client.ask()
    assert (status, answer["error"]["type"], headers[b"retry-after"]) == (429, "overloaded_error", b"1")
    client.application.gate.set()
    assert [(await request)[0] for request in first] == [200, 200]
    assert (await client.ask())[0] == 200


async def test_without_keys_a_public_address_is_not_served(settings: CoordinatorSettings) -> None:
    public = Ports(host="0.0.0.0", port=1)
    access = Access(settings, None, public)
    with pytest.raises(InvalidConfiguration, match=r"listens on 0.0.0.0 port 1, and nobody needs a key: .*keys_file"):
        access.check_exposure()
    status, answer, _ = await Client(access).ask()
    assert status == 503
    assert "security.allow_public_without_keys" in answer["error"]["message"]
    allowed = CoordinatorSettings.model_validate({"security": {"allow_public_without_keys": True}})
    assert (await Client(Access(allowed, None, public)).ask())[0] == 200


def test_depth_counts_brackets_outside_of_strings() -> None:
    assert depth(b'{"a": [1, {"b": "[[[\\"{{{"}], "c": {}}') == 3
    assert depth(b'"\\') == 0
    assert depth(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) == MAX_DEPTH


@pytest.mark.parametrize("hostile", [b'"\\' * 500_000, b'"' * 1_000_001, b'"\\"' * 300_000 + b"\\", b"[{" * 500_000])
def test_depth_takes_no_longer_for_hostile_bodies(hostile: bytes) -> None:
    start = time.perf_counter()
    depth(hostile)
    assert time.perf_counter() - start < 10


async def test_refusals_wait_for_their_turn_and_answers_do_not() -> None:
    settings = CoordinatorSettings.model_validate({"limits": {"refusals_per_s": 4}})
    access = Access(settings, None, None)
    client = Client(access)
    start = time.monotonic()
    for _ in range(7):
        assert (await client.ask(headers=REFUSED))[0] == 415
    assert time.monotonic() - start >= 0.4
    await asyncio.sleep(1.5)
    for _ in range(20):
        assert (await client.ask())[0] == 200
    assert access.refusals.take() == 0.0, "answers take no place"


def test_a_place_comes_by_and_by_and_at_the_latest_after_a_second() -> None:
    now = 100.0
    pace = Pace(10, lambda: now)
    assert [pace.take() for _ in range(10)] == [0.0] * 10
    assert [round(pace.take(), 6) for _ in range(4)] == [0.0, 0.1, 0.2, 0.3]
    assert max(pace.take() for _ in range(100)) == 1.0
    now += 60
    assert [pace.take() for _ in range(10)] == [0.0] * 10


GZIP = (b"content-encoding", b"gzip")


async def test_a_body_may_be_compressed(client: Client) -> None:
    body = b'{"a": "' + b"x" * 1000 + b'"}'
    assert (await client.ask([gzip.compress(body, mtime=0)], headers=(JSON, GZIP)))[0] == 200
    assert client.application.seen == [(UNNAMED, body)]


@pytest.mark.parametrize(
    ("body", "encoding", "status", "says"),
    [
        (b"{}", b"gzip", 400, "not gzip, as Content-Encoding says"),
        (gzip.compress(b"{}", mtime=0)[:-3], b"gzip", 400, "ends too early or late"),
        (gzip.compress(b"{}", mtime=0) + b"x", b"gzip", 400, "ends too early or late"),
        (gzip.compress(b" " * 2**20 + b"{}", mtime=0), b"gzip", 413, "more than 2,048 bytes"),
        (gzip.compress(b"\xff", mtime=0), b"gzip", 400, "not UTF-8"),
        (b"{}", b"br", 415, "Content-Encoding must be gzip"),
    ],
)
async def test_what_a_compressed_body_cannot_be(
    client: Client, body: bytes, encoding: bytes, status: int, says: str
) -> None:
    got, answer, _ = await client.ask([body], headers=(JSON, (b"content-encoding", encoding)))
    assert got == status
    assert says in answer["error"]["message"]
    assert client.application.seen == []


ORIGIN = (b"origin", b"https://chat.example.org")
PREFLIGHT = (ORIGIN, (b"access-control-request-method", b"POST"), (b"access-control-request-headers", b"authorization"))


async def test_pages_of_named_origins_may_ask(tmp_path: Path) -> None:
    keys.add(tmp_path / "keys.yaml", "alice")
    settings = CoordinatorSettings.model_validate({**LIMITS, "http": {"cors_origins": ["https://chat.example.org"]}})
    client = Client(Access(settings, KeyRing.of_file(tmp_path / "keys.yaml"), None))
    status, _, headers = await client.ask(headers=PREFLIGHT, method="OPTIONS")
    assert (status, headers[b"access-control-allow-origin"]) == (200, ORIGIN[1])
    assert headers[b"access-control-allow-headers"] == b"authorization"
    status, _, headers = await client.ask(headers=(JSON, ORIGIN))
    assert (status, headers[b"access-control-allow-origin"]) == (401, ORIGIN[1]), "the page may read why"
    stranger = (b"origin", b"https://example.com")
    status, _, headers = await client.ask(headers=(stranger, *PREFLIGHT[1:]), method="OPTIONS")
    assert status == 400
    assert b"access-control-allow-origin" not in headers


async def test_unless_an_origin_is_named_no_page_of_another_may_ask(client: Client) -> None:
    _, _, headers = await client.ask(headers=(JSON, ORIGIN))
    assert b"access-control-allow-origin" not in headers


@pytest.mark.parametrize("origin", ["chat.example.org", "https://chat.example.org/", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match=r"http\.cors_origins\.0"):
        CoordinatorSettings.model_validate({"http": {"cors_origins": [origin]}})
