"""Leases on model replicas, through Ray Serve, and the streams to the replicas on which there are any."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from actors.coordinator.hangs import watch
from actors.coordinator.outputs import OutputFunctions
from actors.coordinator.presence import model_handle
from actors.coordinator.sequence import Seat
from actors.leases import Lease, LeaseRequest, Refusal
from actors.prompts import Prompt
from actors.settings import NO_GUIDANCE
from cluster.errors import ReplicaLost, in_brief
from cluster.exchange import StepStream, Transport
from cluster.tls import Tls

CONNECT_TIMEOUT_S = 10.0

END_TIMEOUT_S = 15.0
"""A replica that has not ended a lease by then has not heard that it is over."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Room for a sequence on a replica, until it ends or the replica does."""

    lease: Lease
    stream: StepStream
    seat: Seat
    """What a voice takes."""

    call: Any
    """The lease's own, at Serve."""

    see_out: Callable[[Any], None]
    """Waits until a call ends by itself, and ends it if that takes long."""

    def end(self) -> None:
        """Give the room back; doing so again is no error."""
        # A call that is cancelled costs both ends several times what one costs that ends by itself.
        if self.stream.leave(self.seat.key):
            self.see_out(self.call)
        else:
            self.call.cancel()


class Replicas:
    """Takes leases for one coordinator and keeps one stream open to each replica on which it has any."""

    def __init__(
        self, coordinator: str, transport: Transport, *, step_timeout_s: float, tls: Tls | None = None
    ) -> None:
        self._coordinator = coordinator
        self._transport: Transport = transport
        self._step_timeout_s = step_timeout_s
        self._tls = tls
        self._streams: dict[str, StepStream] = {}
        self._fingerprints: dict[str, str] = {}
        self._outputs = OutputFunctions()
        self._connecting: dict[str, asyncio.Lock] = {}
        self._ending: set[Any] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def lease(self, name: str, prompt: Prompt, known_bases: frozenset[str]) -> Place:
        """Take room for a sequence on a replica of the base or of a guide, which Serve picks.

        Raises:
            InvalidRequest: the model cannot take the prompt.
            ReplicaLost: no replica can be had.
        """
        request = LeaseRequest(
            coordinator=self._coordinator, sequence=uuid.uuid4().hex, prompt=prompt, known_bases=known_bases
        )
        try:
            call = model_handle(name).options(stream=True).lease.remote(request)
        except RayServeException as error:
            raise ReplicaLost(f"{name} is not being served: {in_brief(error)}") from error
        try:
            grant = await self._first(name, call)
            stream = await self._stream(grant)
            seat = Seat(stream, request.sequence, await self._outputs.get(grant))
            return Place(grant, stream, seat, call, self._see_out)
        except BaseException:
            call.cancel()
            raise

    def _see_out(self, call: Any) -> None:
        if call not in self._ending:
            self._ending.add(call)
            self._start(self._end(call))

    async def _end(self, call: Any) -> None:
        # A call that nobody holds any more may end unseen by Serve, which would go on counting it.
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await anext(call, None)
        except TimeoutError:
            call.cancel()
        except (RayError, RayServeException) as error:
            logger.debug("a lease has ended with its replica: %s", error)
        finally:
            self._ending.discard(call)

    async def _first(self, name: str, call: Any) -> Lease:
        try:
            grant: Lease | Refusal = await anext(call)
        except (RayError, RayServeException, StopAsyncIteration) as error:
            raise ReplicaLost(f"no replica of {name} can be had: {in_brief(error)}") from error
        if isinstance(grant, Refusal):
            refused = grant.error
            raise type(refused)(f"{refused} ({name})" if name != NO_GUIDANCE else str(refused), refused.field)
        return grant

    async def _stream(self, lease: Lease) -> StepStream:
        """The open stream to a lease's replica."""
        async with self._connecting.setdefault(lease.address, asyncio.Lock()):
            stream = self._streams.get(lease.address)
            if stream is None or stream.lost.done():
                stream = await StepStream.connect(
                    lease.address,
                    token=lease.token,
                    coordinator=self._coordinator,
                    transport=self._transport,
                    timeout_s=CONNECT_TIMEOUT_S,
                    tls=self._tls,
                )
                logger.info("steps to %s travel by %s", lease.replica, stream.transport)
                self._streams[lease.address] = stream
                self._fingerprints[lease.address] = lease.fingerprint
                stream.lost.add_done_callback(lambda _: self._forget(lease.address, stream))
                self._start(watch(lease.replica, stream, self._step_timeout_s))
        return stream

    def _forget(self, address: str, stream: StepStream) -> None:
        if self._streams.get(address) is stream:
            del self._streams[address], self._fingerprints[address]
            self._outputs.keep(self._fingerprints.values())
        self._start(stream.close())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Close every stream."""
        for task in list(self._tasks):
            task.cancel()
        for stream in list(self._streams.values()):
            await stream.close()
