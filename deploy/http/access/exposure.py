"""Who can reach the HTTP port: the address that is really bound, whatever a file says.

Serve's controller knows the host that its proxies were told: all interfaces in a file that names none, and a later
`serve deploy` does not change it. The sockets that listen on this node are the last word (Linux; elsewhere the
controller's is).
"""

import ipaddress
import os
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTENING = "0A"


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that listens for TCP connections on this node."""

    address: str
    port: int
    inode: int
    user: int
    """The number of the user to whom it belongs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where HTTP is served."""

    host: str
    """What Serve's proxies were told to bind."""

    port: int
    """Theirs."""

    direct: range = range(0)
    """Those out of which a gateway opens one of its own."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def public_address(ports: Ports) -> str | None:
    """Return an address at which others can reach the HTTP port; none if only this machine can."""
    if not is_loopback(ports.host):
        return f"{ports.host} port {ports.port}"
    listeners = list(read_listeners())
    own = _own_sockets() if ports.direct else frozenset()
    for listener in listeners:
        is_http = listener.port == ports.port or (listener.port in ports.direct and listener.inode in own)
        if is_http and not is_loopback(listener.address):
            return f"{listener.address} port {listener.port}"
    return None


def read_listeners(tables: tuple[Path, ...] = TABLES) -> Iterator[Listener]:
    """Yield the listening sockets of this node; none where the system does not tell."""
    for table in tables:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTENING:
                address, port = fields[1].split(":")
                yield Listener(_decode(address), int(port, 16), inode=int(fields[9]), user=int(fields[7]))


def _decode(address: str) -> str:
    """An address as the kernel prints it: words of four bytes, each in the machine's own order."""
    words = [struct.pack("=I", int(address[start : start + 8], 16)) for start in range(0, len(address), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _own_sockets() -> Container[int]:
    """The inodes of this process's sockets."""
    inodes = set()
    for entry in os.scandir("/proc/self/fd"):
        try:
            target = os.readlink(entry.path)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes
