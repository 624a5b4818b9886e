"""The HTTP side of the service: OpenAI's API in, server-sent events out. Holds no model."""

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from importlib import metadata
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from actors.api import Piece
from actors.coordinator.request import check_model, parse_request
from actors.names import BASE, guide_application
from actors.settings import NO_GUIDANCE, CoordinatorSettings, GuidanceSettings, Profile, parse_guidance
from cluster.delivery import Feed, Inbox
from cluster.errors import TrimtabError
from cluster.tls import Tls
from deploy.http.access.guard import Access, Guard, caller_of
from deploy.http.attempts import REPEATABLE, Attempts, own_errors
from deploy.http.closing import Closing
from deploy.http.facts import Facts
from deploy.http.openai_answer import Answer
from deploy.http.openai_schema import ChatCompletionRequest, CompletionRequest
from deploy.http.responses import ERRORS, RETRY_AFTER_S, STREAMS, answer_errors, stream_events
from deploy.http.several import all_of, interleave

ABSENCE_S = 10
"""The coordinator's own deadline comes first and says more; so much later, there is none that could."""

SIGN_OF_LIFE_S = 15.0
"""After so long without a piece a stream says that it is alive: many proxies cut what is silent for 60 s."""

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


async def _read_soon(feed: Feed) -> list[Piece] | None:
    """What a feed brings; None if that takes so long that the stream should show that it is alive."""
    try:
        async with asyncio.timeout(SIGN_OF_LIFE_S):
            return await feed.read()
    except TimeoutError:
        return None


@serve.ingress(app)
class Gateway:
    """A Serve deployment that speaks OpenAI's HTTP API."""

    def __init__(self, coordinator: DeploymentHandle, settings: CoordinatorSettings) -> None:
        self.access = Access.of_replica(settings)
        """What the guard asks of every request."""
        self._coordinator = coordinator
        self._deadline_s = settings.limits.deadline_s
        self._guidance = GuidanceSettings()
        self._facts = Facts()
        self._inbox: Inbox | None = None
        self._starting = asyncio.Lock()
        self._closing = Closing()
        self._drain_s = settings.limits.drain_s

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new profiles.

        Raises:
            InvalidConfiguration: the settings cannot be used; the old ones stay.
        """
        self._guidance = parse_guidance(user_config)

    def check_health(self) -> None:
        """Raise `InvalidConfiguration` if strangers can reach the service and nobody needs a key (for Serve)."""
        self.access.check_exposure()

    async def close(self) -> None:
        """Finish what is being written, within `limits.drain_s`, and take nothing new: for who stops the service."""
        await self._closing.close(self._drain_s)

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health(self) -> Response:
        """Whether the base and every configured guide can be used: 200, or 503 that names what is missing."""
        wanted = [BASE, *map(guide_application, self._guidance.guides)]
        running = (await asyncio.to_thread(serve.status)).applications
        missing = [name for name in wanted if name not in running or running[name].status != "RUNNING"]
        if missing:
            return JSONResponse({"status": "starting", "missing": missing}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version(self) -> dict[str, str]:
        """The service's version."""
        return {"version": metadata.version("trimtab")}

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The profiles as models, each with its guidance, and the weights that the guides recommend."""
        guides = self._guidance.guides
        max_context, *recommended = await asyncio.gather(
            self._facts.ask(BASE, "max_context"),
            *(self._facts.ask(guide_application(guide), "recommended_weight") for guide in guides),
        )
        return {
            "object": "list",
            "data": [self._describe(name, max_context) for name in (NO_GUIDANCE, *sorted(self._guidance.profiles))],
            "guides": [
                {"id": name, "recommended_weight": weight} for name, weight in zip(guides, recommended, strict=True)
            ],
        }

    @app.get("/v1/models/{model}")
    async def model(self, model: str) -> dict[str, Any]:
        """One of the profiles."""
        check_model(self._guidance, model)
        return self._describe(model, await self._facts.ask(BASE, "max_context"))

    def _describe(self, name: str, max_context: int | None) -> dict[str, Any]:
        """A profile as OpenAI describes a model."""
        profile = self._guidance.profiles.get(name, Profile())
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "trimtab",
            "max_model_len": max_context,
            "guidance": {"weights": profile.weights, "sampling": profile.sampling.given()},
        }

    @app.post("/v1/completions", responses=STREAMS)
    async def completions(self, request: CompletionRequest, http: Request) -> Response:
        """Continue a text."""
        return await self._answer(request, http)

    @app.post("/v1/chat/completions", responses=STREAMS)
    async def chat_completions(self, request: ChatCompletionRequest, http: Request) -> Response:
        """Write the next turn of a conversation."""
        return await self._answer(request, http)

    async def _answer(self, request: CompletionRequest | ChatCompletionRequest, http: Request) -> Response:
        asked = request.requests(self._guidance.profiles)
        # What is wrong whatever the models are needs no coordinator, whose log would tell it as a failure.
        for fields in asked[:: request.num_written]:
            parse_request(self._guidance, fields, self._deadline_s)
        answer, caller = Answer(request), caller_of(http.scope)
        if not request.stream:
            with self._closing.answer():
                whole = await all_of([self._generate({**fields, "caller": caller}) for fields in asked])
            return JSONResponse(answer.whole(whole))
        pieces = interleave([self._stream({**fields, "caller": caller}) for fields in asked])
        # The first pieces decide between an error's own status and a stream, unless they are long in coming.
        first = await anext(pieces)
        events = stream_events(answer, first, pieces, options=request.stream_options)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _generate(self, fields: Mapping[str, Any]) -> Piece:
        """A whole answer; given up when the client leaves."""
        attempts = Attempts(fields, deadline_s=self._deadline_s)
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

    async def _stream(self, fields: Mapping[str, Any]) -> AsyncGenerator[list[Piece], None]:
        """An answer in pieces, as many at a time as there are; given up when the client leaves.

        No pieces at a time are a sign of life.
        """
        attempts = Attempts(fields, deadline_s=self._deadline_s)
        with self._closing.answer():
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
        """What one coordinator brings of an answer; nothing, now and then, while it waits."""
        inbox = await self._open_inbox()
        with inbox.open() as feed:
            call = self._coordinator.deliver.remote(feed.destination, attempts.resume(), **attempts.fields())
            following = asyncio.create_task(_follow(call, feed))
            try:
                while True:
                    async with self._deadline(attempts):
                        pieces = await _read_soon(feed)
                    if pieces is None:
                        yield []
                        continue
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

    def _deadline(self, attempts: Attempts) -> AbstractAsyncContextManager[None]:
        late = f"no coordinator answered in time, nor {ABSENCE_S:g} s later"
        return self._closing.wait(attempts.left_s + ABSENCE_S, late)
