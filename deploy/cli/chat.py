"""A conversation in the terminal: `trimtab chat`. Speaks HTTP to a service anywhere; knows nothing of Ray."""

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from actors.settings import NO_GUIDANCE
from cluster.errors import InvalidConfiguration, TrimtabError
from deploy.cli.options.chat import COMMAND, Options

CONNECT_S = 10.0
ANSWER_S = 700.0
"""Longer than the service's own deadline, which says more."""

HELP = """/weights GUIDE=W ...  steer by these weights (numbers, or auto); without any, by the profile's
/profile NAME         take another profile
/reset                begin a new conversation
/help                 these lines
/quit                 end; so does Ctrl-D. Ctrl-C ends an answer"""


class Refused(TrimtabError):
    """The service does not answer this; the conversation goes on without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """How the next answer is written."""

    profile: str
    weights: dict[str, float | str] = field(default_factory=dict)
    """In place of the profile's, where there are any."""

    def __str__(self) -> str:
        weights = ", ".join(f"{guide}={weight}" for guide, weight in self.weights.items())
        return f"profile {self.profile}" + (f", weights {weights}" if weights else "")


class Service:
    """A service's HTTP API, one connection for each request."""

    def __init__(self, url: str, key: str | None) -> None:
        """Name a service.

        Raises:
            InvalidConfiguration: the address is none.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidConfiguration(f"--url: {url!r} is no address such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._connect: Callable[..., HTTPConnection] = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._address = parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def models(self) -> dict[str, Any]:
        """Return the profiles and guides that there are."""
        with self._ask("GET", "/v1/models") as response:
            models: dict[str, Any] = json.loads(response.read())
            return models

    def answer(
        self, messages: Sequence[dict[str, str]], steering: Steering, max_tokens: int
    ) -> Generator[str, None, None]:
        """Yield an answer piece by piece; closing the iterator ends it.

        Raises:
            Refused: the service answers with an error.
        """
        body: dict[str, Any] = {
            "model": steering.profile,
            "messages": [*messages],
            "max_tokens": max_tokens,
            "stream": True,
        }
        if steering.weights:
            body["guidance"] = {"weights": steering.weights}
        with self._ask("POST", "/v1/chat/completions", body) as response:
            for line in response:
                event = line.decode().removeprefix("data:").strip()
                if not line.startswith(b"data:") or event == "[DONE]":
                    continue
                chunk = json.loads(event)
                if "error" in chunk:
                    raise Refused(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""

    @contextlib.contextmanager
    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        """The response to a request that the service takes.

        Raises:
            InvalidConfiguration: nothing answers there.
            Refused: the service answers with an error.
        """
        connection = self._connect(*self._address, timeout=CONNECT_S)
        with contextlib.closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(ANSWER_S)
                headers = {**self._headers, "Content-Type": "application/json"}
                connection.request(method, self._path + path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
            except (OSError, HTTPException) as error:
                raise InvalidConfiguration(
                    f"no service answers at {self.url} ({error}); start one with `trimtab serve`, or name another "
                    "with --url"
                ) from error
            if response.status != 200:
                raise Refused(_message(response))
            yield response


def _message(response: HTTPResponse) -> str:
    """What an answer that is an error says."""
    text = response.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status}: {text[:200].strip() or response.reason}"


class Chat:
    """A conversation, and how it is steered."""

    def __init__(self, service: Service, steering: Steering, max_tokens: int, say: Callable[[str], None]) -> None:
        self.messages: list[dict[str, str]] = []
        self.steering = steering
        self._service = service
        self._max_tokens = max_tokens
        self._say = say

    def take(self, line: str) -> bool:
        """Do what a line says: a command, or a turn of the conversation. Return whether to go on.

        Raises:
            Refused: the service does not answer it, or there is no such command; nothing has changed.
        """
        word, *rest = line.split() or [""]
        if not word:
            return True
        if not word.startswith("/"):
            self._turn(line)
        elif word == "/quit":
            return False
        elif word == "/reset":
            self.messages.clear()
        elif word == "/weights":
            self.steering = replace(self.steering, weights=dict(map(parse_weight, rest)))
            self._say(f"{self.steering}\n")
        elif word == "/profile" and len(rest) == 1:
            self._take_profile(rest[0])
        elif word == "/help":
            self._say(f"{HELP}\n")
        else:
            raise Refused(f"no such command: {line}\n{HELP}")
        return True

    def _take_profile(self, name: str) -> None:
        profiles = [model["id"] for model in self._service.models()["data"]]
        if name not in profiles:
            raise Refused(f"there is no profile {name!r}; profiles are {', '.join(profiles)}")
        self.steering = Steering(profile=name)
        self._say(f"{self.steering}\n")

    def _turn(self, text: str) -> None:
        """Ask, and show the answer as it comes. What Ctrl-C has ended counts as far as it was shown."""
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        answer = self._service.answer(asked, self.steering, self._max_tokens)
        try:
            for piece in answer:
                pieces.append(piece)
                self._say(piece)
        except KeyboardInterrupt:
            answer.close()
            self._say(" ...")
        self._say("\n")
        if pieces:
            self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def parse_weight(text: str) -> tuple[str, float | str]:
    """Return a guide and its weight out of `positivity=0.4`.

    Raises:
        Refused: it is no such pair.
    """
    guide, _, weight = text.rpartition("=")
    try:
        return _named(guide), weight if weight == "auto" else float(weight)
    except ValueError:
        raise Refused(f"{text!r} is no weight such as positivity=0.4 or positivity=auto") from None


def _named(guide: str) -> str:
    if not guide:
        raise ValueError(guide)
    return guide


def run(options: Options) -> None:
    """Talk until the user has enough.

    Raises:
        InvalidConfiguration: there is no service.
        Refused: it takes no requests of ours.
    """
    service = Service(options.url, options.key)
    models = service.models()
    chat = Chat(service, Steering(profile=NO_GUIDANCE), options.max_tokens, _say)
    _say(f"{service.url}; profiles: {', '.join(model['id'] for model in models['data'])}; guides: ")
    _say(f"{', '.join(guide['id'] for guide in models['guides']) or 'none'}; /help lists the commands\n")
    if options.profile != chat.steering.profile:
        chat.take(f"/profile {options.profile}")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its editing
    while True:
        try:
            if not chat.take(input("> " if sys.stdin.isatty() else "")):
                return
        except EOFError:
            return
        except Refused as error:
            print(error, file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, end="", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, or 2 if there is no service."""
    return COMMAND.main(arguments)
