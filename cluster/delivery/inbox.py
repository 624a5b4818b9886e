"""The reader's end: one port, and a feed for each answer that is waited for."""

import asyncio
import itertools
import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.delivery.messages import (
    MAX_HELLO_BYTES,
    MAX_MESSAGE_BYTES,
    VERSION,
    Destination,
    Ended,
    Malformed,
    Receipt,
    frame,
    receive,
    watch_over,
)
from cluster.errors import AnswerLost, InvalidConfiguration
from cluster.tls import Tls

logger = logging.getLogger(__name__)

MISSING_S = 10.0
"""How long items may be on their way after the receipt that counts them."""


class Feed:
    """The items of one answer. Made by `Inbox.open`; has one reader."""

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self.source: asyncio.StreamWriter | None = None
        """The connection that brings the items, once it has brought one."""
        self._items: list[Any] = []
        self._num_received = 0
        self._receipt: Receipt | None = None
        self._error: Exception | None = None
        self._news = asyncio.Event()

    async def read(self) -> list[Any]:
        """Wait for items and return all there are, in order; none when the answer is over.

        Raises:
            Exception: what the receipt or `fail` gave, after the items before it.
            AnswerLost: items were lost on their way.
        """
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._receipt is not None and self._is_complete:
                if self._receipt.error is not None:
                    raise self._receipt.error
                return []
            self._news.clear()
            await self._news.wait()
        items, self._items = self._items, []
        return items

    def put(self, item: Any, source: asyncio.StreamWriter) -> None:
        """Take an item that has come; all of them come over one connection."""
        if self.source not in (None, source):
            # Serve may have called a second writer because it lost sight of the first.
            self.fail(AnswerLost("two writers answered; ask again"))
            return
        self.source = source
        self._items.append(item)
        self._num_received += 1
        self._news.set()

    def settle(self, receipt: Receipt) -> None:
        """Take the writer's last word; items that it counts may still be on their way."""
        self._receipt = receipt
        self._news.set()
        if not self._is_complete:
            missing = f"{receipt.num_items} pieces were sent and {{}} came within {MISSING_S:g} s"
            loop = asyncio.get_running_loop()
            loop.call_later(MISSING_S, lambda: self.fail(AnswerLost(missing.format(self._num_received))))

    def fail(self, error: Exception) -> None:
        """End the feed after the items that are there, unless all are."""
        if self._error is None and not self._is_complete:
            self._error = error
            self._news.set()

    @property
    def _is_complete(self) -> bool:
        return self._receipt is not None and self._num_received >= self._receipt.num_items


class Inbox:
    """Where writers bring items for any number of feeds. Lives on one event loop."""

    def __init__(self, host: str, *, handshake_s: float = 10.0, tls: Tls | None = None) -> None:
        """Describe the inbox; `start` makes it.

        host: name or address to listen on, that of the node. handshake_s: time that a writer has for its Hello.
        tls: what the inbox shows, and asks of writers.
        """
        self._host = host
        self._handshake_s = handshake_s
        self._tls = tls
        self._token = secrets.token_urlsafe(32)
        self._keys = itertools.count(1)
        self._feeds: dict[int, Feed] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen on a free port.

        Raises:
            InvalidConfiguration: the host is not an address of this machine, or a file of `tls` cannot be used.
        """
        context = None if self._tls is None else self._tls.server_context()
        handshake_s = None if context is None else self._handshake_s
        try:
            self._server = await asyncio.start_server(
                self._serve, self._host, 0, ssl=context, ssl_handshake_timeout=handshake_s
            )
        except OSError as error:
            raise InvalidConfiguration(f"cannot listen on {self._host}: {error}") from error

    async def stop(self) -> None:
        """End every connection and close the port; feeds that are not complete fail."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._connections):
                self._drop(writer, "the inbox was closed")
            await self._server.wait_closed()
            self._server = None

    @contextmanager
    def open(self) -> Iterator[Feed]:
        """A feed, for as long as the context lasts; what comes for it later is dropped."""
        assert self._server is not None, "the inbox is not started"
        host, port = self._server.sockets[0].getsockname()[:2]
        key = next(self._keys)
        feed = self._feeds[key] = Feed(Destination(host=host, port=port, token=self._token, key=key))
        try:
            yield feed
        finally:
            del self._feeds[key]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        cause = "its handling was cancelled"
        try:
            watch_over(writer)
            async with asyncio.timeout(self._handshake_s):
                self._check(await receive(reader, MAX_HELLO_BYTES))
            writer.write(frame("{}"))
            while True:
                self._take(await receive(reader, MAX_MESSAGE_BYTES), writer)
        except TimeoutError:
            cause = f"no Hello within {self._handshake_s:g} s"
        except Ended as error:
            cause = str(error)
        except Malformed as error:
            cause = str(error)
            logger.warning("ended a connection from %s: %s", writer.get_extra_info("peername"), cause)
            writer.write(frame(json.dumps({"error": cause})))
        finally:
            self._drop(writer, cause)

    def _check(self, hello: Any) -> None:
        """Raise `Malformed` unless a writer begins as it must."""
        token = hello.get("token") if isinstance(hello, dict) else None
        if not isinstance(token, str):
            raise Malformed("a connection begins with a Hello")
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            raise Malformed("the token is not this inbox's")
        if hello.get("version") != VERSION:
            raise Malformed(f"the writer speaks version {hello.get('version')} of the protocol, the inbox {VERSION}")

    def _take(self, batch: Any, source: asyncio.StreamWriter) -> None:
        """Hand items to their feeds; those of a feed that is closed are dropped."""
        try:
            for key, item in batch:
                if (feed := self._feeds.get(key)) is not None:
                    feed.put(item, source)
        except (TypeError, ValueError) as error:
            raise Malformed(f"a message that is no list of keys and items: {error}") from error

    def _drop(self, writer: asyncio.StreamWriter, cause: str) -> None:
        """End a connection, and with it the feeds that it brought items for."""
        if writer in self._connections:
            self._connections.remove(writer)
            writer.close()
            for feed in self._feeds.values():
                if feed.source is writer:
                    feed.fail(AnswerLost(f"the connection that brought the answer is over: {cause}"))
