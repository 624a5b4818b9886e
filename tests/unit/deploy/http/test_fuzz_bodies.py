"""Hostile bodies against everything that reads them before a coordinator does, without the service around it."""

import itertools
import json
import random
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from actors.coordinator.request import parse_request
from actors.settings import CoordinatorSettings, parse_guidance
from deploy.http.access.guard import Access, Guard
from deploy.http.openai_schema import ChatCompletionRequest, CompletionRequest
from deploy.http.responses import answer_errors
from tests.hostile import GOOD, LARGE, Hostile, hostile_requests, names_what_is_wrong

GUIDANCE = parse_guidance({"guides": ["kind"], "profiles": {"kinder": {"kind": 0.5}}})


def application() -> FastAPI:
    """The gateway's application, but for the answers."""
    app = FastAPI(redirect_slashes=False)
    answer_errors(app)
    access = Access(CoordinatorSettings(), None, None)
    app.add_middleware(Guard, access=lambda: access)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> dict[str, Any]:
        for fields in request.requests(GUIDANCE.profiles):
            parse_request(GUIDANCE, fields, 60)
        return {}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatCompletionRequest) -> dict[str, Any]:
        for fields in request.requests(GUIDANCE.profiles):
            parse_request(GUIDANCE, fields, 60)
        return {}

    return app


async def ask(app: FastAPI, request: Hostile) -> tuple[int, bytes]:
    path, _, query = request.path.partition("?")
    scope = {
        "type": "http",
        "method": request.method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in request.headers.items()],
        "client": ("10.0.0.9", 4),
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


async def test_hostile_bodies_are_refused_by_name(num_hostile: int) -> None:
    app, chance = application(), random.Random(0)
    some_large = (LARGE(chance) for _ in range(5))
    wrong = []
    for request in itertools.chain(itertools.islice(hostile_requests(1), 3 * num_hostile), some_large):
        try:
            status, body = await ask(app, request)
        except Exception as error:
            wrong.append(f"{error!r} for {request.kind} {request.body[:300]!r}")
            continue
        if not (status == 200 or names_what_is_wrong(request, status, body)):
            wrong.append(f"{status} {body[:300]!r} for {request.kind} {request.body[:300]!r}")
    assert wrong == [], "\n".join(wrong[:20])


async def test_a_refusal_says_what_is_wrong_in_few_words() -> None:
    app = application()
    body = {"model": "base", "prompt": "x", "\ud800": "y" * 100_000, "n" * 100_000: 1}
    status, answer = await ask(app, Hostile("", json.dumps(body).encode()))
    assert status == 400
    assert len(answer) < 3000
    assert "\\ud800" in json.loads(answer)["error"]["message"]
    status, answer = await ask(app, Hostile("", json.dumps({**GOOD, "n" * 100_000: "y" * 100_000}).encode()))
    assert status == 400
    assert len(answer) < 3000
