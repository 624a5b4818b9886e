"""Whatever bytes arrive on the data plane's ports, the other end stands, and honest peers are served."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.delivery import Inbox, Outlets, Receipt
from cluster.delivery.messages import VERSION as DELIVERY_VERSION
from cluster.delivery.messages import frame
from cluster.exchange import Step, StepRows, StepServer, StepStream, Work, step_pb2
from cluster.exchange.channel import MAX_REQUEST_BYTES
from cluster.exchange.messages import (
    METHOD,
    SERVICE,
    VERSION,
    Malformed,
    decode_reply,
    decode_request,
    decode_step,
    encode_step,
)

HOST = "127.0.0.1"
TIMEOUT_S = 20.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

numbers = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
works = st.builds(
    step_pb2.Work,
    sequence=st.text(max_size=4),
    length=numbers,
    tokens=st.lists(numbers, max_size=5),
    rows=st.lists(numbers, max_size=5),
)
steps = st.builds(
    step_pb2.Step,
    id=st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1)),
    slot=st.integers(-(2**31), 2**31 - 1),
    work=st.lists(works, max_size=4),
)
requests = st.one_of(
    st.builds(lambda step: step_pb2.Request(step=step), steps),
    st.builds(lambda nonce: step_pb2.Request(proof=step_pb2.MemoryProof(nonce=nonce)), st.binary(max_size=40)),
    st.builds(lambda name: step_pb2.Request(leave=step_pb2.Leave(sequence=name)), st.text(max_size=3)),
    st.builds(lambda name: step_pb2.Request(hello=step_pb2.Hello(coordinator=name)), st.text(max_size=3)),
).map(lambda request: request.SerializeToString())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message, cut off or with other bytes in it, or no message at all."""
    data = bytearray(draw(requests))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


messages = st.one_of(requests, damaged(), st.binary(max_size=60))


class Checking:
    """A handler that only ever sees steps that can be done."""

    async def step(self, coordinator: str, step: Step) -> StepRows:
        for item in step.work:
            assert item.tokens
            assert all(0 <= row < len(item.tokens) for row in item.rows)
        assert len({item.sequence for item in step.work}) == len(step.work)
        return StepRows(torch.zeros(sum(len(item.rows) for item in step.work), 2))

    def leave(self, coordinator: str, sequence: str) -> None:
        pass

    async def detach(self, coordinator: str) -> None:
        pass


@asynccontextmanager
async def serving() -> AsyncIterator[StepServer]:
    server = StepServer(
        Checking(), row_width=2, dtype=torch.float32, max_rows=4, host=HOST, handshake_s=0.5, keepalive_s=2
    )
    await server.start()
    try:
        yield server
        # An honest coordinator is served all the same.
        stream = await StepStream.connect(server.address, token=server.token, coordinator="good", timeout_s=TIMEOUT_S)
        with await stream.step([Work("s", 0, [1], [0])], timeout_s=TIMEOUT_S) as rows:
            assert rows.tensor.tolist() == [[0, 0]]
        await stream.close()
    finally:
        await server.stop()


async def say(server: StepServer, sent: Sequence[bytes], *, with_hello: bool) -> grpc.StatusCode | None:
    """Send messages on a stream, leave sending, and return how the replica ends it.

    None if gRPC's client does not know, because the end came while it was sending.
    """
    hello = step_pb2.Hello(version=VERSION, coordinator="bad", token=server.token)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for message in ([step_pb2.Request(hello=hello).SerializeToString()] if with_hello else []) + list(sent):
                await call.write(message)
            await call.done_writing()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while await call.read() is not grpc.aio.EOF:
                pass
        code: grpc.StatusCode = await call.code()
        return None if await call.details() == "Internal error from Core" else code


