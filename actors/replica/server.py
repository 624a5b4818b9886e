"""One model replica: an engine, its leases, and the data plane on which coordinators send it steps.

`BaseModel` and `Guide` are the Serve deployments around it.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.types import ObjectRef
from torch import Tensor

from actors.engine import Engine, RowKind, Schedule, Task, gather_rows
from actors.guidance.lm_head import OutputFunction
from actors.leases import BaseDescription, Lease, LeaseRequest, Refusal
from actors.prompts import PromptEncoder
from actors.replica.ranks import Ranks, load_engine
from actors.replica.turns import Turns
from actors.settings import BaseModelSettings
from actors.telemetry import Telemetry
from cluster.errors import (
    ContextExceeded,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    Preempted,
    ReplicaLost,
    TrimtabError,
)
from cluster.exchange import Failure, Step, StepRows, StepServer, Work
from cluster.tls import Tls

ATTACH_TIMEOUT_S = 15.0
"""A lease whose coordinator has not opened its stream by then ends; longer than a coordinator tries."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Message:
    """A step message that is being answered."""

    coordinator: str
    step: Step
    answer: "asyncio.Future[StepRows]"
    tasks: list[Task] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    num_left: int = 0
    """Tasks that are not done yet."""


class ModelServer:
    """Serves one engine to any number of coordinators.

    All step messages that wait when the engine is free share its next forward passes, and each is answered as soon as
    all of its work is done. The engine and its schedule live in a thread of their own; everything else belongs to the
    event loop of the caller.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: PromptEncoder,
        *,
        replica: str,
        host: str,
        max_rows: int,
        max_prompt_tokens_per_step: int = 256,
        hang_s: float = 10.0,
        thread: ThreadPoolExecutor | None = None,
        turns: Turns | None = None,
        tls: Tls | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Serve an engine.

        Args:
            engine: used by nobody else from now on.
            encoder: of prompts.
            replica: the replica's name.
            host: where the data plane listens.
            max_rows: of a step message.
            max_prompt_tokens_per_step: of all prompts together in a forward pass.
            hang_s: a forward pass that takes longer counts as one that will never end.
            thread: the one in which the engine was made, from `engine_thread`. OpenMP gives every thread that computes
                a team of its own, and lets none of them wait actively once there are more threads than cores: steps
                then took up to 1.6 times as long.
            turns: taken for every forward pass, where other models compute on the same cores.
            tls: of the data plane.
            ranks: the other ranks of a sharded model, which are ended with this one.
        """
        self.engine = engine
        self.schedule = Schedule(engine, max_prompt_tokens=max_prompt_tokens_per_step)
        self.description: BaseDescription | None = None
        """Of a base, for coordinators."""
        self.output: ObjectRef[OutputFunction] | None = None
        """What turns the engine's rows into logits, for coordinators."""
        self.recommended_weight: float | None = None
        """Of a guide, by its calibration."""
        self.base_vocabulary = ""
        """Digest of the base's tokens: its own, or those that a guide was checked against."""
        self._encoder = encoder
        self._replica = replica
        self._server = StepServer(
            self, row_width=engine.row_width, dtype=engine.dtype, max_rows=max_rows, host=host, tls=tls
        )
        self._starting = asyncio.Lock()
        self._loop: asyncio.Task[None] | None = None
        self._thread = thread or engine_thread()
        self._turns = turns
        self._ranks = ranks
        self._hang_s = hang_s
        self._leases: dict[str, asyncio.Event] = {}
        """By sequence; set when it ends."""
        self._arrived: list[_Message] = []
        self._messages: dict[Task, _Message] = {}
        self._answerable: list[_Message] = []
        self._wake = asyncio.Event()
        self._busy_since: float | None = None
        self._num_passes = 0
        self._pass_s = 0.0
        self._telemetry = Telemetry()

    @classmethod
    def load(
        cls, settings: BaseModelSettings, tokenizer: Any, *, base_vocabulary: str, rows: RowKind = "logits"
    ) -> "ModelServer":
        """Load the model that the settings name, to be served by this Serve replica.

        Raises:
            InvalidConfiguration: the engine cannot run it with these settings, or not with such rows.
            ReplicaLost: one of its ranks did not come.
        """
        thread = engine_thread()
        ranks = None
        if settings.tensor_parallel > 1:
            engine, ranks = Ranks.load(settings, rows, thread)
        else:
            engine = thread.submit(load_engine, settings, rows).result()
        replica = serve.get_replica_context().replica_id.to_full_id_str()
        encoder = PromptEncoder(tokenizer, settings.prompt_template, split_special_tokens=settings.split_special_tokens)
        encoder.prepare()
        server = cls(
            engine,
            encoder,
            replica=replica,
            host=ray.util.get_node_ip_address(),
            max_rows=settings.max_sequences,
            max_prompt_tokens_per_step=settings.max_prompt_tokens_per_step,
            hang_s=settings.step_timeout_s,
            thread=thread,
            turns=Turns() if settings.takes_turns else None,
            tls=Tls.of_environment(os.environ),
            ranks=ranks,
        )
        server.base_vocabulary = base_vocabulary
        if engine.output is not None:
            # Once for all coordinators; those on this node read it where it lies.
            server.output = ray.put(engine.output)
        return server

    async def start(self) -> None:
        """Open the data plane, unless it is open."""
        async with self._starting:
            if self._loop is None:
                await self._server.start()
                self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End every stream and the data plane."""
        async with self._starting:
            if self._loop is not None:
                self._loop.cancel()
                await self._server.stop()
            if self._ranks is not None:
                self._ranks.stop()
            self._thread.shutdown(wait=False, cancel_futures=True)

    def check_health(self) -> None:
        """Raise `ReplicaLost` if steps are no longer run, or one hangs."""
        if self._loop is not None and self._loop.done():
            raise ReplicaLost(f"the loop of {self._replica} has ended")
        if self._busy_since is not None and time.monotonic() - self._busy_since > self._hang_s:
            raise ReplicaLost(f"a step of {self._replica} has not ended within {self._hang_s:g} s")

    def report(self) -> None:
        """Bring the replica's figures to Ray."""
        counters = self.engine.counters
        self._telemetry.level("leases", len(self._leases))
        self._telemetry.level("cache_use", self.engine.cache_use)
        self._telemetry.total("passes", self._num_passes)
        self._telemetry.total("pass_seconds", self._pass_s)
        self._telemetry.total("computed_tokens", counters.num_computed_tokens)
        self._telemetry.total("reused_tokens", counters.num_reused_tokens)
        self._telemetry.total("preemptions", self.schedule.num_preemptions)

    async def lease(self, request: LeaseRequest) -> AsyncGenerator[Lease | Refusal, None]:
        """Hold room for a sequence until the coordinator leaves it, its stream breaks or the caller ends the call.

        Yields one item: the lease, or why the prompt cannot be taken.
        """
        await self.start()
        try:
            tokens = self._encoder.encode(request.prompt)
            self._check(tokens, request.prompt.field)
        except InvalidRequest as error:
            yield Refusal(error=error)
            return
        key = _key(request.coordinator, request.sequence)
        ended = self._leases[key] = asyncio.Event()
        try:
            yield Lease(
                replica=self._replica,
                address=self._server.address,
                token=self._server.token,
                fingerprint=self.engine.fingerprint,
                prompt_tokens=tokens,
                max_context=self.engine.max_context,
                base_vocabulary=self.base_vocabulary,
                description=None if self.engine.fingerprint in request.known_bases else self.description,
                output=self.output,
                recommended_weight=self.recommended_weight,
            )
            await self._server.wait_attached(request.coordinator, ATTACH_TIMEOUT_S)
            await ended.wait()
        except DeadlineExceeded as error:
            logger.warning("the lease of %s ends: %s", key, error)
        finally:
            self._release(key)

    def _check(self, tokens: Sequence[int], field: str) -> None:
        """Raise `InvalidRequest` if a prompt does not fit into the context, or holds a token that the model lacks."""
        if len(tokens) >= self.engine.max_context:
            raise ContextExceeded(
                f"{field} has {len(tokens)} tokens, but the context limit is {self.engine.max_context} tokens, "
                "prompt and output together; shorten it",
                field,
            )
        if (last := max(tokens)) >= self.engine.num_token_ids:
            raise InvalidRequest(
                f"{field} holds the token {self._encoder.name_of(last)!r}, id {last}, and the model was made with "
                f"{self.engine.num_token_ids} tokens; leave it out",
                field,
            )

    async def step(self, coordinator: str, step: Step) -> StepRows:
        """Run a coordinator's step beside whatever else waits (`StepHandler`)."""
        message = _Message(coordinator, step, asyncio.get_running_loop().create_future())
        self._arrived.append(message)
        self._wake.set()
        return await message.answer

    def leave(self, coordinator: str, sequence: str) -> None:
        """End a sequence's lease, if it has one (`StepHandler`)."""
        self._release(_key(coordinator, sequence))

    async def detach(self, coordinator: str) -> None:
        """Free all that a coordinator held (`StepHandler`)."""
        for key in [key for key in self._leases if key.startswith(_key(coordinator, ""))]:
            self._release(key)

    def _release(self, key: str) -> None:
        if (ended := self._leases.pop(key, None)) is not None:
            ended.set()
            self._thread.submit(self._close, key)
            self._wake.set()

    async def _run(self) -> None:
        while True:
            if not self._messages:
                await self._wake.wait()
            self._wake.clear()
            await self._pass()

    async def _pass(self) -> None:
        """Take in what has arrived, compute for once, and answer what is done; keep nothing of it."""
        loop = asyncio.get_running_loop()
        arrived, self._arrived = self._arrived, []
        self._busy_since = time.monotonic()
        try:
            for message, rows in await loop.run_in_executor(self._thread, self._compute, arrived):
                if not message.answer.done():
                    message.answer.set_result(rows)
        except Exception as error:
            logger.exception("a step failed")
            if self._ranks is not None:
                self._ranks.fail(error)
            for message in await loop.run_in_executor(self._thread, self._give_up, arrived):
                if not message.answer.done():
                    message.answer.set_exception(TrimtabError(f"the model's step failed: {error!r}"))
        finally:
            self._busy_since = None

    def _compute(self, arrived: Sequence[_Message]) -> list[tuple[_Message, StepRows]]:
        """Take messages in, run a forward pass, and return those that can be answered (in the engine's thread,
        like all that it calls).
        """
        for message in arrived:
            self._take(message)
        if self.schedule.has_tasks:
            start = time.perf_counter()
            with self._turns.take() if self._turns else nullcontext():
                done = self.schedule.run(self._room())
            self._num_passes += 1
            self._pass_s += time.perf_counter() - start
            for task in done:
                message = self._messages.pop(task)
                if task.is_preempted:
                    self._fail(message, task, Preempted("its room was needed; send all its tokens again"))
                else:
                    self._finish(message)
        answerable, self._answerable = self._answerable, []
        return [
            (message, StepRows(gather_rows(message.tasks, self.engine), message.failures)) for message in answerable
        ]

    def _room(self) -> Tensor | None:
        """Where the next pass may write its rows: to the only message's memory, if there is one with any."""
        messages = set(self._messages.values())
        return messages.pop().step.room if len(messages) == 1 else None

    def _give_up(self, arrived: Sequence[_Message]) -> list[_Message]:
        """Drop all work, and return the messages that it was for."""
        messages = dict.fromkeys([*arrived, *self._messages.values(), *self._answerable])
        self.schedule.drop_tasks()
        self._messages.clear()
        self._answerable.clear()
        return list(messages)

    def _take(self, message: _Message) -> None:
        """Turn a message's work into tasks."""
        for item in message.step.work:
            try:
                task = self._schedule(_key(message.coordinator, item.sequence), item)
            except (EngineError, Preempted, ReplicaLost) as error:
                message.failures.append(Failure(item.sequence, type(error).__name__, str(error)))
            else:
                message.tasks.append(task)
                self._messages[task] = message
        message.num_left = len(message.tasks)
        if message.num_left == 0:
            self._answerable.append(message)

    def _fail(self, message: _Message, task: Task, error: TrimtabError) -> None:
        """Note that one of a message's tasks will not be done."""
        message.tasks.remove(task)
        sequence = task.sequence.removeprefix(_key(message.coordinator, ""))
        message.failures.append(Failure(sequence, type(error).__name__, str(error)))
        self._finish(message)

    def _finish(self, message: _Message) -> None:
        """Note that one of a message's tasks is done or given up."""
        message.num_left -= 1
        if message.num_left == 0:
            self._answerable.append(message)

    def _schedule(self, key: str, item: Work) -> Task:
        """Add a task for an item, opening its sequence if need be.

        Raises:
            EngineError: the engine would refuse the item, and with it everybody else's.
            Preempted: the replica no longer holds the tokens before the item's.
            ReplicaLost: the sequence's lease has ended.
        """
        if key not in self._leases:
            raise ReplicaLost(f"sequence {item.sequence!r} has no lease on {self._replica}")
        if not self.schedule.is_open(key):
            self.schedule.open(key)
        task = Task(key, item.length, item.tokens, item.rows)
        self.schedule.add(task)
        return task

    def _close(self, key: str) -> None:
        """Close a sequence if it is open; a message that waits for it is answered with its failure."""
        if not self.schedule.is_open(key):
            return
        self.schedule.close(key)
        for task in [task for task in self._messages if task.sequence == key]:
            self._fail(self._messages.pop(task), task, ReplicaLost("its lease has ended"))


def engine_thread() -> ThreadPoolExecutor:
    """Return a thread in which an engine can be made and run."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")


def _key(coordinator: str, sequence: str) -> str:
    return f"{coordinator}/{sequence}"
