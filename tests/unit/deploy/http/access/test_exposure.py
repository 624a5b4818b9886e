"""Whether others can reach the HTTP port, by the sockets that really listen."""

import socket
from pathlib import Path

import pytest

from deploy.http.access.exposure import Ports, is_loopback, public_address, read_listeners


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("10.1.2.3", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def listening(host: str, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    server = socket.socket(family)
    server.bind((host, 0))
    server.listen()
    return server


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_listening_socket_is_seen_with_its_address(host: str) -> None:
    with listening(host) as server:
        port = server.getsockname()[1]
        assert [listener.address for listener in read_listeners() if listener.port == port] == [host]
    assert [listener for listener in read_listeners() if listener.port == port] == []


def test_addresses_of_version_6_are_read() -> None:
    try:
        server = listening("::1", socket.AF_INET6)
    except OSError:
        pytest.skip("there is no IPv6 here")
    with server:
        port = server.getsockname()[1]
        assert [listener.address for listener in read_listeners() if listener.port == port] == ["::1"]


def test_what_is_bound_counts_and_not_what_was_said() -> None:
    with listening("0.0.0.0") as public, listening("127.0.0.1") as private:
        public_port, private_port = public.getsockname()[1], private.getsockname()[1]
        assert public_address(Ports(host="127.0.0.1", port=public_port)) == f"0.0.0.0 port {public_port}"
        assert public_address(Ports(host="127.0.0.1", port=private_port)) is None
        assert public_address(Ports(host="0.0.0.0", port=private_port)) == f"0.0.0.0 port {private_port}"


def test_a_port_of_the_gateways_own_counts_too() -> None:
    with listening("0.0.0.0") as direct:
        port = direct.getsockname()[1]
        ports = Ports(host="127.0.0.1", port=1, direct=range(port, port + 1))
        assert public_address(ports) == f"0.0.0.0 port {port}"


def test_a_system_that_does_not_tell_is_taken_at_its_word(tmp_path: Path) -> None:
    assert list(read_listeners((tmp_path / "tcp",))) == []
