"""Whatever arrives over HTTP: no actor crashes, refusals name what is wrong, others are served, and nothing is left."""

import http.client
import itertools
import json
import random
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

import pytest
import ray
import requests
from ray.util.state import list_actors

from tests import tiny
from tests.chaos.traces import settled
from tests.cluster.conftest import BIN, Deploy, Service, model_args, service_config
from tests.hostile import GOOD, LARGE, Hostile, hostile_requests, names_what_is_wrong

NUM_CLIENTS = 4
HANGS_S = 60


@pytest.fixture(scope="module")
def service(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> Service:
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.talkative(tiny.llama(80)), root / "base")
    kind = tiny.save(tiny.talkative(tiny.llama(80, seed=1)), root / "kind")
    guides = {"kind": model_args(kind, base=base)}
    return deploy(
        service_config(model_args(base), guides, profiles={"kinder": {"kind": 0.8}}, limits={"body_timeout_s": 3})
    )


@pytest.fixture(autouse=True)
def _nothing_is_lost_or_left(service: Service) -> Iterator[None]:
    before = replicas()
    yield
    assert requests.post(f"{service.url}/v1/completions", json=GOOD, timeout=HANGS_S).status_code == 200
    assert replicas() == before
    settled()


def replicas() -> dict[str, int]:
    """The service's actors and their processes."""
    address = ray.get_runtime_context().gcs_address
    actors = list_actors(address, filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
    return {actor.name: actor.pid for actor in actors if actor.name and "#" in actor.name}


def send(connection: http.client.HTTPConnection, request: Hostile) -> tuple[int, bytes]:
    """Send a request and return status and body; a connection that the service ended is opened again, once."""
    for is_last in (False, True):
        # It may have answered all the same: a body that is too long is not read to its end.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request(request.method, request.path, request.body, request.headers)
        try:
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (http.client.BadStatusLine, http.client.ResponseNotReady, ConnectionError):
            connection.close()
            if is_last:
                raise
    raise AssertionError


@contextmanager
def healthy_beside(service: Service) -> Iterator[list[float]]:
    """Good requests, one after the other; yields how long each took, and fails if one was answered otherwise."""
    times_s: list[float] = []
    wrong: list[str] = []
    over = threading.Event()

    def ask() -> None:
        with requests.Session() as session:
            while not over.wait(0.05):
                start = time.perf_counter()
                answer = session.post(f"{service.url}/v1/completions", json=GOOD, timeout=HANGS_S)
                times_s.append(time.perf_counter() - start)
                if answer.status_code != 200:
                    wrong.append(answer.text)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield times_s
    finally:
        over.set()
        thread.join()
    assert wrong == []


def test_hostile_requests_are_refused_by_name_and_harm_nobody(service: Service, num_hostile: int) -> None:
    wrong: list[str] = []
    kinds: Counter[tuple[str, int]] = Counter()
    chance = random.Random(0)
    numbers = itertools.islice(hostile_requests(0), num_hostile)
    todo = iter([*numbers, *(LARGE(chance) for _ in range(num_hostile // 50))])
    lock = threading.Lock()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=HANGS_S)
        while True:
            with lock:
                request = next(todo, None)
            if request is None:
                connection.close()
                return
            try:
                status, body = send(connection, request)
                problem = None if status == 200 or names_what_is_wrong(request, status, body) else "wrong"
            except Exception as error:
                connection.close()
                status, body, problem = 0, b"", repr(error)
            with lock:
                kinds[request.kind, status] += 1
                if problem:
                    wrong.append(f"{problem}: {status} {body[:300]!r} for {request.kind} {request.body[:300]!r}")

    with healthy_beside(service) as alone_s:
        time.sleep(2)
    with healthy_beside(service) as beside_s, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        for done in [pool.submit(work) for _ in range(NUM_CLIENTS)]:
            done.result()
    print(f"\n{sum(kinds.values())} hostile requests: {dict(sorted(kinds.items()))}")
    print(f"a healthy request took {1e3 * median(alone_s):.0f} ms alone, {1e3 * median(beside_s):.0f} ms beside them")
    assert wrong == [], "\n".join(wrong[:30])


def test_the_openapi_schemas_corners(service: Service, num_hostile: int, tmp_path: Path) -> None:
    command = [
        *(str(BIN / "schemathesis"), "run", f"{service.url}/openapi.json", "--no-color", "--warnings", "off"),
        *(
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ),
        *("--max-examples", str(max(5, num_hostile // 20)), "--generation-deterministic", "--no-shrink"),
        *("--phases", "examples,coverage,fuzzing", "--request-timeout", str(HANGS_S), "--continue-on-failure"),
        *("--suppress-health-check", "all"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_slow_and_half_closed_connections_hold_up_nobody(service: Service) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = json.dumps({**GOOD, "stream": True}).encode()
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as stack:
        open_ones = [stack.enter_context(socket.create_connection(("127.0.0.1", service.port))) for _ in range(60)]
        for number, connection in enumerate(open_ones):
            connection.settimeout(HANGS_S)
            match number % 6:
                case 0:
                    connection.sendall(whole[: 10 + 5 * number])
                case 1:
                    connection.sendall(whole)
                    connection.shutdown(socket.SHUT_WR)
                case 2:
                    connection.sendall(whole[:-10])
                    connection.shutdown(socket.SHUT_WR)
                case 3:
                    connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n")
                case 4:
                    connection.sendall(random.Random(number).randbytes(2000))
                case 5:
                    connection.sendall(head + b"X: y\r\n" * 20)
        with healthy_beside(service) as times_s:
            time.sleep(3)
        assert len(times_s) > 5
        incomplete = open_ones[2]
        assert incomplete.recv(100)[:12] in (b"HTTP/1.1 408", b"HTTP/1.1 400", b"")
    with healthy_beside(service):
        time.sleep(1)
