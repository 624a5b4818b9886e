"""Pieces of many answers over one connection: all of them, once, in order, or an error that says why not."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from cluster.delivery import Destination, Feed, Inbox, Outlet, Outlets, Receipt, inbox, outlet
from cluster.delivery.messages import MAX_MESSAGE_BYTES, VERSION, frame
from cluster.errors import InvalidConfiguration, ReplicaLost, TrimtabError

HOST = "127.0.0.1"


@asynccontextmanager
async def reading(**settings: Any) -> AsyncIterator[Inbox]:
    reader = Inbox(HOST, **settings)
    await reader.start()
    try:
        yield reader
    finally:
        await reader.stop()


@asynccontextmanager
async def writing() -> AsyncIterator[Outlets]:
    outlets = Outlets()
    try:
        yield outlets
    finally:
        await outlets.close()


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Inbox, Outlets]]:
    async with reading() as reader, writing() as writer:
        yield reader, writer


@asynccontextmanager
async def frozen_inbox(*says: bytes) -> AsyncIterator[Destination]:
    """Something that says so much and then neither reads nor answers."""
    over = asyncio.Event()
    ended = asyncio.Event()

    async def freeze(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines(says)
        await over.wait()
        writer.transport.abort()
        await asyncio.sleep(0)
        ended.set()

    server = await asyncio.start_server(freeze, HOST, 0)
    yield Destination(host=HOST, port=server.sockets[0].getsockname()[1], token="t", key=1)
    over.set()
    await ended.wait()
    server.close()


async def read_all(feed: Feed) -> list[Any]:
    items: list[Any] = []
    while batch := await feed.read():
        items += batch
    return items


async def test_many_answers_arrive_whole_and_in_order(ends: tuple[Inbox, Outlets]) -> None:
    reader, writer = ends

    async def write(feed: Feed, number: int) -> None:
        connection = await writer.reach(feed.destination)
        for i in range(50 + number):
            connection.put(feed.destination.key, {"text": f"{number} \u2028é\ud800", "n": i})
            if (i + number) % 3 == 0:
                await asyncio.sleep(0)
        feed.settle(Receipt(num_items=50 + number))

    with ExitStack() as stack:
        feeds = [stack.enter_context(reader.open()) for _ in range(64)]
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(read_all(feed)) for feed in feeds]
            for number, feed in enumerate(feeds):
                group.create_task(write(feed, number))
    for number, answer in enumerate(answers):
        assert answer.result() == [{"text": f"{number} \u2028é\ud800", "n": i} for i in range(50 + number)]
    assert len(reader._connections) == 1


async def test_what_is_put_at_once_is_one_message(ends: tuple[Inbox, Outlets], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = ends
    sent: list[str] = []

    def noted(body: str) -> bytes:
        sent.append(body)
        return frame(body)

    monkeypatch.setattr(outlet, "frame", noted)
    with reader.open() as one, reader.open() as two:
        connection = await writer.reach(one.destination)
        sent.clear()
        step = asyncio.Event()

        async def write(feed: Feed) -> None:
            for i in range(2):
                await step.wait()
                connection.put(feed.destination.key, i)

        writers = [asyncio.create_task(write(feed)) for feed in (one, two)]
        await asyncio.sleep(0)
        step.set()
        await asyncio.gather(*writers)
        assert await one.read() == await two.read() == [0, 1]
    assert [json.loads(body) for body in sent] == [[[1, 0], [1, 1], [2, 0], [2, 1]]]


async def test_a_large_batch_goes_in_several_messages(
    ends: tuple[Inbox, Outlets], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "BATCH_CHARS", 1000)
    reader, writer = ends
    with reader.open() as feed:
        connection = await writer.reach(feed.destination)
        for i in range(500):
            connection.put(feed.destination.key, [i, "x" * (3 * i)])
        feed.settle(Receipt(num_items=500))
        assert [i for i, _ in await read_all(feed)] == list(range(500))


async def test_an_error_comes_after_the_items_before_it(ends: tuple[Inbox, Outlets]) -> None:
    reader, writer = ends
    with reader.open() as feed:
        # The receipt overtakes the items: they have a way of their own.
        feed.settle(Receipt(num_items=2, error=TrimtabError("the model fell over")))
        connection = await writer.reach(feed.destination)
        connection.put(feed.destination.key, "a")
        assert await feed.read() == ["a"]
        connection.put(feed.destination.key, "b")
        assert await feed.read() == ["b"]
        with pytest.raises(TrimtabError, match="fell over"):
            await feed.read()


async def test_items_that_never_come_fail_the_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "MISSING_S", 0.05)
    async with reading() as reader:
        with reader.open() as feed:
            feed.settle(Receipt(num_items=3))
            with pytest.raises(ReplicaLost, match=r"3 pieces were sent and 0 came within 0\.05 s"):
                await feed.read()


async def test_a_writer_that_dies_fails_its_feeds_at_once_and_no_others() -> None:
    async with reading() as reader, writing() as dying, writing() as other:
        with reader.open() as one, reader.open() as two, reader.open() as done, reader.open() as waiting:
            for feed in (one, done):
                (await dying.reach(feed.destination)).put(feed.destination.key, "a")
            (await other.reach(two.destination)).put(two.destination.key, "a")
            done.settle(Receipt(num_items=1))
            await asyncio.gather(one.read(), two.read())
            (await dying.reach(one.destination))._writer.transport.abort()
            with pytest.raises(ReplicaLost, match="connection that brought the answer is over"):
                await one.read()
            # What was complete stays so, and those that it had brought nothing for go on.
            assert await read_all(done) == ["a"]
            for feed in (two, waiting):
                (await other.reach(feed.destination)).put(feed.destination.key, "b")
                assert await feed.read() == ["b"]


async def test_two_writers_of_one_answer_are_not_mixed() -> None:
    async with reading() as reader, writing() as first, writing() as second:
        with reader.open() as feed:
            (await first.reach(feed.destination)).put(feed.destination.key, "a")
            assert await feed.read() == ["a"]
            (await second.reach(feed.destination)).put(feed.destination.key, "a")
            with pytest.raises(ReplicaLost, match="two writers answered"):
                await feed.read()


async def test_a_reader_that_dies_fails_its_writers() -> None:
    async with reading() as reader, writing() as writer:
        with reader.open() as feed:
            destination = feed.destination
            connection = await writer.reach(destination)
            await reader.stop()
            await asyncio.wait_for(asyncio.shield(connection.lost), 10)
            with pytest.raises(ReplicaLost, match=r"connection to the gateway at 127\.0\.0\.1 port \d+ is over"):
                connection.put(destination.key, "a")
            with pytest.raises(ReplicaLost, match=r"gateway at 127\.0\.0\.1 port \d+ cannot be reached"):
                await writer.reach(destination)


async def test_a_connection_that_was_lost_is_replaced(ends: tuple[Inbox, Outlets]) -> None:
    reader, writer = ends
    with reader.open() as one, reader.open() as two:
        (await writer.reach(one.destination)).close()
        (await writer.reach(two.destination)).put(two.destination.key, "a")
        assert await two.read() == ["a"]


async def test_a_reader_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "MAX_UNSENT_BYTES", 100_000)

    async def put_much(connection: Outlet) -> None:
        for _ in range(1000):
            connection.put(1, "x" * 50_000)
            await asyncio.sleep(0)

    async with frozen_inbox(frame("{}")) as destination:
        connection = await Outlet.connect(destination)
        with pytest.raises(ReplicaLost, match="bytes wait to be read there"):
            await put_much(connection)
        connection.close()


async def test_what_comes_for_a_closed_feed_is_dropped(ends: tuple[Inbox, Outlets]) -> None:
    reader, writer = ends
    with reader.open() as gone:
        pass
    with reader.open() as feed:
        connection = await writer.reach(feed.destination)
        connection.put(gone.destination.key, "a")
        connection.put(feed.destination.key, "b")
        assert await feed.read() == ["b"]


async def test_a_wrong_token_is_refused_and_not_told(
    ends: tuple[Inbox, Outlets], caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = ends
    with reader.open() as feed, caplog.at_level(logging.DEBUG):
        destination = feed.destination
        with pytest.raises(ReplicaLost, match="the token is not this inbox's"):
            await writer.reach(replace(destination, token="guessed"))
        # And the right one is welcome all the same.
        (await writer.reach(destination)).put(destination.key, "a")
        assert await feed.read() == ["a"]
        assert destination.token not in caplog.text
        assert destination.token not in repr(destination)


async def raw(reader: Inbox, *messages: bytes) -> bytes:
    """Say something to an inbox and return what it answers until it hangs up."""
    with reader.open() as feed:
        destination = feed.destination
    incoming, outgoing = await asyncio.open_connection(destination.host, destination.port)
    for message in messages:
        outgoing.write(message.replace(b"TOKEN", destination.token.encode()))
    answer = await asyncio.wait_for(incoming.read(), 10)
    outgoing.close()
    await outgoing.wait_closed()
    return answer


HELLO = frame(json.dumps({"version": VERSION, "token": "x" * 43})).replace(b"x" * 43, b"TOKEN")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([frame("[]")], "begins with a Hello"),
        ([frame('{"token": 1}')], "begins with a Hello"),
        ([frame("x" * 5000)], "5,000 bytes; it may have 4,096"),
        ([b"GET / HTTP/1.1\r\n\r\n"], "it may have 4,096"),
        ([HELLO.replace(b": 1,", b": 2,")], "speaks version 2 of the protocol, the inbox 1"),
        ([HELLO, frame("[1")], "not JSON"),
        ([HELLO, frame("[1]")], "no list of keys and items"),
        ([HELLO, frame("[[[], 1]]")], "no list of keys and items"),
        ([HELLO, (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big")], "67,108,865 bytes; it may have 67,108,864"),
    ],
)
async def test_what_breaks_the_protocol_ends_its_connection(messages: list[bytes], says: str) -> None:
    async with reading() as reader:
        assert says in (await raw(reader, *messages)).decode()


async def test_who_says_nothing_is_hung_up_on() -> None:
    async with reading(handshake_s=0.05) as reader:
        assert await raw(reader) == b""


async def test_an_inbox_that_does_not_answer_is_given_up() -> None:
    async with frozen_inbox() as destination:
        with pytest.raises(ReplicaLost, match=r"no answer within 0\.05 s"):
            await Outlet.connect(destination, timeout_s=0.05)


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match=r"cannot listen on 192\.0\.2\.1"):
        await Inbox("192.0.2.1").start()
