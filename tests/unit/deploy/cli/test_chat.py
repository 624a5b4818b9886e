"""A conversation in the terminal with a service that records what it is asked."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from actors.settings import CHECKOUT
from deploy.cli import chat, trimtab
from deploy.cli.chat import Refused, parse_weight

Row = dict[str, Any]


class Service(ThreadingHTTPServer):
    """Answers as the gateway does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[Row] = []
        self.keys: list[str | None] = []
        self.told: list[Row] = []
        """Events of the next stream, in place of an answer."""
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        names = [{"id": name} for name in ("base", "positive", "plain")]
        self._answer(200, {"data": names, "guides": [{"id": "positivity", "recommended_weight": 1.0}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        self.server.bodies.append(body)
        weights = body.get("guidance", {}).get("weights", {})
        if "unknown" in weights:
            self._answer(400, {"error": {"message": "guidance.weights: there is no guide 'unknown'"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        answer = ["An ", "answer to ", body["messages"][-1]["content"], ", naïve."]
        for event in self.server.told or [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in answer]:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, status: int, body: Row) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


Talk = Callable[..., tuple[int, str]]


@pytest.fixture
def talk(service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Type lines; return the exit status and what was shown, errors last."""

    def type_in(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = trimtab.main(["chat", "--url", service.url, *options])
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return type_in


def test_a_conversation_goes_on_and_is_steered(service: Service, talk: Talk) -> None:
    status, shown = talk(
        "one", "/weights positivity=0.4", "two", "/weights positivity=auto", "three", "/weights", "four"
    )
    assert status == 0
    assert "profiles: base, positive, plain; guides: positivity" in shown
    assert "An answer to one, naïve.\nprofile base, weights positivity=0.4\nAn answer to two, naïve.\n" in shown
    guidances = [body.get("guidance") for body in service.bodies]
    assert guidances == [None, {"weights": {"positivity": 0.4}}, {"weights": {"positivity": "auto"}}, None]
    assert [message["content"] for message in service.bodies[-1]["messages"]] == [
        "one",
        "An answer to one, naïve.",
        "two",
        "An answer to two, naïve.",
        "three",
        "An answer to three, naïve.",
        "four",
    ]
    assert {message["role"] for message in service.bodies[-1]["messages"][1::2]} == {"assistant"}


def test_profiles_are_taken_and_conversations_begun_anew(service: Service, talk: Talk) -> None:
    options = ("--profile", "positive", "--max-tokens", "7", "--key", "secret")
    status, shown = talk("one", "/profile plain", "/reset", "two", "/quit", "three", options=options)
    assert status == 0
    assert "profile plain" in shown
    assert [body["model"] for body in service.bodies] == ["positive", "plain"]
    assert [len(body["messages"]) for body in service.bodies] == [1, 1]
    assert {body["max_tokens"] for body in service.bodies} == {7}
    assert service.keys == ["Bearer secret"] * 2


def test_what_the_service_refuses_is_told_and_the_conversation_goes_on(service: Service, talk: Talk) -> None:
    status, shown = talk("one", "/weights unknown=1", "two", "/weights", "/profile unkind", "/wieghts", "three")
    assert status == 0
    assert "guidance.weights: there is no guide 'unknown'" in shown
    assert "there is no profile 'unkind'; profiles are base, positive, plain" in shown
    assert "no such command: /wieghts" in shown
    contents = [message["content"] for message in service.bodies[-1]["messages"]]
    assert contents == ["one", "An answer to one, naïve.", "three"]


def test_an_answer_that_breaks_off_is_told(service: Service, talk: Talk) -> None:
    service.told = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "An ans"}}]},
        {"error": {"message": "no replica of 'base' could be had in time"}},
    ]
    status, shown = talk("one")
    assert status == 0
    assert "An ans" in shown
    assert shown.endswith("no replica of 'base' could be had in time\n")


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    service: Service, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    say, said = chat._say, []

    def interrupted(text: str) -> None:
        said.append(text)
        if said[-1] == "answer to " and said.count("answer to ") == 1:
            raise KeyboardInterrupt
        say(text)

    monkeypatch.setattr(chat, "_say", interrupted)
    status, _ = talk("one", "two")
    assert status == 0
    assert [message["content"] for message in service.bodies[1]["messages"]] == ["one", "An answer to ", "two"]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1:1", "no service answers at http://127.0.0.1:1 ("),
        ("127.0.0.1:8000", "--url: '127.0.0.1:8000' is no address such as http://127.0.0.1:8000"),
    ],
)
def test_without_a_service_there_is_nothing_to_say(url: str, told: str) -> None:
    command = [sys.executable, "-m", "deploy", "chat", "--url", url]
    done = subprocess.run(command, cwd=CHECKOUT, input="", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"trimtab chat: {told}")
    assert done.stdout == ""


def test_weights_are_numbers_or_auto() -> None:
    assert parse_weight("kind=-0.5") == ("kind", -0.5)
    assert parse_weight("kind=auto") == ("kind", "auto")
    for text in ("kind", "kind=", "=1", "kind=much"):
        with pytest.raises(Refused, match=r"is no weight such as positivity=0\.4"):
            parse_weight(text)
