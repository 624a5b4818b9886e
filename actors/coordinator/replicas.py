"""Leases on model replicas, through Ray Serve, and the streams to the replicas on which there are any."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from actors.coordinator.outputs import OutputFunctions
from actors.guidance.output import OutputFunction
from actors.leases import Lease, LeaseRequest, Refusal
from actors.settings import NO_GUIDANCE
from cluster.errors import InvalidRequest, ReplicaLost
from cluster.exchange import StepStream, Transport
from cluster.tls import Tls

CONNECT_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


def model_handle(name: str) -> Any:
    """Return the handle of the base's deployment or of a guide's."""
    if name == NO_GUIDANCE:
        return serve.get_deployment_handle("BaseModel", "trimtab-base")
    return serve.get_deployment_handle("Guide", f"trimtab-guide-{name}")


@dataclass(frozen=True, slots=True)
class Place:
    """Room for a sequence on a replica."""

    lease: Lease
    stream: StepStream
    output: OutputFunction | None
    """What turns the stream's rows into logits; none where they are logits."""


class Replicas:
    """Takes leases for one coordinator and keeps one stream open to each replica on which it has any."""

    def __init__(self, coordinator: str, transport: Transport, tls: Tls | None = None) -> None:
        self._coordinator = coordinator
        self._transport: Transport = transport
        self._tls = tls
        self._streams: dict[str, StepStream] = {}
        self._fingerprints: dict[str, str] = {}
        self._outputs = OutputFunctions()
        self._connecting: dict[str, asyncio.Lock] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lease(self, name: str, request: LeaseRequest) -> AsyncIterator[Place]:
        """Hold room for a sequence on a replica of the base or of a guide, which Serve picks.

        Raises:
            InvalidRequest: the model cannot take the prompt.
            ReplicaLost: no replica can be had.
        """
        try:
            call = model_handle(name).options(stream=True).lease.remote(request)
        except RayServeException as error:
            raise ReplicaLost(f"{name} is not being served: {error}") from error
        try:
            grant = await self._first(name, call)
            stream = await self._stream(grant)
            yield Place(grant, stream, await self._outputs.get(grant))
        finally:
            call.cancel()

    async def _first(self, name: str, call: Any) -> Lease:
        try:
            grant: Lease | Refusal = await anext(call)
        except (RayError, RayServeException, StopAsyncIteration) as error:
            raise ReplicaLost(f"no replica of {name} can be had: {error}") from error
        if isinstance(grant, Refusal):
            raise InvalidRequest(f"{grant.message} ({name})" if name != NO_GUIDANCE else grant.message, grant.field)
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
        return stream

    def _forget(self, address: str, stream: StepStream) -> None:
        if self._streams.get(address) is stream:
            del self._streams[address], self._fingerprints[address]
            self._outputs.keep(self._fingerprints.values())
        closing = asyncio.get_running_loop().create_task(stream.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close every stream."""
        for stream in list(self._streams.values()):
            await stream.close()
