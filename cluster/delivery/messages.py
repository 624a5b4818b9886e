"""What the two ends of a connection say to each other, as values and as bytes, and the connection's settings."""

import asyncio
import json
import socket
from dataclasses import dataclass, field
from typing import Any

VERSION = 1
LENGTH_BYTES = 4
MAX_HELLO_BYTES = 4096
"""Of the first message each way, before the other end is known."""

MAX_MESSAGE_BYTES = 64 * 2**20
"""Of any other; one that is longer ends its connection."""

SILENCE_S = 20
"""Time within which a node that has vanished is found; a process that dies is found at once."""


class Malformed(Exception):
    """A message of the other end breaks the protocol; its connection cannot go on."""


class Ended(Exception):
    """The connection is over; the message says how it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where the items of one answer go."""

    host: str
    port: int
    token: str = field(repr=False)
    key: int
    """Of the feed, unique within its inbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a writer says of an answer in the end."""

    num_items: int
    """How many it has put."""

    error: Exception | None = None
    """What ended the answer after them, if it did not end well."""


def frame(body: str) -> bytes:
    """Return a message with its length before it."""
    data = body.encode()
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


async def receive(reader: asyncio.StreamReader, max_bytes: int) -> Any:
    """Return the next message.

    Raises:
        Ended: there is none.
        Malformed: it is too long, or not JSON.
    """
    try:
        num_bytes = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        if num_bytes > max_bytes:
            raise Malformed(f"a message of {num_bytes:,} bytes; it may have {max_bytes:,}")
        data = await reader.readexactly(num_bytes)
    except asyncio.IncompleteReadError as error:
        raise Ended("the other end closed the connection") from error
    except OSError as error:
        raise Ended(f"the connection broke: {error}") from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"a message that is not JSON: {error}") from error


def watch_over(writer: asyncio.StreamWriter) -> None:
    """Have the system find out when the other end's node is gone."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": SILENCE_S // 4, "TCP_KEEPINTVL": SILENCE_S // 4, "TCP_KEEPCNT": 3}
    options["TCP_USER_TIMEOUT"] = 1000 * SILENCE_S
    for name, value in options.items():
        # Not every system has each of them.
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
