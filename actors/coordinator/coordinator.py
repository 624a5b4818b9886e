"""The coordinator's actor: takes requests, leases models for them, and lets lanes write the answers."""

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any

from tokenizers import Tokenizer

from actors.api import Piece, Resume
from actors.coordinator.admission import UNNAMED, Admission, Caller
from actors.coordinator.figures import Figures
from actors.coordinator.lane import Lane
from actors.coordinator.presence import Presence
from actors.coordinator.refusals import log_refusals_briefly
from actors.coordinator.replicas import Place, Replicas
from actors.coordinator.request import Generation, parse_request
from actors.coordinator.sequence import LiveSequence, Voice
from actors.coordinator.tenancy import Tenancy
from actors.coordinator.text import TextWriter
from actors.guidance import Spelled
from actors.guidance.drawing import warm_up
from actors.leases import BaseDescription, Lease
from actors.settings import NO_GUIDANCE, CoordinatorSettings, GuidanceSettings, parse_guidance
from actors.telemetry import Telemetry
from cluster.delivery import Destination, Outlets, Receipt
from cluster.errors import DeadlineExceeded, InvalidConfiguration, InvalidRequest, TrimtabError
from cluster.exchange import StepStream
from cluster.tls import Tls


class Coordinator:
    """A Serve deployment that answers requests for guided text.

    `generate` and `stream` take the fields of `GenerationRequest` as keywords. Both are called through a handle:
    `serve.get_deployment_handle("Coordinator", "trimtab").generate.remote(prompt="Once", weights={"kind": 1.0})`.
    `deliver` is for gateways: it writes many answers into one inbox at little cost.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        log_refusals_briefly()
        warm_up()
        self._id = uuid.uuid4().hex
        self._limits = settings.limits
        self._guidance = GuidanceSettings()
        tls = Tls.of_environment(os.environ)
        self._replicas = Replicas(
            self._id, settings.exchange.transport, step_timeout_s=settings.limits.step_timeout_s, tls=tls
        )
        self._presence = Presence()
        self._outlets = Outlets(tls)
        self._lanes: dict[StepStream, Lane] = {}
        self._admission = Admission(settings.limits.max_open_requests)
        self._bases: dict[str, tuple[BaseDescription, Tokenizer, Spelled]] = {}
        self._figures = Figures()
        self._telemetry = Telemetry()

    def check_health(self) -> None:
        """Bring the coordinator's figures to Ray, when Serve asks for its health."""
        num_live = sum(lane.num_sequences for lane in self._lanes.values())
        self._telemetry.level("open_requests", self._admission.num_open)
        self._telemetry.level("live_sequences", num_live)
        self._telemetry.level("waiting_requests", max(0, self._admission.num_open - num_live))
        self._figures.report(self._telemetry)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new guides and profiles; sequences that are running end as they began.

        Raises:
            InvalidConfiguration: the settings cannot be used; the old ones stay.
        """
        self._guidance = parse_guidance(user_config)

    async def generate(self, **fields: Any) -> Piece:
        """Return a whole answer as one piece. Errors are those of `stream`."""
        text: list[str] = []
        token_ids: list[int] = []
        async with aclosing(self.stream(**fields)) as pieces:
            async for piece in pieces:
                text.append(piece["text"])
                token_ids += piece["token_ids"]
        return {**piece, "text": "".join(text), "token_ids": token_ids}

    async def stream(
        self, resume: Resume | None = None, /, *, caller: Caller = UNNAMED, **fields: Any
    ) -> AsyncGenerator[Piece, None]:
        """Yield an answer as it is written, from its beginning or behind what another coordinator has sent of it.

        Args:
            caller: whom it is for, from a gateway that knows the key.
            fields: those of `GenerationRequest`.

        Raises:
            InvalidRequest: a field is unknown or impossible.
            Overloaded: too many requests are open, or the caller has used up what it may.
            DeadlineExceeded: the answer was not finished in time.
            ReplicaLost: a model that it needs could not be had in time, or is not the one that it began with.
        """
        with self._figures.request() as figures:
            async with aclosing(self._answer(resume, caller, fields)) as pieces:
                async for piece in pieces:
                    figures.take(piece)
                    yield piece

    async def _answer(
        self, resume: Resume | None, caller: Caller, fields: Mapping[str, Any]
    ) -> AsyncGenerator[Piece, None]:
        request = parse_request(self._guidance, fields, self._limits.deadline_s)
        deadline = asyncio.get_running_loop().time() + request.timeout_s
        tenancy = self._tenancy(request)
        async with AsyncExitStack() as stack:
            ticket = stack.enter_context(self._admission.open(caller))
            stack.push_async_callback(tenancy.end)
            try:
                # Never around a `yield`: the time that a caller takes to come back is not ours to cancel.
                async with asyncio.timeout_at(deadline), self._admission.turn(caller, request.weights):
                    sequence = await self._begin(request, resume, tenancy)
                ticket.charge(len(sequence.voices[0].tokens))
                while True:
                    async with asyncio.timeout_at(deadline):
                        piece = await sequence.read()
                    ticket.charge(piece["usage"]["total_tokens"])
                    yield piece
                    if piece["finish_reason"] is not None:
                        return
            except TimeoutError as error:
                late = DeadlineExceeded(f"the answer was not finished within {request.timeout_s:g} s")
                raise tenancy.overdue(request.timeout_s) or late from error

    async def deliver(self, destination: Destination, resume: Resume | None = None, /, **fields: Any) -> Receipt:
        """Put the pieces of an answer into a gateway's feed as they are written; return when the last one is sent.

        The receipt has the errors of `stream`, so that the reader can take them after the pieces before them.
        """
        num_pieces = 0
        try:
            outlet = await self._outlets.reach(destination)
            async with aclosing(self.stream(resume, **fields)) as pieces:
                async for piece in pieces:
                    outlet.put(destination.key, piece)
                    num_pieces += 1
        except TrimtabError as error:
            return Receipt(num_items=num_pieces, error=error)
        return Receipt(num_items=num_pieces)

    def _tenancy(self, request: Generation) -> Tenancy:
        """The places that a request needs, none of them taken yet."""

        def lease(name: str) -> Awaitable[Place]:
            return self._replicas.lease(name, request.prompt, frozenset(self._bases))

        return Tenancy(
            (*request.weights, NO_GUIDANCE),
            lease=lease,
            is_there=self._presence.is_there,
            waits_for_guides=self._limits.on_guide_loss == "wait",
            replays=self._figures.replays,
        )

    async def _begin(self, request: Generation, resume: Resume | None, tenancy: Tenancy) -> LiveSequence:
        """A sequence that takes part in its base's lane."""
        await tenancy.begin()
        leases = {name: place.lease for name, place in tenancy.places.items()}
        base = leases[NO_GUIDANCE]
        for name, lease in leases.items():
            if lease.base_vocabulary != base.base_vocabulary:
                raise InvalidConfiguration(f"guide {name!r} was made for another base; correct `base` in its args")
        description, tokenizer, spelled = self._learn(base)
        sequence = LiveSequence(
            voices=[
                Voice(name, _weight(request, name, leases[name]), None, list(leases[name].prompt_tokens))
                for name in (NO_GUIDANCE, *request.weights)
            ],
            sampling=request.sampling,
            max_tokens=_max_tokens(request, leases),
            end_tokens=description.end_tokens,
            writer=TextWriter(tokenizer, base.prompt_tokens, request.stop),
            spelled=spelled,
        )
        if resume is not None:
            sequence.resume(resume)
        tenancy.settle(sequence, self._lane)
        return sequence

    def _lane(self, base: StepStream) -> Lane:
        lane = self._lanes.get(base)
        if lane is None:
            lane = self._lanes[base] = Lane(self._limits, self._figures)
            base.lost.add_done_callback(lambda _: self._lanes.pop(base, None))
        return lane

    def _learn(self, lease: Lease) -> tuple[BaseDescription, Tokenizer, Spelled]:
        """The base's end tokens, tokenizer and tokens, which come with the first lease on it."""
        description = lease.description
        if description is not None and lease.fingerprint not in self._bases:
            tokenizer = Tokenizer.from_str(description.tokenizer)
            spelled = Spelled({*tokenizer.get_vocab().values(), *description.end_tokens})
            self._bases[lease.fingerprint] = description, tokenizer, spelled
        return self._bases[lease.fingerprint]

    async def close(self) -> None:
        """End every connection."""
        await self._outlets.close()
        await self._replicas.close()

    async def __del__(self) -> None:
        await self.close()


def _weight(request: Generation, name: str, lease: Lease) -> float:
    """The weight of a voice; the base's is 1.

    Raises:
        InvalidRequest: it is left to a guide that recommends none.
    """
    weight = request.weights.get(name, 1.0)
    if weight is None:
        weight = lease.recommended_weight
    if weight is None:
        raise InvalidRequest(
            f"weights.{name}: 'auto' needs a guide that was calibrated (`trimtab calibrate`); give a number",
            "weights",
        )
    return weight


def _max_tokens(request: Generation, leases: Mapping[str, Lease]) -> int:
    """How many tokens the answer may have.

    Raises:
        InvalidRequest: prompt and answer would not fit into a model's context.
    """
    room = {name: lease.max_context - len(lease.prompt_tokens) for name, lease in leases.items()}
    if request.max_tokens is None:
        return min(room.values())
    for name, lease in leases.items():
        if request.max_tokens > room[name]:
            raise InvalidRequest(
                f"max_tokens: {len(lease.prompt_tokens)} prompt tokens and {request.max_tokens} new ones are more than "
                f"the context limit of {name!r}, {lease.max_context} tokens; ask for at most {room[name]}",
                "max_tokens",
            )
    return request.max_tokens
