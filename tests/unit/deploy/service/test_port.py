"""A port that is taken is refused before anything starts, with who holds it; a service says when it is ready."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import HTTPOptionsSchema

from actors.settings import CHECKOUT
from cluster.errors import InvalidConfiguration
from deploy.service import port as ports
from deploy.service.foreground import prepare, read
from deploy.service.port import announce, check_port, url_of


@contextmanager
def listening(host: str = "127.0.0.1", *, shares: bool = False) -> Iterator[int]:
    with socket.socket() as server:
        if shares:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((host, 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("other", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_refused_though_it_could_be_shared(host: str, other: str) -> None:
    with listening(other, shares=True) as port:
        says = rf"^http_options.port: {host} port {port} is taken by process {os.getpid()} \(.*\): end it, or set"
        with pytest.raises(InvalidConfiguration, match=says):
            check_port(host, port)
    check_port(host, port)


def test_a_port_whose_connections_have_just_ended_is_free() -> None:
    with listening() as port, socket.create_connection(("127.0.0.1", port)):
        pass
    check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("other", r"by process {process} \(other -c import .*\.\.\.\): end it, or set another port"),
        (ports.PROXY, r"by a service of Ray Serve's \(ray::ProxyActor .*, process {process}\): .*`serve deploy`"),
    ],
)
def test_the_process_that_listens_is_named(command: str, says: str) -> None:
    listen = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    with subprocess.Popen(
        [command, "-c", f"{listen}; sys.stdin.read()"],
        executable=os.path.realpath(sys.executable),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with pytest.raises(InvalidConfiguration, match=says.format(process=process.pid)):
            check_port("127.0.0.1", port)
        process.communicate()


def test_where_the_process_cannot_be_seen_its_user_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_process_of", lambda _: None)
    user = ports._user(os.getuid())
    with listening() as port, pytest.raises(InvalidConfiguration, match=f"is taken by a process of {user}: end what"):
        check_port("127.0.0.1", port)


def test_where_the_system_tells_nothing_the_port_is_refused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "read_listeners", lambda: iter(()))
    with listening() as port, pytest.raises(InvalidConfiguration, match=rf"port {port} is taken: end what listens"):
        check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("192.0.2.1", r"http_options.host: 192.0.2.1 port 8000 cannot be opened: .*; set it to 127.0.0.1"),
        ("no such host", r"http_options.host: 'no such host' is no address: .*; set it to 127.0.0.1"),
    ],
)
def test_an_address_of_another_machine_is_refused(host: str, says: str) -> None:
    with pytest.raises(InvalidConfiguration, match=says):
        check_port(host, 8000)


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({"host": "127.0.0.1", "port": 8000}, "http://127.0.0.1:8000"),
        ({}, "http://127.0.0.1:8000"),
        ({"host": "::", "port": 9}, "http://[::1]:9"),
        ({"host": "10.0.0.7", "root_path": "/trimtab/"}, "http://10.0.0.7:8000/trimtab"),
        ({"ssl_keyfile": "key", "ssl_certfile": "certificate"}, "https://127.0.0.1:8000"),
    ],
)
def test_the_address_is_one_that_can_be_called(options: dict[str, object], url: str) -> None:
    assert url_of(HTTPOptionsSchema.model_validate(options)) == url


def test_it_is_said_what_a_service_waits_for_and_when_it_is_ready() -> None:
    missing = [["trimtab-base", "trimtab-guide-kind"], ["trimtab-base", "trimtab-guide-kind"], ["trimtab-base"], []]

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/health"
            names = missing.pop(0)
            self.send_response(503 if names else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"missing": names}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    said: list[str] = []
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        announce(url, said.append, poll_s=0.01)
        server.shutdown()
    assert said == ["waiting for trimtab-base, trimtab-guide-kind", "waiting for trimtab-base", f"ready at {url}"]


def write(folder: Path, **config: object) -> Path:
    file = folder / "deploy.yaml"
    file.write_text(yaml.safe_dump({"applications": [], **config}))
    return file


def test_a_port_on_other_machines_is_not_looked_at(tmp_path: Path) -> None:
    with listening() as port:
        options = {"host": "127.0.0.1", "port": port}
        file = write(tmp_path, http_options=options)
        for address in ("10.0.0.7:6379", "ray://head:10001"):
            assert prepare(read(file), {"RAY_ADDRESS": address}) is None
        assert prepare(read(write(tmp_path, http_options=options, proxy_location="Disabled")), {}) is None
        for address in ("", "auto", "local", "127.0.0.1:6379", "ray://localhost:10001"):
            with pytest.raises(InvalidConfiguration, match="is taken by"):
                prepare(read(write(tmp_path, http_options=options)), {"RAY_ADDRESS": address})
    assert prepare(read(file), {}) == f"http://127.0.0.1:{port}"


def test_the_command_starts_nothing_on_a_port_that_is_taken(tmp_path: Path) -> None:
    with listening() as port:
        file = write(tmp_path, http_options={"host": "127.0.0.1", "port": port})
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, "-m", "deploy", "serve", file],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    taken = f"http_options.port: 127.0.0.1 port {port} is taken by process {os.getpid()}"
    assert done.stderr.startswith(f"trimtab serve: {file}: {taken}")
    assert "Traceback" not in done.stderr