@given(messages)
def test_a_message_is_understood_or_refused(data: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with contextlib.suppress(Malformed):
            decode(data)
    with contextlib.suppress(Malformed):
        request = decode_request(data)
        if request.WhichOneof("body") == "step":
            step = decode_step(request.step)
            again = decode_request(encode_step(request.step.id, request.step.slot, step)).step
            assert decode_step(again) == step


async def test_no_stream_of_messages_ends_in_a_crash(num_hostile: int) -> None:
    conversations: list[tuple[list[bytes], bool]] = []

    @settings(
        max_examples=max(50, num_hostile // 10), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(messages, max_size=5), st.booleans())
    def collect(sent: list[bytes], with_hello: bool) -> None:
        conversations.append((sent, with_hello))

    collect()
    allowed = {
        None,
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
    async with serving() as server, asyncio.timeout(TIMEOUT_S + len(conversations)):
        for sent, with_hello in conversations:
            code = await say(server, sent, with_hello=with_hello)
            assert code in allowed, (code, sent)
            assert with_hello or code is not grpc.StatusCode.OK


async def test_a_message_that_is_too_large_ends_its_stream_alone() -> None:
    async with serving() as server:
        oversized = encode_step(1, -1, Step((Work("x" * (MAX_REQUEST_BYTES + 1), 0, (1,)),)))
        assert await say(server, [oversized], with_hello=True) is grpc.StatusCode.RESOURCE_EXHAUSTED


def broken_frames(chance: random.Random) -> bytes:
    """What begins as HTTP/2 perhaps, and goes on as nothing that anybody would say."""
    kind = chance.randrange(5)
    if kind == 0:
        return chance.randbytes(chance.choice([1, 9, 5000]))
    if kind == 1:
        return PREFACE[: chance.randrange(len(PREFACE))]
    settings_frame = b"\0\0\0\4\0\0\0\0\0"
    if kind == 2:
        # A frame that says it is longer than any may be.
        return PREFACE + settings_frame + b"\xff\xff\xff\0\0\0\0\0\1" + chance.randbytes(100)
    if kind == 3:
        # Headers that cannot be decoded, then data that claims a message of 4 GiB.
        data = b"\0\xff\xff\xff\xff" + chance.randbytes(20)
        return (
            PREFACE
            + settings_frame
            + b"\0\0\4\1\4\0\0\0\1"
            + chance.randbytes(4)
            + len(data).to_bytes(3, "big")
            + b"\0\0\0\0\0\1"
            + data
        )
    return PREFACE + settings_frame + chance.randbytes(200)


async def poke(host: str, port: int, data: bytes, chance: random.Random) -> None:
    """Send bytes, then leave in one of several ways."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(data)
        ending = chance.randrange(3)
        if ending == 0:
            writer.transport.abort()
        elif ending == 1:
            writer.write_eof()
            async with asyncio.timeout(5):
                await reader.read(1000)
        writer.close()


async def test_broken_frames_harm_nobody(num_hostile: int) -> None:
    chance = random.Random(0)
    async with serving() as server:
        host, port = server.address.split(":")
        for _ in range(max(50, num_hostile // 20)):
            with contextlib.suppress(TimeoutError):
                await poke(host, int(port), broken_frames(chance), chance)
        # Connections that say nothing at all, held open while an honest one is served.
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        stream = await StepStream.connect(server.address, token=server.token, coordinator="c", timeout_s=TIMEOUT_S)
        await stream.close()
        for _, writer in silent:
            writer.close()


@pytest.mark.parametrize("knows_token", [False, True])
async def test_no_bytes_in_an_inbox_harm_its_feeds(num_hostile: int, knows_token: bool) -> None:
    chance = random.Random(1)
    crashes: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: crashes.append(context))
    inbox, outlets = Inbox(HOST, handshake_s=0.5), Outlets()
    await inbox.start()
    with inbox.open() as feed:
        to = feed.destination
        outlet = await outlets.reach(to)
        outlet.put(to.key, "first")
        await feed.read()
        hello = frame(f'{{"version": {DELIVERY_VERSION}, "token": "{to.token}"}}') if knows_token else b""
        # Keys of feeds that exist are not guessed here: who has the token may write.
        bodies = [
            "[]",
            "{}",
            "[[99, 1]]",
            "[[1]]",
            "[1]",
            "null",
            '"x"',
            "[" * 4000,
            "[" * 20_000,
            "NaN",
            "\ud7ff",
            "[[{}, 1]]",
            "",
        ]
        for _ in range(max(50, num_hostile // 20)):
            data = chance.choice(
                [
                    frame(chance.choice(bodies)),
                    chance.randbytes(chance.choice([1, 4, 100])),
                    b"\xff\xff\xff\xff",
                    b"\0\0\1\0abc",
                    frame("[]")[: chance.randrange(6)],
                ]
            )
            with contextlib.suppress(TimeoutError):
                await poke(to.host, to.port, hello + data, chance)
        outlet.put(to.key, "last")
        feed.settle(Receipt(num_items=2))
        async with asyncio.timeout(TIMEOUT_S):
            assert await feed.read() == ["last"]
            assert await feed.read() == []
    await outlets.close()
    await inbox.stop()
    assert crashes == []
