"""The coordinator's end of a stream: steps out, rows in."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import grpc
from torch import Tensor

from cluster.errors import DeadlineExceeded, EngineError, InvalidConfiguration, ReplicaLost
from cluster.exchange import step_pb2
from cluster.exchange.channel import MAX_REQUEST_BYTES, channel_options
from cluster.exchange.handshake import Ended, receive, send, shake_hands
from cluster.exchange.messages import (
    METHOD,
    NO_SLOT,
    SERVICE,
    VERSION,
    Failure,
    Malformed,
    Step,
    Work,
    decode_failures,
    encode_step,
    num_rows,
)
from cluster.exchange.rows import RowFormat, Traffic
from cluster.exchange.segment import SHARED_MEMORY, Slots

Transport = Literal["auto", "shared_memory", "grpc"]


class Rows:
    """What a step brought back. A context manager: leaving it gives the slot back."""

    def __init__(
        self, tensor: Tensor, work: Sequence[Work], failures: tuple[Failure, ...], give_back: Callable[[], None] | None
    ) -> None:
        self.tensor = tensor
        """[R, W], in the order of the step's work, then of `Work.rows`, without the failed sequences. In a slot it is
        the shared memory itself: it may be changed in place, and is not to be touched after `release`."""
        self.failures = failures
        self._work = work
        self._give_back = give_back

    def spans(self) -> dict[str, slice]:
        """Where in `tensor` each sequence's rows are; a failed sequence has no entry."""
        failed = {failure.sequence for failure in self.failures}
        spans, start = {}, 0
        for item in self._work:
            if item.sequence not in failed:
                spans[item.sequence] = slice(start, start + len(item.rows))
                start += len(item.rows)
        return spans

    def release(self) -> None:
        """Give the slot back; doing so again is no error. Rows that are never released keep their slot."""
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(slots=True)
class _Outstanding:
    """A step that waits for its result. Its answer is done early when nobody waits for it any more."""

    step: Step
    slot: int
    answer: asyncio.Future[Rows] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class StepStream:
    """One coordinator's stream to one replica. Made by `connect`; lives on one event loop."""

    def __init__(self, address: str, channel: Any, call: Any, row_format: RowFormat, slots: Slots | None) -> None:
        self.address = address
        self.row_format = row_format
        self.transport: Literal["shared_memory", "grpc"] = "grpc" if slots is None else "shared_memory"
        """How rows travel; with shared memory, those that find no slot travel inline all the same."""
        self.traffic = Traffic()
        self.lost: asyncio.Future[ReplicaLost] = asyncio.get_running_loop().create_future()
        """Has the cause as its result once the stream is over, `close` included."""
        self._channel = channel
        self._call = call
        self._slots = slots
        self._free_slots = [] if slots is None else list(range(slots.layout.num_slots))
        self._outstanding: dict[int, _Outstanding] = {}
        self._last_id = 0
        self._requests: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        token: str,
        coordinator: str,
        transport: Transport = "auto",
        timeout_s: float,
        keepalive_s: float = 5.0,
        shared_memory_directory: Path = SHARED_MEMORY,
    ) -> Self:
        """Open a stream to the replica at `address`, whose `token` came with it.

        coordinator: names the stream's owner; an older stream of the same name is ended. transport: `auto` takes shared
        memory where both ends see the same, `grpc` never, `shared_memory` refuses anything else.
        keepalive_s: time within which a dead replica is found.

        Raises ReplicaLost: no replica there, no answer within `timeout_s`, or it refuses the stream.
        InvalidConfiguration: shared memory was demanded and cannot be had.
        """
        hello = step_pb2.Hello(
            version=VERSION, coordinator=coordinator, token=token, offers_shared_memory=transport != "grpc"
        )
        channel = grpc.aio.insecure_channel(address, options=channel_options(keepalive_s))
        try:
            call: Any = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
            async with asyncio.timeout(timeout_s):
                row_format, slots, obstacle = await shake_hands(call, hello, shared_memory_directory)
            if transport == "shared_memory" and slots is None:
                raise InvalidConfiguration(
                    f"exchange.transport is shared_memory, but rows of the replica at {address} cannot travel that "
                    f"way: {obstacle}. Run both on one node with a common, large enough {shared_memory_directory}, "
                    "or set exchange.transport to auto"
                )
        except TimeoutError as error:
            await channel.close()
            raise ReplicaLost(f"the replica at {address} did not answer within {timeout_s:g} s") from error
        except (Ended, Malformed) as error:
            await channel.close()
            raise ReplicaLost(f"no stream to the replica at {address}: {error}") from error
        except BaseException:
            await channel.close()
            raise
        return cls(address, channel, call, row_format, slots)

    async def step(self, work: Sequence[Work], close: Sequence[str] = (), *, timeout_s: float) -> Rows:
        """Send a step and wait for its rows. Several may be under way at once; they are done in the order of the calls.

        work: at most one item for each sequence. close: sequences to forget before that.

        Raises ReplicaLost: the stream is over. DeadlineExceeded: no answer within `timeout_s`; the replica may do the
        step yet. EngineError: the work is impossible, or the replica could not do the step as a whole.
        """
        if self.lost.done():
            raise ReplicaLost(str(self.lost.result()))
        outstanding = self._start(Step(tuple(work), tuple(close)))
        answer = outstanding.answer
        try:
            await asyncio.wait({answer}, timeout=timeout_s)
            if not answer.done():
                raise DeadlineExceeded(f"the replica at {self.address} did not answer a step within {timeout_s:g} s")
        except BaseException:
            # The slot of a step without an answer stays taken: the replica may still write there.
            if not answer.cancel() and answer.exception() is None:
                answer.result().release()
            raise
        return answer.result()

    async def close(self) -> None:
        """End the stream. Steps under way fail with ReplicaLost; rows that are held stay readable."""
        self._lose("the stream was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._call.cancel()
        await self._channel.close()
        self._slots = None

    def _start(self, step: Step) -> _Outstanding:
        """Number a step, find it a slot and queue it."""
        wanted = num_rows(step.work)
        has_slot = self._slots is not None and wanted > 0 and self._slots.fits(wanted) and bool(self._free_slots)
        slot = self._free_slots[-1] if has_slot else NO_SLOT
        try:
            request = encode_step(self._last_id + 1, slot, step)
        except ValueError as error:
            raise EngineError(str(error)) from error
        if len(request) > MAX_REQUEST_BYTES:
            raise EngineError(f"a step of {len(request):,} bytes; it may have {MAX_REQUEST_BYTES:,}")
        self._last_id += 1
        if slot != NO_SLOT:
            self._free_slots.pop()
        outstanding = self._outstanding[self._last_id] = _Outstanding(step, slot)
        self._requests.put_nowait(request)
        return outstanding

    async def _send(self) -> None:
        with suppress(Ended):  # the receiving task tells why
            while True:
                await send(self._call, await self._requests.get())

    async def _receive(self) -> None:
        try:
            while True:
                reply = await receive(self._call)
                if reply.WhichOneof("body") != "result":
                    raise Malformed(f"a {reply.WhichOneof('body')} where results are expected")
                self._take(reply.result)
        except (Ended, Malformed) as error:
            self._lose(str(error))
        except Exception as error:
            self._lose(f"its results cannot be read: {error!r}")
            raise

    def _take(self, result: step_pb2.Result) -> None:
        """Match a result with its step.

        Raises Malformed: it cannot be the answer to a step under way.
        """
        outstanding = self._outstanding.get(result.id)
        if outstanding is None:
            raise Malformed(f"a result of step {result.id}, which is not under way")
        answer, rows = outstanding.answer, None
        if not answer.done() and not result.error:
            rows = self._rows(result, outstanding)
        del self._outstanding[result.id]
        if outstanding.slot != NO_SLOT and (rows is None or not result.in_slot):
            self._free_slots.append(outstanding.slot)
        if rows is not None:
            answer.set_result(rows)
        elif not answer.done():
            answer.set_exception(EngineError(f"the replica at {self.address} could not do a step: {result.error}"))

    def _rows(self, result: step_pb2.Result, outstanding: _Outstanding) -> Rows:
        failures, slot, work = decode_failures(result), outstanding.slot, outstanding.step.work
        if result.num_rows != num_rows(work, failures):
            raise Malformed(f"{result.num_rows} rows for step {result.id}, which wants {num_rows(work, failures)}")
        give_back: Callable[[], None] | None = None
        if result.in_slot:
            if self._slots is None or slot == NO_SLOT or result.num_rows == 0:
                raise Malformed(f"rows of step {result.id} in a slot that it does not have")
            tensor = self._slots.rows(slot, result.num_rows)
            give_back = partial(self._free_slots.append, slot)
        else:
            try:
                tensor = self.row_format.decode(result.rows, result.num_rows)
            except ValueError as error:
                raise Malformed(f"step {result.id}: {error}") from error
        self.traffic.count(result.num_rows * self.row_format.row_bytes, in_slot=result.in_slot)
        return Rows(tensor, work, failures, give_back)

    def _lose(self, cause: str) -> None:
        """Fail every step under way."""
        if self.lost.done():
            return
        self.lost.set_result(ReplicaLost(f"the stream to the replica at {self.address} is over: {cause}"))
        for outstanding in self._outstanding.values():
            if not outstanding.answer.done():
                outstanding.answer.set_exception(ReplicaLost(str(self.lost.result())))
        self._outstanding.clear()
