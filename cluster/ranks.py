"""The connections between rank 0 of a sharded model and its other ranks; knows nothing of models.

Each other rank opens one TCP connection to rank 0, and shows the token that it was started with. Rank 0 sends messages,
every one to all. A connection that ends tells each side that the other is gone, whatever either is doing then.
"""

import fcntl
import hmac
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from threading import Thread, current_thread

from cluster.errors import ReplicaLost

_TOKEN_BYTES = 32
_HELLO = struct.Struct(f"!{_TOKEN_BYTES}sI")
_LENGTH = struct.Struct("!I")
_HELLO_TIMEOUT_S = 5.0

# A node that is cut off closes nothing: the kernel then finds out within ten seconds.
_PROBE_AFTER_S = 2
_PROBE_EVERY_S = 2
_NUM_PROBES = 4

_SIOCGIFADDR = 0x8915
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Leader:
    """Rank 0's end of all connections."""

    def __init__(self, host: str, num_ranks: int) -> None:
        """Listen on a free port of an address of this node.

        Args:
            host: the address.
            num_ranks: with this one.
        """
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        """What the other ranks must show."""
        self._num_ranks = num_ranks
        self._listener = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        """Where it listens."""
        self._connections: dict[int, socket.socket] = {}
        self._watch: Thread | None = None
        self._is_closed = False

    def accept(self, timeout_s: float) -> None:
        """Wait until all other ranks have come, and listen no more.

        Raises:
            ReplicaLost: some have not within that time.
        """
        deadline = time.monotonic() + timeout_s
        with self._listener:
            while len(self._connections) < self._num_ranks - 1:
                self._listener.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, self._num_ranks)) - self._connections.keys())
                    raise ReplicaLost(f"ranks {missing} have not come within {timeout_s:g} s") from None
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        connection.settimeout(_HELLO_TIMEOUT_S)
        try:
            token, rank = _HELLO.unpack(_receive(connection, _HELLO.size))
        except (OSError, EOFError):
            connection.close()
            return
        is_awaited = 0 < rank < self._num_ranks and rank not in self._connections
        if not hmac.compare_digest(token, self.token) or not is_awaited:
            connection.close()
            return
        _prepare(connection)
        self._connections[rank] = connection

    def send(self, message: bytes) -> None:
        """Send a message to all other ranks."""
        framed = _LENGTH.pack(len(message)) + message
        for connection in self._connections.values():
            connection.sendall(framed)

    def watch(self, on_loss: Callable[[int], None]) -> None:
        """Call `on_loss` with a rank that is gone, from a thread of its own."""
        connections = {connection: rank for rank, connection in self._connections.items()}

        def wait() -> None:
            gone = _wait_for_end(connections)
            if not self._is_closed:
                on_loss(connections[gone])

        self._watch = Thread(target=wait, name="ranks", daemon=True)
        self._watch.start()

    def close(self) -> None:
        """End all connections, and so the other ranks."""
        self._is_closed = True
        self._listener.close()
        _end(self._connections.values(), self._watch)


class Follower:
    """Another rank's connection to rank 0."""

    def __init__(self, address: tuple[str, int], token: bytes, rank: int, *, timeout_s: float) -> None:
        """Open it.

        Raises:
            OSError: rank 0 cannot be reached within that time.
        """
        self._watch: Thread | None = None
        self._is_closed = False
        self._connection = socket.create_connection(address, timeout=timeout_s)
        self._connection.sendall(_HELLO.pack(token, rank))
        _prepare(self._connection)

    def receive(self) -> bytes:
        """Wait for rank 0's next message.

        Raises:
            EOFError: there will be none, because rank 0 is gone; so may OSError.
        """
        (length,) = _LENGTH.unpack(_receive(self._connection, _LENGTH.size))
        return _receive(self._connection, length)

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Call `on_loss` when rank 0 is gone, from a thread of its own."""

        def wait() -> None:
            _wait_for_end([self._connection])
            if not self._is_closed:
                on_loss()

        self._watch = Thread(target=wait, name="rank 0", daemon=True)
        self._watch.start()

    def close(self) -> None:
        """End it: to rank 0 this rank is gone."""
        self._is_closed = True
        _end([self._connection], self._watch)


def interface_of(address: str) -> str | None:
    """Return the name of the network interface whose address this is; none if there is no such."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _NUM_PROBES)
    # The same where something that was sent is not acknowledged, and no probes are sent for that.
    limit_s = _PROBE_AFTER_S + _NUM_PROBES * _PROBE_EVERY_S
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * limit_s)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(num_bytes - len(parts))
        if not part:
            raise EOFError("the other side has ended the connection")
        parts += part
    return bytes(parts)


def _wait_for_end(connections: Iterable[socket.socket]) -> socket.socket:
    """Wait until one of the connections ends, and return it; reads nothing."""
    poll = select.poll()
    by_number = {connection.fileno(): connection for connection in connections}
    for number in by_number:
        poll.register(number, _GONE)
    return by_number[poll.poll()[0][0]]


def _end(connections: Collection[socket.socket], watch: Thread | None) -> None:
    for connection in connections:
        with suppress(OSError):  # it may have ended already
            connection.shutdown(socket.SHUT_RDWR)
    # Their numbers must stay their own while the other thread looks at them.
    if watch is not None and watch is not current_thread():
        watch.join()
    for connection in connections:
        connection.close()
