"""How answers and errors leave the gateway: one table from errors to HTTP, and server-sent events."""

import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException

from actors.coordinator.request import invalid_request
from cluster.errors import (
    ContextExceeded,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ReplicaLost,
    TrimtabError,
    UnknownModel,
    in_brief,
)
from deploy.http.openai_answer import Answer
from deploy.http.openai_schema import ErrorAnswer, ErrorDetail, ErrorType, StreamOptions
from deploy.http.several import Batch
from deploy.json_lines import to_line

STATUS: dict[type[BaseException], tuple[int, ErrorType, str | None]] = {
    UnknownModel: (404, "invalid_request_error", "model_not_found"),
    ContextExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    InvalidRequest: (400, "invalid_request_error", None),
    Overloaded: (429, "overloaded_error", "rate_limit_exceeded"),
    ReplicaLost: (503, "server_error", None),
    DeadlineExceeded: (504, "server_error", None),
}
"""HTTP status, OpenAI error type and code of every error that a caller must tell apart; all others are 500."""

HTTP_NAMES = {"weights": "guidance.weights", "details": "guidance.details"}
"""Fields that the coordinator knows by another name."""

MAX_MESSAGE_CHARS = 1000
"""Of an error's message, which may show what the client sent."""

RETRY_AFTER_S = 5
FAILURES = (TrimtabError, RayError, RayServeException)

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be served as it is; `param` names what is wrong."},
    503: {"model": ErrorAnswer, "description": "A model cannot be had at present."},
    504: {"model": ErrorAnswer, "description": "The answer was not finished in time."},
}
"""What every endpoint may answer, for the OpenAPI schema."""

STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The answer, or its stream."}
}
"""What the endpoints that write text answer."""


def answer_errors(app: FastAPI) -> None:
    """Make the app answer errors as OpenAI's clients expect them. To be called before `serve.ingress` takes the app."""
    for failure in FAILURES:
        app.add_exception_handler(failure, _answer_failure)
    app.add_exception_handler(RequestValidationError, _answer_bad_body)
    app.add_exception_handler(HTTPException, _answer_http_error)


async def stream_events(
    answer: Answer, first: Batch, rest: AsyncGenerator[Batch, None], *, options: StreamOptions | None = None
) -> AsyncIterator[str]:
    """Yield a stream's events, those that are due at once together; an error after the first token is the last of them.

    Args:
        answer: forms the chunks.
        first: the first pieces, each with its choice; none as a sign of life.
        rest: those after them; closed when the stream ends.
        options: what there is beside the text.
    """
    options = options or StreamOptions()
    try:
        yield _events(answer, first, options)
        async for pieces in rest:
            yield _events(answer, pieces, options)
    except FAILURES as error:
        _, detail = _describe(error)
        yield _event({"error": detail.model_dump()})
    finally:
        await rest.aclose()


def _events(answer: Answer, pieces: Batch, options: StreamOptions) -> str:
    """The events of some pieces; after the last one of all answers, those that end the stream."""
    if not pieces:
        return ": waiting\n\n"
    with_usage = options.continuous_usage_stats
    events = [_event(answer.chunk(index, piece, with_usage=with_usage)) for index, piece in pieces]
    if answer.is_finished:
        if options.include_usage:
            events.append(_event(answer.usage_chunk()))
        events.append("data: [DONE]\n\n")
    return "".join(events)


def _event(body: dict[str, Any]) -> str:
    return f"data: {to_line(body)}\n\n"


def _describe(error: BaseException) -> tuple[int, ErrorDetail]:
    """The HTTP status and body for an error, or for its cause if Ray carried it here."""
    cause = getattr(error, "cause", None) or error
    for kind, (status, error_type, code) in STATUS.items():
        if isinstance(cause, kind):
            field: str | None = getattr(cause, "field", None)
            param = HTTP_NAMES.get(field, field) if field else None
            param = param and _readable(param)
            return status, ErrorDetail(message=_readable(str(cause)), type=error_type, param=param, code=code)
    return 500, ErrorDetail(message=_readable(f"{type(cause).__name__}: {in_brief(cause)}"), type="server_error")


def _readable(text: str) -> str:
    """A message that can be sent: not longer than it need be, and half a surrogate pair in it as its code."""
    short = text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}..."
    return short.encode(errors="backslashreplace").decode()


async def _answer_failure(_: Request, error: Exception) -> JSONResponse:
    status, detail = _describe(error)
    retry_after_s: float = getattr(getattr(error, "cause", None) or error, "retry_after_s", None) or RETRY_AFTER_S
    headers = {"Retry-After": str(math.ceil(retry_after_s))} if status in (429, 503) else None
    return JSONResponse({"error": detail.model_dump()}, status, headers)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """An unknown path or method, or a body that cannot be decoded."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        path = request.url.path.rstrip("/")
        paths = request.app.openapi()["paths"]
        meant = next((known for known in (path, f"/v1{path}", path.removeprefix("/v1")) if known in paths), None)
        remedy = f"use {meant} (a client's base URL ends in /v1)" if meant else "/openapi.json lists those there are"
        message = f"there is no path {_readable(request.url.path)}; {remedy}"
    detail = ErrorDetail(message=_readable(message), type="invalid_request_error")
    return JSONResponse({"error": detail.model_dump()}, error.status_code, error.headers)


async def _answer_bad_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    complaint = error.errors()[0]
    if complaint["type"] == "json_invalid":
        return await _answer_failure(request, InvalidRequest(f"the body is not JSON: {complaint['ctx']['error']}"))
    path = tuple(part for part in complaint["loc"] if part != "body")
    return await _answer_failure(request, invalid_request({**complaint, "loc": path}))
