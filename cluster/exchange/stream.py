"""The coordinator's end of a stream: steps out, rows in."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import grpc

from cluster.errors import DeadlineExceeded, EngineError, InvalidConfiguration, ReplicaLost
from cluster.exchange import step_pb2
from cluster.exchange.answer import Outstanding, Rows
from cluster.exchange.channel import MAX_REQUEST_BYTES, channel_options
from cluster.exchange.handshake import Ended, receive, send, shake_hands
from cluster.exchange.messages import (
    METHOD,
    NO_SLOT,
    SERVICE,
    VERSION,
    Malformed,
    Step,
    Work,
    encode_leave,
    encode_step,
    num_rows,
)
from cluster.exchange.rows import RowFormat, Traffic
from cluster.exchange.segment import SHARED_MEMORY, Slots
from cluster.tls import Tls

Transport = Literal["auto", "shared_memory", "grpc"]


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
        self._outstanding: dict[int, Outstanding] = {}
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
        tls: Tls | None = None,
    ) -> Self:
        """Open a stream to the replica at `address`, whose `token` came with it.

        coordinator: names the stream's owner; an older stream of the same name is ended. transport: `auto` takes shared
        memory where both ends see the same, `grpc` never, `shared_memory` refuses anything else.
        keepalive_s: time within which a dead replica is found. tls: what the coordinator shows, and asks of replicas.

        Raises ReplicaLost: no replica there, no answer within `timeout_s`, or it refuses the stream.
        InvalidConfiguration: shared memory was demanded and cannot be had, or a file of `tls` cannot be read.
        """
        hello = step_pb2.Hello(
            version=VERSION, coordinator=coordinator, token=token, offers_shared_memory=transport != "grpc"
        )
        options = channel_options(keepalive_s)
        if tls is None:
            channel = grpc.aio.insecure_channel(address, options=options)
        else:
            channel = grpc.aio.secure_channel(address, tls.channel_credentials(), options=options)
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

    async def step(self, work: Sequence[Work], *, timeout_s: float, inline: bool = False) -> Rows:
        """Send a step and wait for its rows. Several may be under way at once; they are taken in the order of the calls
        and answered in any order.

        work: at most one item for each sequence. inline: whether its rows take no slot of the shared memory, because it
        may be long under way.

        Raises ReplicaLost: the stream is over. DeadlineExceeded: no answer within `timeout_s`; the replica may do the
        step yet. EngineError: the work is impossible, or the replica could not do the step as a whole.
        """
        if self.lost.done():
            raise ReplicaLost(str(self.lost.result()))
        outstanding = self._start(Step(tuple(work)), inline)
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

    def leave(self, sequence: str) -> bool:
        """Tell the replica that a sequence has ended; whether a stream is there on which to tell it. What a stream that
        breaks was told last, the replica may not hear.
        """
        if self.lost.done():
            return False
        self._requests.put_nowait(encode_leave(sequence))
        return True

    async def close(self) -> None:
        """End the stream. Steps under way fail with ReplicaLost; rows that are held stay readable."""
        self._lose("the stream was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._call.cancel()
        await self._channel.close()
        self._slots = None

    def _start(self, step: Step, inline: bool) -> Outstanding:
        """Number a step, find it a slot and queue it."""
        wanted = num_rows(step.work)
        fits = self._slots is not None and wanted > 0 and self._slots.fits(wanted)
        has_slot = fits and not inline and bool(self._free_slots)
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
        outstanding = Outstanding(step, slot, self.row_format, self._slots, self._free_slots.append)
        self._outstanding[self._last_id] = outstanding
        self._requests.put_nowait(request)
        return outstanding

    async def _send(self) -> None:
        try:
            while True:
                await send(self._call, await self._requests.get())
        except Ended:
            pass  # the receiving task tells why
        except Exception as error:
            self._lose(f"steps cannot be sent: {error!r}")
            raise

    async def _receive(self) -> None:
        try:
            while True:
                self._take(await receive(self._call))
        except (Ended, Malformed) as error:
            self._lose(str(error))
        except Exception as error:
            self._lose(f"its results cannot be read: {error!r}")
            raise

    def _take(self, reply: step_pb2.Reply) -> None:
        """Match a message with its step.

        Raises Malformed: it cannot belong to the answer to a step under way.
        """
        kind = reply.WhichOneof("body")
        if kind not in ("part", "result"):
            raise Malformed(f"a {kind} where results are expected")
        step_id = reply.part.id if kind == "part" else reply.result.id
        outstanding = self._outstanding.get(step_id)
        if outstanding is None:
            raise Malformed(f"a {kind} of step {step_id}, which is not under way")
        if kind == "part":
            outstanding.add(reply.part.rows)
            return
        has_slot = outstanding.finish(reply.result)
        del self._outstanding[step_id]
        if outstanding.slot != NO_SLOT and not has_slot:
            self._free_slots.append(outstanding.slot)
        if not reply.result.error:
            num_bytes = reply.result.num_rows * self.row_format.row_bytes
            self.traffic.count(num_bytes, in_slot=reply.result.in_slot)

    def _lose(self, cause: str) -> None:
        """Fail every step under way."""
        if self.lost.done():
            return
        self.lost.set_result(ReplicaLost(f"the stream to the replica at {self.address} is over: {cause}"))
        for outstanding in self._outstanding.values():
            if not outstanding.answer.done():
                outstanding.answer.set_exception(ReplicaLost(str(self.lost.result())))
        self._outstanding.clear()
