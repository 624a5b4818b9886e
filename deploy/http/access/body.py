"""Reading what a client sends, within limits, and refusing what no request can be before it is parsed."""

import asyncio
import re
import zlib
from collections.abc import Iterable

from starlette.types import Message, Receive

from deploy.http.openai_schema import ErrorDetail, ErrorType

MAX_HEADER_BYTES = 32 * 2**10
MAX_DEPTH = 32
"""Of arrays and objects within each other; the API's own bodies need six, and JSON schemas two for each of theirs."""

JSON_TYPE = re.compile(rb"application/(?:[a-z0-9.-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)
# A string, one without an end too, or one bracket. Possessive: time grows with the length and nothing else.
TOKENS = re.compile(rb'"(?:[^"\\]|\\.?)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)

Headers = Iterable[tuple[bytes, bytes]]


class Denied(Exception):
    """A request that is answered before the application sees it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: ErrorType = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)
        self.headers = headers


class Gone(Exception):
    """The client left before it had sent its request."""


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the first header of that name, in lower case."""
    return next((value for key, value in headers if key.lower() == name), None)


def check_headers(headers: Headers) -> None:
    """Raise `Denied` for headers that are too long together."""
    num_bytes = sum(len(name) + len(value) for name, value in headers)
    if num_bytes > MAX_HEADER_BYTES:
        raise Denied(431, f"the headers have {num_bytes:,} bytes; they may have {MAX_HEADER_BYTES:,}", param="headers")


async def read_body(headers: Headers, receive: Receive, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return a request's body.

    Raises:
        Denied: it is too long, or was not sent in time.
        Gone: the client left.
    """
    announced = header(headers, b"content-length") or b"0"
    if not announced.isdigit() or len(announced) > 18 or int(announced) > max_bytes:
        raise _too_long(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message: Message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise _too_long(max_bytes)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise Denied(408, f"the body did not arrive within {timeout_s:g} s", param="body") from error


def inflate(headers: Headers, body: bytes, *, max_bytes: int) -> bytes:
    """Return a body as it was before it was compressed, if it was.

    Raises:
        Denied: it is not what the header says, or longer than `max_bytes`.
    """
    encoding = (header(headers, b"content-encoding") or b"").strip().lower()
    if encoding in (b"", b"identity"):
        return body
    if encoding != b"gzip":
        raise Denied(415, "the header Content-Encoding must be gzip, or be left out", param="Content-Encoding")
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise Denied(400, f"the body is not gzip, as Content-Encoding says: {error}", param="body") from error
    if len(inflated) > max_bytes:
        raise _too_long(max_bytes)
    if not inflater.eof or inflater.unused_data:
        raise Denied(400, "the body is not gzip, as Content-Encoding says: it ends too early or late", param="body")
    return inflated


def check_json(headers: Headers, body: bytes) -> None:
    """Raise `Denied` for a body that is not JSON by its type, its encoding or its depth."""
    content_type = header(headers, b"content-type") or b""
    if not JSON_TYPE.fullmatch(content_type):
        raise Denied(415, "the header Content-Type must be application/json", param="Content-Type")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise Denied(400, f"the body is not UTF-8: byte {error.start} cannot be read", param="body") from error
    if b"\0" in body:
        raise Denied(400, "the body is not UTF-8 text: it holds a zero byte", param="body")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and depth(body) > MAX_DEPTH:
        raise Denied(400, f"the body nests arrays and objects deeper than {MAX_DEPTH} levels", param="body")


def depth(body: bytes) -> int:
    """Return how many arrays and objects a JSON text has open at most."""
    deepest = level = 0
    for token in TOKENS.finditer(body):
        start = body[token.start()]
        if start in b"[{":
            level += 1
            deepest = max(deepest, level)
        elif start in b"]}":
            level -= 1
    return deepest


def _too_long(max_bytes: int) -> Denied:
    return Denied(413, f"the body has more than {max_bytes:,} bytes (limits.max_body_bytes)", param="body")
