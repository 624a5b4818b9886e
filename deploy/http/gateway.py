"""The HTTP side of the service: OpenAI's API in, server-sent events out. Holds no model."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from actors.api import Piece
from actors.coordinator.request import parse_request
from actors.names import BASE, guide_application
from actors.settings import NO_GUIDANCE, CoordinatorSettings, GuidanceSettings, Profile, parse_guidance
from cluster.delivery import Feed, Inbox
from cluster.errors import ReplicaLost, TrimtabError
from cluster.tls import Tls
from deploy.http.access.guard import Access, Guard, caller_of
from deploy.http.attempts import REPEATABLE, Attempts, own_errors
from deploy.http.openai_schema import Answer, ChatCompletionRequest, CompletionRequest, TextRequest
from deploy.http.responses import ERRORS, RETRY_AFTER_S, STREAMS, answer_errors, stream_events

ASK_GUIDE_S = 2.0
"""For a guide's recommended weight, which a list of models can do without."""

ABSENCE_S = 10
"""The coordinator's own deadline comes first and says more; so much later, there is none that could."""

app = FastAPI(title="Trimtab", description="Weak-to-strong guided generation", responses=ERRORS, redirect_slashes=False)
answer_errors(app)
app.add_middleware(Guard)


# Above the class: `serve.ingress` takes the app, and what its methods use, as they are at that moment.
async def _follow(call: DeploymentResponse, feed: Feed) -> None:
    """Tell the feed how its call ended."""
    try:
        with own_errors():
            feed.settle(await call)
    except TrimtabError as error:
        feed.fail(error)
    except Exception as error:
        feed.fail(TrimtabError(f"the coordinator failed: {error!r}"))


@serve.ingress(app)
class Gateway:
    """A Serve deployment that speaks OpenAI's HTTP API."""

    def __init__(self, coordinator: DeploymentHandle, settings: CoordinatorSettings) -> None:
        self.access = Access.of_replica(settings)
        """What the guard asks of every request."""
        self._coordinator = coordinator
        self._deadline_s = settings.limits.deadline_s
        self._guidance = GuidanceSettings()
        self._recommended: dict[str, float | None] = {}
        self._inbox: Inbox | None = None
        self._starting = asyncio.Lock()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new profiles.

        Raises:
            InvalidConfiguration: the settings cannot be used; the old ones stay.
        """
        self._guidance = parse_guidance(user_config)
        self._recommended.clear()

    def check_health(self) -> None:
        """Raise `InvalidConfiguration` if strangers can reach the service and nobody needs a key (for Serve)."""
        self.access.check_exposure()

    @app.get("/health")
    async def health(self) -> Response:
        """Whether the base and every configured guide can be used: 200, or 503 that names what is missing."""
        wanted = [BASE, *map(guide_application, self._guidance.guides)]
        running = (await asyncio.to_thread(serve.status)).applications
        missing = [name for name in wanted if name not in running or running[name].status != "RUNNING"]
        if missing:
            return JSONResponse({"status": "starting", "missing": missing}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse({"status": "ready"})

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The profiles as models, each with its guidance, and the weights that the guides recommend."""
        profiles = {NO_GUIDANCE: Profile(), **dict(sorted(self._guidance.profiles.items()))}
        recommended = await asyncio.gather(*map(self._recommended_weight, self._guidance.guides))
        weights = dict(zip(self._guidance.guides, recommended, strict=True))
        return {
            "object": "list",
            "data": [
                {"id": name, "object": "model", "created": 0, "owned_by": "trimtab"}
                | {"guidance": {"weights": profile.weights, "sampling": profile.sampling.given()}}
                for name, profile in profiles.items()
            ],
            "guides": [{"id": name, "recommended_weight": weight} for name, weight in weights.items()],
        }

    async def _recommended_weight(self, guide: str) -> float | None:
        """What the guide's calibration says; none also where the guide is not there to be asked."""
        if guide not in self._recommended:
            call: DeploymentResponse | None = None
            try:
                handle = await asyncio.to_thread(serve.get_app_handle, guide_application(guide))
                call = handle.recommended_weight.remote()
                async with asyncio.timeout(ASK_GUIDE_S):
                    self._recommended[guide] = await call
            except (RayError, RayServeException, TimeoutError):
                if call is not None:
                    call.cancel()
                return None
        return self._recommended[guide]

    @app.post("/v1/completions", responses=STREAMS)
    async def completions(self, request: CompletionRequest, http: Request) -> Response:
        """Continue a text."""
        return await self._answer(request, http)

    @app.post("/v1/chat/completions", responses=STREAMS)
    async def chat_completions(self, request: ChatCompletionRequest, http: Request) -> Response:
        """Write the next turn of a conversation."""
        return await self._answer(request, http)

    async def _answer(self, request: CompletionRequest | ChatCompletionRequest, http: Request) -> Response:
        # What is wrong whatever the models are needs no coordinator, whose log would tell it as a failure.
        parse_request(self._guidance, request.fields(), self._deadline_s)
        request.is_for(caller_of(http.scope))
        answer = Answer(request)
        if not request.stream:
            return JSONResponse(answer.whole(await self._generate(request)))
        pieces = self._stream(request)
        # The first pieces decide between an error's own status and a stream.
        first = await anext(pieces)
        events = stream_events(answer, first, pieces, with_usage=request.wants_usage_chunk)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _generate(self, request: TextRequest) -> Piece:
        """A whole answer; given up when the client leaves."""
        attempts = Attempts(request.fields(), deadline_s=self._deadline_s)
        while True:
            call = self._coordinator.generate.remote(**attempts.fields())
            answer: Piece | None = None
            try:
                async with self._deadline(attempts):
                    with own_errors():
                        answer = await call
                        return answer
            except REPEATABLE as error:
                await asyncio.sleep(attempts.pause_s(error))
            finally:
                if answer is None:
                    call.cancel()

    async def _stream(self, request: TextRequest) -> AsyncGenerator[list[Piece], None]:
        """An answer in pieces, as many at a time as there are; given up when the client leaves."""
        attempts = Attempts(request.fields(), deadline_s=self._deadline_s)
        while not attempts.is_finished:
            try:
                async with aclosing(self._read(attempts)) as batches:
                    async for pieces in batches:
                        attempts.take(pieces)
                        yield pieces
            except REPEATABLE as error:
                if not attempts.is_finished:
                    await asyncio.sleep(attempts.pause_s(error))

    async def _read(self, attempts: Attempts) -> AsyncGenerator[list[Piece], None]:
        """What one coordinator brings of an answer."""
        inbox = await self._open_inbox()
        with inbox.open() as feed:
            call = self._coordinator.deliver.remote(feed.destination, attempts.resume(), **attempts.fields())
            following = asyncio.create_task(_follow(call, feed))
            try:
                while True:
                    async with self._deadline(attempts):
                        pieces = await feed.read()
                    if not pieces:
                        return
                    yield pieces
            finally:
                if not following.done():
                    call.cancel()
                    following.cancel()

    async def _open_inbox(self) -> Inbox:
        """Where coordinators bring the pieces of all streams."""
        async with self._starting:
            if self._inbox is None:
                inbox = Inbox(ray.util.get_node_ip_address(), tls=Tls.of_environment(os.environ))
                await inbox.start()
                self._inbox = inbox
        return self._inbox

    @asynccontextmanager
    async def _deadline(self, attempts: Attempts) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(attempts.left_s + ABSENCE_S):
                yield
        except TimeoutError as error:
            raise ReplicaLost(f"no coordinator answered in time, nor {ABSENCE_S:g} s later") from error
