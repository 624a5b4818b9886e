"""The door of the gateway: what is asked before its application sees a request."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ray import serve
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.coordinator.admission import UNNAMED, Caller
from actors.settings import CoordinatorSettings
from cluster.errors import InvalidConfiguration
from deploy.http.access.body import Denied, Gone, check_headers, check_json, header, inflate, read_body
from deploy.http.access.exposure import Ports, public_address
from deploy.http.access.keys import KeyRing
from deploy.http.access.pace import Pace
from deploy.http.access.serving import http_ports

OPEN_PATHS = frozenset({"/health"})
"""Those that need no key and count as no request."""

CALLER = "trimtab.caller"
"""Where a request's scope has its caller."""

LOOK_EVERY_S = 1.0
"""How often at most the node's sockets are looked at."""

REMEDY = (
    "give the service API keys (security.keys_file; `trimtab keys new`), bind http_options.host to 127.0.0.1, "
    "or set security.allow_public_without_keys to true"
)

logger = logging.getLogger(__name__)


class Access:
    """What one gateway asks of every request. Lives on one event loop."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        keys: KeyRing | None,
        ports: Ports | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask for what the settings say.

        Args:
            settings: their limits and security.
            keys: those that are valid; none where nobody needs one.
            ports: where HTTP is served, if it is.
            clock: in seconds.
        """
        self.limits = settings.limits
        self.cors_origins = settings.http.cors_origins
        self.refusals = Pace(settings.limits.refusals_per_s, clock)
        self._keys = keys
        self._ports = None if keys is not None or settings.security.allow_public_without_keys else ports
        self._clock = clock
        self._looked_at = -LOOK_EVERY_S
        self._public: str | None = None
        self._num_open = 0

    @classmethod
    def of_replica(cls, settings: CoordinatorSettings, environment: Mapping[str, str] = os.environ) -> "Access":
        """Return what a gateway that runs in this Serve replica asks.

        Raises:
            InvalidConfiguration: the keys cannot be read, or strangers can reach the port and nobody needs a key.
        """
        access = cls(settings, KeyRing.load(settings.security, environment), http_ports())
        access.check_exposure()
        return access

    def check_exposure(self) -> None:
        """Raise `InvalidConfiguration` if strangers can reach the HTTP port and nobody needs a key."""
        if self._ports is None:
            return
        now = self._clock()
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._public = public_address(self._ports)
        if self._public is not None:
            raise InvalidConfiguration(f"HTTP listens on {self._public}, and nobody needs a key: {REMEDY}")

    def identify(self, scope: Scope) -> Caller:
        """Return whom a request is for.

        Raises:
            Denied: its key is missing or unknown, or it must not be served here.
        """
        try:
            self.check_exposure()
        except InvalidConfiguration as error:
            raise Denied(503, str(error), kind="server_error") from error
        if self._keys is None:
            return UNNAMED
        kind, _, shown = (header(scope["headers"], b"authorization") or b"").decode("latin-1").partition(" ")
        key = self._keys.find(shown.strip()) if kind.lower() == "bearer" else None
        if key is None:
            complaint = "the API key is not known" if shown else "no API key was given"
            peer = (scope.get("client") or ("an unknown address",))[0]
            logger.warning("refused a request from %s: %s", peer, complaint)
            raise Denied(
                401,
                f"{complaint}; send `Authorization: Bearer <key>`",
                param="Authorization",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Bearer realm="trimtab"'},
            )
        return Caller(name=key.name, max_sequences=key.max_sequences, tokens_per_minute=key.tokens_per_minute)

    @contextmanager
    def room(self) -> Iterator[None]:
        """Count a request that is open here; raise `Denied` if there are too many."""
        if self._num_open >= self.limits.max_open_requests:
            message = f"{self._num_open} requests are open, which is the limit; try again later"
            headers = {"Retry-After": "1"}
            raise Denied(429, message, code="rate_limit_exceeded", kind="overloaded_error", headers=headers)
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1


def access_of_replica() -> Access:
    """Return the gateway's own, in its replica."""
    access: Access = serve.get_replica_context().servable_object.access
    return access


def caller_of(scope: Scope) -> Caller:
    """Return whom a request is for that has passed the guard."""
    caller: Caller = scope[CALLER]
    return caller


class Guard:
    """An application that passes on what may pass, with its body read and its caller known."""

    def __init__(self, app: ASGIApp, access: Callable[[], Access] = access_of_replica) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI); a browser's page of another origin too, if it is one of `http.cors_origins`."""
        answer: ASGIApp = self._answer
        if scope["type"] == "http" and header(scope["headers"], b"origin") and (origins := self._access().cors_origins):
            # Before the key is looked at: a browser asks whether it may send one without sending it.
            answer = CORSMiddleware(
                answer,
                allow_origins=origins,
                allow_methods=("GET", "HEAD", "POST"),
                allow_headers=("*",),
                expose_headers=("Retry-After",),
            )
        await answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        access = self._access()
        send = _paced(send, access.refusals)
        try:
            scope[CALLER] = access.identify(scope)
            with access.room():
                body = await _body(scope, receive, access)
                await self._app(scope, _replay(body, receive), send)
        except Denied as denied:
            answer = JSONResponse({"error": denied.detail.model_dump()}, denied.status, denied.headers)
            await answer(scope, receive, send)
        except Gone:
            pass


def _paced(send: Send, refusals: Pace) -> Send:
    """What sends an answer; where it refuses the request, when its turn has come."""

    async def paced(message: Message) -> None:
        if message["type"] == "http.response.start" and 400 <= message["status"] < 500:
            await asyncio.sleep(refusals.take())
        await send(message)

    return paced


async def _body(scope: Scope, receive: Receive, access: Access) -> bytes:
    check_headers(scope["headers"])
    limits = access.limits
    body = await read_body(scope["headers"], receive, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
    if body:
        body = inflate(scope["headers"], body, max_bytes=limits.max_body_bytes)
        check_json(scope["headers"], body)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, and then whatever the client does."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
