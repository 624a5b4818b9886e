"""The HTTP side of the service: OpenAI's API in, server-sent events out. Holds no model."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.coordinator.request import invalid_request
from actors.coordinator.sequence import Piece
from actors.settings import NO_GUIDANCE, GuidanceSettings
from cluster.errors import (
    DeadlineExceeded,
    InvalidConfiguration,
    InvalidRequest,
    Overloaded,
    ReplicaLost,
    TrimtabError,
    UnknownModel,
)
from deploy.openai_schema import Answer, ChatCompletionRequest, CompletionRequest, ErrorDetail

app = FastAPI(title="Trimtab", description="Weak-to-strong guided generation")

STATUS: dict[type[BaseException], tuple[int, str]] = {
    UnknownModel: (404, "invalid_request_error"),
    InvalidRequest: (400, "invalid_request_error"),
    Overloaded: (429, "overloaded_error"),
    ReplicaLost: (503, "server_error"),
    DeadlineExceeded: (504, "server_error"),
}
"""HTTP status and OpenAI error type of every error that a caller must tell apart."""

RETRY_AFTER_S = 5
FAILURES = (TrimtabError, RayError, RayServeException)


@serve.ingress(app)
class Gateway:
    """A Serve deployment that speaks OpenAI's HTTP API."""

    def __init__(self, coordinator: DeploymentHandle) -> None:
        self._coordinator = coordinator.options(stream=True)
        self._guidance = GuidanceSettings()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new profiles.

        Raises:
            InvalidConfiguration: the settings cannot be used; the old ones stay.
        """
        try:
            self._guidance = GuidanceSettings.model_validate(user_config)
        except ValidationError as error:
            raise InvalidConfiguration(f"user_config of Gateway: {error}") from error

    @app.get("/health")
    async def health(self) -> Response:
        """Whether the base and every configured guide can be used: 200, or 503 that names what is missing."""
        wanted = ["trimtab-base", *(f"trimtab-guide-{name}" for name in self._guidance.guides)]
        running = (await asyncio.to_thread(serve.status)).applications
        missing = [name for name in wanted if name not in running or running[name].status != "RUNNING"]
        if missing:
            return JSONResponse({"status": "starting", "missing": missing}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse({"status": "ready"})

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The profiles, as models."""
        names = [NO_GUIDANCE, *sorted(self._guidance.profiles)]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "trimtab"} for name in names],
        }

    @app.post("/v1/completions")
    async def completions(self, request: CompletionRequest) -> Response:
        """Continue a text."""
        return await self._answer(request)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: ChatCompletionRequest) -> Response:
        """Write the next turn of a conversation."""
        return await self._answer(request)

    async def _answer(self, request: CompletionRequest | ChatCompletionRequest) -> Response:
        answer = Answer(request)
        if not request.stream:
            generate = self._coordinator.options(stream=False).generate
            return JSONResponse(answer.whole(await generate.remote(**request.fields())))
        pieces = self._coordinator.stream.remote(**request.fields())
        # The first piece decides between an error's own status and a stream.
        first = await anext(pieces)
        events = _events(answer, first, pieces, with_usage=request.wants_usage_chunk)
        return StreamingResponse(events, media_type="text/event-stream")


async def _events(answer: Answer, first: Piece, pieces: Any, *, with_usage: bool) -> AsyncIterator[str]:
    """A stream's events; an error after the first token is the last of them."""
    piece = first
    try:
        yield _event(answer.chunk(piece))
        async for piece in pieces:
            yield _event(answer.chunk(piece))
        if with_usage:
            yield _event(answer.usage_chunk(piece["usage"]))
        yield "data: [DONE]\n\n"
    except FAILURES as error:
        _, detail = _describe(error)
        yield _event({"error": detail.model_dump()})
    finally:
        pieces.cancel()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _describe(error: BaseException) -> tuple[int, ErrorDetail]:
    """The HTTP status and body for an error, its cause if Ray carried it here."""
    cause = getattr(error, "cause", None) or error
    for kind, (status, error_type) in STATUS.items():
        if isinstance(cause, kind):
            return status, ErrorDetail(message=str(cause), type=error_type, param=getattr(cause, "field", None))
    return 500, ErrorDetail(message=f"{type(cause).__name__}: {cause}", type="server_error")


def _error_response(status: int, detail: ErrorDetail) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse({"error": detail.model_dump()}, status, headers)


async def _handle_failure(_: Request, error: Exception) -> JSONResponse:
    return _error_response(*_describe(error))


async def _handle_bad_body(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _error_response(*_describe(invalid_request(error)))


for failure in FAILURES:
    app.add_exception_handler(failure, _handle_failure)
app.add_exception_handler(RequestValidationError, _handle_bad_body)
