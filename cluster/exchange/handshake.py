"""The coordinator's part of what is said before the first step."""

import asyncio
from pathlib import Path
from typing import Any

import grpc

from cluster.exchange import step_pb2
from cluster.exchange.messages import Malformed, decode_reply
from cluster.exchange.rows import DTYPES, RowFormat
from cluster.exchange.segment import Layout, SightedSegment, Slots, Unavailable


class Ended(Exception):
    """The stream is over; the message says how it ended."""


async def send(call: Any, request: bytes) -> None:
    """Write one message.

    Raises Ended.
    """
    try:
        await call.write(request)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
        raise Ended(await _ending(call)) from error


async def receive(call: Any) -> step_pb2.Reply:
    """The next Reply of a stream.

    Raises Ended; Malformed.
    """
    try:
        data = await call.read()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
        raise Ended(await _ending(call)) from error
    if data is grpc.aio.EOF:
        raise Ended(await _ending(call))
    return decode_reply(data)


async def shake_hands(call: Any, hello: step_pb2.Hello, directory: Path) -> tuple[RowFormat, Slots | None, str]:
    """Say Hello and prove that the replica's segment is seen here: the rows' format, the slots, why there are none.

    Raises Ended: refused, among other things. Malformed.
    """
    await send(call, step_pb2.Request(hello=hello).SerializeToString())
    reply = await receive(call)
    welcome = reply.welcome
    if reply.WhichOneof("body") != "welcome" or welcome.dtype not in DTYPES or welcome.row_width < 1:
        raise Malformed("the replica's first message is no Welcome that makes sense here")
    row_format = RowFormat(DTYPES[welcome.dtype], welcome.row_width)
    if not welcome.segment:
        return row_format, None, welcome.obstacle
    sighted, proof = None, step_pb2.MemoryProof()
    try:
        sighted = SightedSegment(welcome.segment, directory)
        proof.nonce = sighted.nonce
    except Unavailable as error:
        proof.obstacle = str(error)
    try:
        await send(call, step_pb2.Request(proof=proof).SerializeToString())
        reply = await receive(call)
        if reply.WhichOneof("body") != "ready":
            raise Malformed("the replica's second message is no Ready")
        ready = reply.ready
        if sighted is None or ready.num_slots == 0:
            return row_format, None, ready.obstacle
        try:
            return row_format, sighted.map(Layout(ready.num_slots, ready.slot_bytes, ready.first_slot), row_format), ""
        except Unavailable as error:
            return row_format, None, str(error)
    finally:
        if sighted is not None:
            sighted.close()


async def _ending(call: Any) -> str:
    code = await call.code()
    if code == grpc.StatusCode.OK:
        return "the replica ended the stream"
    return f"{code.name}: {await call.details()}"
