"""The writer's end: one connection to each inbox, shared by all the answers that go there."""

import asyncio
import json
import logging
from typing import Any, Self

from cluster.delivery.messages import (
    MAX_HELLO_BYTES,
    VERSION,
    Destination,
    Ended,
    Malformed,
    frame,
    receive,
    watch_over,
)
from cluster.errors import AnswerLost
from cluster.tls import Tls

CONNECT_TIMEOUT_S = 10.0
BATCH_CHARS = 2**20
"""A message this long is sent without waiting for more."""

MAX_UNSENT_BYTES = 64 * 2**20
"""A reader that leaves more than this unread has stopped reading."""

logger = logging.getLogger(__name__)


class Outlet:
    """One connection to one inbox. Made by `connect`; lives on one event loop."""

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lost: asyncio.Future[AnswerLost] = asyncio.get_running_loop().create_future()
        """Has the cause as its result once the connection is over, `close` included."""
        self._address = address
        self._reader = reader
        self._writer = writer
        self._batch: list[str] = []
        self._num_chars = 0
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def connect(
        cls, destination: Destination, *, timeout_s: float = CONNECT_TIMEOUT_S, tls: Tls | None = None
    ) -> Self:
        """Open a connection to a destination's inbox; `tls` is what the writer shows, and asks of the inbox.

        Raises:
            InvalidConfiguration: a file of `tls` cannot be used.
            AnswerLost: there is no inbox, it does not answer in time, or it refuses the connection.
        """
        address = f"{destination.host} port {destination.port}"
        writer: asyncio.StreamWriter | None = None
        context = None if tls is None else tls.client_context()
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(destination.host, destination.port, ssl=context)
                watch_over(writer)
                writer.write(frame(json.dumps({"version": VERSION, "token": destination.token})))
                answer = await receive(reader, MAX_HELLO_BYTES)
            if answer != {}:
                raise Malformed(str(answer))
        except (OSError, Ended, Malformed) as error:
            if writer is not None:
                writer.close()
            cause = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            raise AnswerLost(f"the gateway at {address} cannot be reached: {cause}") from error
        except BaseException:
            if writer is not None:
                writer.close()
            raise
        return cls(address, reader, writer)

    def put(self, key: int, item: Any) -> None:
        """Send an item for a feed, together with all that is put in the same turn of the event loop.

        Raises:
            AnswerLost: the connection is over.
        """
        if self.lost.done():
            raise AnswerLost(str(self.lost.result()))
        text = json.dumps((key, item))
        if not self._batch:
            # Those that the same event woke run before this does.
            asyncio.get_running_loop().call_soon(self._flush)
        elif self._num_chars + len(text) > BATCH_CHARS:
            self._send()
        self._batch.append(text)
        self._num_chars += len(text)

    def close(self) -> None:
        """End the connection after what was put."""
        self._send()
        self._lose("it was closed")
        self._watching.cancel()

    def _flush(self) -> None:
        if not self.lost.done():
            self._send()

    def _send(self) -> None:
        if not self._batch:
            return
        message = frame(f"[{','.join(self._batch)}]")
        self._batch.clear()
        self._num_chars = 0
        self._writer.write(message)
        unsent = self._writer.transport.get_write_buffer_size()
        if unsent > MAX_UNSENT_BYTES:
            self._writer.transport.abort()
            self._lose(f"{unsent:,} bytes wait to be read there")

    async def _watch(self) -> None:
        """Notice the connection's end; an inbox says nothing more after its first word, but for why it ends."""
        try:
            self._lose(str(await receive(self._reader, MAX_HELLO_BYTES)))
        except (Ended, Malformed) as error:
            self._lose(str(error))

    def _lose(self, cause: str) -> None:
        if not self.lost.done():
            self.lost.set_result(AnswerLost(f"the connection to the gateway at {self._address} is over: {cause}"))
            self._batch.clear()
            self._writer.close()


class Outlets:
    """All of a writer's connections."""

    def __init__(self, tls: Tls | None = None) -> None:
        self._tls = tls
        self._connections: dict[tuple[str, int, str], asyncio.Task[Outlet]] = {}

    async def reach(self, destination: Destination) -> Outlet:
        """Return the connection to a destination's inbox, opening it if need be.

        Raises:
            AnswerLost: the inbox cannot be reached.
        """
        inbox = destination.host, destination.port, destination.token
        connection = self._connections.get(inbox)
        if connection is None or (connection.done() and connection.result().lost.done()):
            connection = self._connections[inbox] = asyncio.create_task(self._connect(inbox, destination))
        # Others may wait for it too: who leaves must not end it.
        return await asyncio.shield(connection)

    async def _connect(self, inbox: tuple[str, int, str], destination: Destination) -> Outlet:
        try:
            outlet = await Outlet.connect(destination, tls=self._tls)
        except BaseException:
            del self._connections[inbox]
            raise
        outlet.lost.add_done_callback(lambda _: self._forget(inbox, outlet))
        return outlet

    def _forget(self, inbox: tuple[str, int, str], outlet: Outlet) -> None:
        connection = self._connections.get(inbox)
        if connection is not None and connection.done() and connection.result() is outlet:
            del self._connections[inbox]

    async def close(self) -> None:
        """End every connection after what was put."""
        for connection in list(self._connections.values()):
            if connection.done():
                connection.result().close()
            else:
                connection.cancel()
