"""The coordinator's actor: takes requests, leases models for them, and lets lanes write the answers."""

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from actors.api import Format, Piece, Resume, join
from actors.coordinator.admission import UNNAMED, Admission, Caller
from actors.coordinator.echo import Echo
from actors.coordinator.figures import Figures
from actors.coordinator.lane import Lane
from actors.coordinator.presence import Presence
from actors.coordinator.refusals import log_refusals_briefly
from actors.coordinator.replicas import Place, Replicas
from actors.coordinator.request import Generation, parse_request
from actors.coordinator.sequence import LiveSequence, Voice
from actors.coordinator.spelling import Spelling
from actors.coordinator.tenancy import Tenancy
from actors.coordinator.text import TextWriter
from actors.guidance import Spelled, drawing, scoring
from actors.guidance.grammar import GrammarMask, Grammars
from actors.guidance.shaping import Shaper
from actors.leases import BaseDescription, Lease
from actors.settings import NO_GUIDANCE, CoordinatorSettings, GuidanceSettings, parse_guidance
from actors.telemetry import Telemetry
from cluster.delivery import Destination, Outlets, Receipt
from cluster.errors import ContextExceeded, DeadlineExceeded, InvalidConfiguration, InvalidRequest, TrimtabError
from cluster.exchange import StepStream
from cluster.tls import Tls

COMPILE_S = 10.0
"""For a grammar, the first one of a base included."""


@dataclass(frozen=True, slots=True)
class KnownBase:
    """What a coordinator makes of a base's description, once."""

    end_tokens: frozenset[int]
    tokenizer: Tokenizer
    spelled: Spelled
    spelling: Spelling
    grammars: Grammars
    compiling: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grammars"))

    async def mask(self, form: Format) -> GrammarMask:
        """Return the mask of an answer in that form, compiled beside the event loop.

        Raises:
            InvalidRequest: there is no such grammar, or it takes too long.
        """
        compiled = asyncio.get_running_loop().run_in_executor(self.compiling, self.grammars.mask, form)
        try:
            async with asyncio.timeout(COMPILE_S) as limit:
                return await compiled
        except TimeoutError as error:
            if not limit.expired():
                raise
            message = f"the form of the answer took longer than {COMPILE_S:g} s to prepare; ask for a simpler one"
            raise InvalidRequest(message, "response_format") from error

    @classmethod
    def of(cls, description: BaseDescription) -> "KnownBase":
        """Take what a base says of itself."""
        tokenizer = Tokenizer.from_str(description.tokenizer)
        spelled = Spelled({*tokenizer.get_vocab().values(), *description.end_tokens})
        spelling = Spelling(tokenizer)
        grammars = Grammars(lambda: spelling.text_bytes(spelled.num_columns), description.end_tokens)
        return cls(description.end_tokens, tokenizer, spelled, spelling, grammars)


class Coordinator:
    """A Serve deployment that answers requests for guided text.

    `generate` and `stream` take the fields of `GenerationRequest` as keywords. Both are called through a handle:
    `serve.get_deployment_handle("Coordinator", "trimtab").generate.remote(prompt="Once", weights={"kind": 1.0})`.
    `deliver` is for gateways: it writes many answers into one inbox at little cost.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        log_refusals_briefly()
        drawing.warm_up()
        scoring.warm_up()
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
        self._bases: dict[str, KnownBase] = {}
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
        async with aclosing(self.stream(**fields)) as pieces:
            return join([piece async for piece in pieces])

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
                ticket.charge(sequence.num_prompt_tokens)
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
        known = self._learn(base)
        _check_tokens(request, known.spelled)
        end_tokens = request.stop_tokens | (frozenset() if request.ignores_eos else known.end_tokens)
        mask = None if request.form is None else await known.mask(request.form)
        shaper = None
        if mask is not None or not request.shaping.is_none:
            shaper = Shaper(request.shaping, prompt=base.prompt_tokens, end_tokens=end_tokens, mask=mask)
        sequence = LiveSequence(
            voices=[
                Voice(name, _weight(request, name, leases[name]), None, list(leases[name].prompt_tokens))
                for name in (NO_GUIDANCE, *request.weights)
            ],
            sampling=request.sampling,
            max_tokens=_max_tokens(request, leases),
            end_tokens=end_tokens,
            writer=TextWriter(
                known.tokenizer,
                base.prompt_tokens,
                request.stop,
                includes_stop=request.includes_stop,
                shows_special=request.shows_special,
                min_tokens=request.shaping.min_tokens,
            ),
            sample=request.sample,
            spelled=known.spelled,
            shaper=shaper,
            scoring=request.scoring,
            echo=_echo(request, leases, known) if request.echoes and resume is None else None,
            spelling=known.spelling,
            writes_end=request.includes_stop,
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

    def _learn(self, lease: Lease) -> KnownBase:
        """What is known of the base, which comes with the first lease on it."""
        if lease.description is not None and lease.fingerprint not in self._bases:
            self._bases[lease.fingerprint] = KnownBase.of(lease.description)
        return self._bases[lease.fingerprint]

    async def close(self) -> None:
        """End every connection."""
        await self._outlets.close()
        await self._replicas.close()

    async def __del__(self) -> None:
        await self.close()


def _check_tokens(request: Generation, spelled: Spelled) -> None:
    """Raise `InvalidRequest` if the request names a token that the base does not have."""
    named = {
        "logit_bias": request.shaping.logit_bias,
        "stop_token_ids": request.stop_tokens,
        "prompt": request.prompt.tokens or (),
    }
    for name, tokens in named.items():
        for token in tokens:
            if token not in spelled:
                message = f"{name}: the base has no token {token}; its ids go up to {spelled.num_columns - 1}"
                raise InvalidRequest(message, name)


def _echo(request: Generation, leases: Mapping[str, Lease], known: KnownBase) -> Echo:
    """What is told of a prompt before its answer.

    Raises:
        InvalidRequest: a guide has other tokens for it, so that they cannot be told of one by one.
    """
    tokens = list(leases[NO_GUIDANCE].prompt_tokens)
    if request.scoring is not None:
        for name, lease in leases.items():
            if list(lease.prompt_tokens) != tokens:
                raise InvalidRequest(
                    f"echo: guide {name!r} reads this prompt in other tokens than the base (prompt_template), so that "
                    "its log probabilities cannot be told; leave echo, logprobs or the guide out",
                    "echo",
                )
    text = request.prompt.text
    if text is None:
        text = known.tokenizer.decode(tokens, skip_special_tokens=not request.shows_special)
    return Echo(text=text, tokens=tokens, is_scored=request.scoring is not None)


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
        ContextExceeded: prompt and answer would not fit into a model's context.
    """
    room = {name: lease.max_context - len(lease.prompt_tokens) for name, lease in leases.items()}
    if request.max_tokens is None:
        return min(room.values())
    for name, lease in leases.items():
        if request.max_tokens > room[name]:
            raise ContextExceeded(
                f"max_tokens: {len(lease.prompt_tokens)} prompt tokens and {request.max_tokens} new ones are more than "
                f"the context limit of {name!r}, {lease.max_context} tokens; ask for at most {room[name]}",
                "max_tokens",
            )
    return request.max_tokens
