"""One stream as the replica has it: what is said after the Hello, then steps in and results out."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from cluster.exchange import step_pb2
from cluster.exchange.messages import (
    NO_SLOT,
    Malformed,
    Step,
    StepHandler,
    StepRows,
    decode_request,
    decode_step,
    encode_failures,
    encode_reply,
    encode_rows,
    num_rows,
)
from cluster.exchange.rows import DTYPE_NAMES, RowFormat, Traffic
from cluster.exchange.segment import Layout, Segment, Slots, Unavailable

STREAM_IS_OVER = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError)
"""What sending may raise then."""

logger = logging.getLogger(__name__)


class Refused(Exception):
    """The replica ends a stream, with a status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Terms:
    """What a replica offers to every stream."""

    row_format: RowFormat
    max_rows: int
    num_slots: int
    directory: Path
    handshake_s: float

    @property
    def layout(self) -> Layout:
        """The segment that a stream gets."""
        return Layout.of(self.row_format, max_rows=self.max_rows, num_slots=self.num_slots)


async def receive(context: Any) -> step_pb2.Request | None:
    """The next Request of a stream; None at its end.

    Raises Malformed.
    """
    data = await context.read()
    return None if data is grpc.aio.EOF else decode_request(data)


class Attachment:
    """A coordinator's stream, from its Hello until its detach."""

    def __init__(self, coordinator: str, context: Any, handler: StepHandler, terms: Terms, traffic: Traffic) -> None:
        self.coordinator = coordinator
        self.detached = asyncio.Event()
        self._context = context
        self._handler = handler
        self._terms = terms
        self._traffic = traffic
        self._slots: Slots | None = None
        self._busy_slots: set[int] = set()
        self._last_id = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self._ending: asyncio.Future[Refused] = asyncio.get_running_loop().create_future()

    def end(self, code: grpc.StatusCode, message: str) -> None:
        """Let `serve` raise Refused."""
        if not self._ending.done():
            self._ending.set_result(Refused(code, message))

    async def serve(self, *, offers_shared_memory: bool) -> None:
        """Serve the stream until the coordinator ends it.

        Raises Refused: a message was malformed, or `end` was called.
        """
        receiving = self._start(self._receive(offers_shared_memory))
        try:
            ends: set[asyncio.Future[Any]] = {receiving, self._ending}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._ending.done():
                raise self._ending.result()
            await receiving
        except Malformed as error:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error

    async def detach(self) -> None:
        """End all steps, then let the handler free what it holds for the stream; whatever that raises is logged."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._slots = None
        try:
            await self._handler.detach(self.coordinator)
        except Exception:
            logger.exception("detaching coordinator %s failed", self.coordinator)

    async def _receive(self, offers_shared_memory: bool) -> None:
        await self._welcome(offers_shared_memory)
        while (request := await receive(self._context)) is not None:
            if request.WhichOneof("body") == "leave":
                self._handler.leave(self.coordinator, request.leave.sequence)
                continue
            if request.WhichOneof("body") != "step":
                raise Malformed(f"a {request.WhichOneof('body')} where steps are expected")
            step = decode_step(request.step)
            self._take(request.step.id, request.step.slot, step)
            self._start(self._answer(request.step.id, request.step.slot, step))

    async def _welcome(self, offers_shared_memory: bool) -> None:
        segment, obstacle = None, ""
        try:
            if offers_shared_memory:
                try:
                    segment = Segment(self._terms.directory)
                except Unavailable as error:
                    obstacle = str(error)
            row_format = self._terms.row_format
            welcome = step_pb2.Welcome(
                dtype=DTYPE_NAMES[row_format.dtype],
                row_width=row_format.width,
                segment="" if segment is None else str(segment.path),
                obstacle=obstacle,
            )
            await self._send(encode_reply(step_pb2.Reply(welcome=welcome)))
            if segment is not None:
                await self._send(encode_reply(step_pb2.Reply(ready=await self._prove(segment))))
        finally:
            if segment is not None:
                segment.withdraw()

    async def _prove(self, segment: Segment) -> step_pb2.Ready:
        """The answer to the coordinator's proof, with slots if it sees the segment."""
        try:
            async with asyncio.timeout(self._terms.handshake_s):
                request = await receive(self._context)
        except TimeoutError as error:
            raise Malformed(f"no MemoryProof within {self._terms.handshake_s:g} s") from error
        if request is None or request.WhichOneof("body") != "proof":
            raise Malformed("no MemoryProof where one is expected")
        if not secrets.compare_digest(request.proof.nonce, segment.nonce):
            return step_pb2.Ready(obstacle=request.proof.obstacle or "the coordinator read another nonce")
        layout = self._terms.layout
        try:
            self._slots = segment.allocate(layout, self._terms.row_format)
        except Unavailable as error:
            logger.warning("coordinator %s gets its rows inline: %s", self.coordinator, error)
            return step_pb2.Ready(obstacle=str(error))
        return step_pb2.Ready(num_slots=layout.num_slots, slot_bytes=layout.slot_bytes, first_slot=layout.first_slot)

    def _take(self, step_id: int, slot: int, step: Step) -> None:
        """Check a step's number and slot, and take them."""
        if step_id <= self._last_id:
            raise Malformed(f"step {step_id} comes after step {self._last_id}")
        self._last_id = step_id
        if slot == NO_SLOT:
            return
        if self._slots is None or not 0 <= slot < self._slots.layout.num_slots:
            raise Malformed(f"step {step_id} names slot {slot}, which does not exist")
        if slot in self._busy_slots:
            raise Malformed(f"step {step_id} names slot {slot}, which waits for the rows of another step")
        if not self._slots.fits(num_rows(step.work)):
            raise Malformed(f"step {step_id} wants {num_rows(step.work)} rows in a slot of {self._terms.max_rows}")
        self._busy_slots.add(slot)

    async def _answer(self, step_id: int, slot: int, step: Step) -> None:
        """Do a step and send its result."""
        if self._slots is not None and slot != NO_SLOT and (count := num_rows(step.work)):
            step = replace(step, room=self._slots.rows(slot, count))
        try:
            messages = self._messages(step_id, slot, step, await self._handler.step(self.coordinator, step))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            # Without its traceback, in which the slot's memory would live on.
            logger.warning("a step of coordinator %s failed: %s", self.coordinator, reason)
            result = step_pb2.Result(id=step_id, error=reason)
            messages = iter([encode_reply(step_pb2.Reply(result=result))])
        self._busy_slots.discard(slot)
        with contextlib.suppress(*STREAM_IS_OVER):
            for message in messages:
                await self._send(message)

    def _messages(self, step_id: int, slot: int, step: Step, outcome: StepRows) -> Iterator[bytes]:
        """What answers a step, its rows in it or in the slot.

        Raises ValueError: the handler's rows are not those of the step.
        """
        row_format, rows_RW = self._terms.row_format, outcome.tensor
        row_format.check(rows_RW)
        expected = num_rows(step.work, outcome.failures)
        if len(rows_RW) != expected:
            raise ValueError(f"the handler gave {len(rows_RW)} rows for {expected}")
        result = step_pb2.Result(id=step_id, num_rows=expected, failures=encode_failures(outcome.failures))
        if self._slots is not None and slot != NO_SLOT and expected > 0:
            result.in_slot = True
            if step.room is None or rows_RW.data_ptr() != step.room.data_ptr():
                self._slots.write(slot, row_format.encode(rows_RW))
        self._traffic.count(expected * row_format.row_bytes, in_slot=result.in_slot)
        reply = step_pb2.Reply(result=result)
        return iter([encode_reply(reply)]) if result.in_slot else encode_rows(reply, row_format.encode(rows_RW))

    async def _send(self, reply: bytes) -> None:
        async with self._writing:
            await self._context.write(reply)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
