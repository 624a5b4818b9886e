"""What `make chaos` believes: that it does every fault, and that it sees an answer that failed."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from tests.chaos.faults import DRAINED, make_plan
from tests.chaos.load import Answer, Load, make_asks, send

STREAM, WHOLE = make_asks(2, seed=1)
END: dict[str, Any] = {"text": "b", "finish_reason": "length"}
USAGE = {"completion_tokens": 2}


@contextmanager
def serving(body: bytes, status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        running = threading.Thread(target=server.serve_forever)
        running.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            running.join()


def events(*chunks: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def answer_to(body: bytes, ask: Any = STREAM, status: int = 200) -> Answer:
    with serving(body, status) as url:
        return send(url, ask)


def test_every_fault_is_planned_before_any_comes_again() -> None:
    plan = make_plan(26, seed=3)
    assert sorted(plan[:13]) == sorted(plan[13:])
    assert len(set(plan)) == 13
    assert {role for _, role in plan} == {*DRAINED, "gateway"}
    assert make_plan(26, seed=4) != plan == make_plan(26, seed=3)


def test_answers_are_read_streamed_or_whole() -> None:
    first = {"choices": [{"text": "a", "finish_reason": None}]}
    streamed = answer_to(events(first, {"choices": [END]}, {"choices": [], "usage": USAGE}))
    assert (streamed.text, streamed.finish_reason, streamed.num_tokens, streamed.error) == ("ab", "length", 2, None)
    assert len(list(streamed.pauses)) == 4
    whole = answer_to(json.dumps({"choices": [{**END, "text": "ab"}], "usage": USAGE}).encode(), WHOLE)
    assert (whole.text, whole.num_tokens, whole.error) == ("ab", 2, None)


def test_an_answer_that_ends_early_or_in_an_error_has_failed() -> None:
    first = {"choices": [{"text": "a", "finish_reason": None}]}
    assert "ended before" in str(answer_to(events(first)).error)
    assert "no place" in str(answer_to(events(first, {"error": {"message": "no place"}})).error)
    assert "503" in str(answer_to(b"{}", status=503).error)


def test_a_load_that_is_abandoned_ends() -> None:
    with serving(events({"choices": [END]}, {"choices": [], "usage": USAGE})) as url:
        load = Load(url, [STREAM] * 1000, num_clients=2)
        load.abandon()
        assert len(load.finish()) < 1000
