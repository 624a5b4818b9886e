"""Requests that no honest client sends: for the tests that let a service stand them."""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

GOOD: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 3, "seed": 1}
GOOD_CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**64),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "base",
    "\0",
    "\ud800",
    "\U0010ffff" * 100,
    "a" * 10_000,
    "{{ messages }}{% for x in range(10**9) %}x{% endfor %}",
    "../../etc/passwd",
    "<end>",
    [],
    [[]],
    [None],
    ["x"] * 5000,
    ["a" * 2000],
    [1, "two", {}],
    {},
    {"": ""},
    {"a": {"b": {"c": {}}}},
    {"\ud800": 1},
    {"weights": {"kind": 1e-300}},
    {"weights": {"\ud800": 1}},
    {"weights": {"kind": 0.5, "x" * 5000: 1}},
    {str(i): i for i in range(3000)},
]

NAMES = [
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream"),
    *(
        "stream_options",
        "guidance",
        "max_completion_tokens",
        "n",
        "logprobs",
        "caller",
        "_caller",
        "logit_bias",
        "tools",
        "best_of",
        "echo",
        "metadata",
        "user",
        "response_format",
        "frequency_penalty",
        "repetition_penalty",
        "stop_token_ids",
        "min_tokens",
        "ignore_eos",
        "top_logprobs",
    ),
    *("", "\ud800", "__class__", "x" * 3000, "a.b", "prompt\0"),
]


@dataclass(frozen=True, slots=True)
class Hostile:
    """One request, as bytes."""

    kind: str
    body: bytes
    path: str = "/v1/completions"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


REFUSALS = {400, 404, 405, 408, 413, 415, 431}
WITHOUT_A_FIELD = ("the body", "prompt", "messages", "stream_options", "max_tokens", "logprobs")
"""What a message may name where no single field is wrong."""


INSIDE = re.compile(
    rb"traceback|\bpid\b|site-packages|\.py\b|/tmp/|\b0x[0-9a-f]{6,}|\d\.\d+\.\d+\.\d+:\d", re.IGNORECASE
)
"""What tells of the service's inside: a traceback, a process, a path, an address."""


def names_what_is_wrong(request: Hostile, status: int, body: bytes) -> bool:
    """Whether an answer refuses a request as it should: by the name of what is wrong, shortly, telling no inside."""
    if status not in REFUSALS or len(body) > 10_000:
        return False
    if request.method == "HEAD":
        return True
    if INSIDE.search(body):
        return False
    error = json.loads(body)["error"]
    if status in (404, 405) and request.kind == "path":
        return True
    return error["param"] is not None or any(name in error["message"] for name in WITHOUT_A_FIELD)


def hostile_requests(seed: int) -> Iterator[Hostile]:
    """Yield requests without end, always the same for a seed."""
    chance = random.Random(seed)
    while True:
        make = chance.choice(KINDS)
        yield make(chance)


def _encode(body: Any) -> bytes:
    return json.dumps(body).encode()


def _good(chance: random.Random) -> tuple[dict[str, Any], str]:
    if chance.random() < 0.5:
        return dict(GOOD), "/v1/completions"
    return json.loads(json.dumps(GOOD_CHAT)), "/v1/chat/completions"


def _odd_fields(chance: random.Random) -> Hostile:
    body, path = _good(chance)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        body[chance.choice(NAMES)] = chance.choice(VALUES)
    return Hostile("odd fields", _encode(body), path)


def _odd_messages(chance: random.Random) -> Hostile:
    message: dict[Any, Any] = {"role": "user", "content": "hi"}
    name = chance.choice(["role", "content", "name", "tool_calls", "refusal", "audio", "\ud800"])
    message[name] = chance.choice(VALUES)
    if chance.random() < 0.3:
        message["content"] = [{"type": "text", "text": chance.choice(VALUES)} for _ in range(chance.choice([1, 50]))]
    return Hostile(
        "odd messages",
        _encode({**GOOD_CHAT, "messages": [message] * chance.choice([1, 2, 200])}),
        "/v1/chat/completions",
    )


def _missing(chance: random.Random) -> Hostile:
    body, path = _good(chance)
    del body[chance.choice(list(body))]
    return Hostile("missing field", _encode(body), path)


def _other_value(chance: random.Random) -> Hostile:
    return Hostile("other value", _encode(chance.choice(VALUES)), _good(chance)[1])


def _damaged(chance: random.Random) -> Hostile:
    body, path = _good(chance)
    data = bytearray(_encode(body))
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(data))
        if chance.random() < 0.5:
            data[place] = chance.randrange(256)
        else:
            del data[place:]
            data += chance.randbytes(1)
    return Hostile("damaged", bytes(data), path)


def _noise(chance: random.Random) -> Hostile:
    return Hostile("noise", chance.randbytes(chance.choice([1, 30, 3000])), _good(chance)[1])


def _nested(chance: random.Random) -> Hostile:
    num_levels = chance.choice([17, 900, 1100, 100_000])
    opening, closing = chance.choice([("[", "]"), ('{"a":', "}")])
    inner = opening * num_levels + ("1" if opening != "[" else "") + closing * chance.choice([num_levels, 0])
    whole = chance.choice(["%s", '{"model": "base", "prompt": %s}', '{"model": "base", "prompt": "x", "stop": %s}'])
    return Hostile("nested", (whole % inner).encode(), _good(chance)[1])


def _number(chance: random.Random) -> Hostile:
    text = chance.choice(
        ["9" * 5000, "1e999999", "-1e-999999", "0x10", "1" * 4299, "Infinity", "NaN", "1.0", "00", "1e5"]
    )
    name = chance.choice(["seed", "max_tokens", "temperature", "top_p", "top_k", "min_p"])
    return Hostile("number", f'{{"model": "base", "prompt": "hi", "max_tokens": 3, "{name}": {text}}}'.encode())


def _encoding(chance: random.Random) -> Hostile:
    text = json.dumps(GOOD)
    encodings: list[Callable[[], bytes]] = [
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-16-le"),
        lambda: text.encode("utf-32"),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.replace("hello", "h\xe9llo").encode("latin-1"),
        lambda: text.encode().replace(b"hello", b"\xed\xa0\x80"),
        lambda: text.encode().replace(b"hello", b"\xc0\xaf"),
        lambda: text.encode().replace(b"hello", b"a\nb\x01"),
        lambda: b"\0" + text.encode(),
    ]
    return Hostile("encoding", chance.choice(encodings)())


def _header(chance: random.Random) -> Hostile:
    headers = {"Content-Type": "application/json"}
    name = chance.choice(
        ["Content-Type", "Accept", "Authorization", "X-Long", "Cookie", "Content-Encoding", "X-Request-Id"]
    )
    headers[name] = chance.choice(
        ["", "text/plain", "gzip", "application/json; charset=utf-7", "x" * 40_000, "multipart/form-data"]
    )
    return Hostile("header", _encode(GOOD), headers=headers)


def _path(chance: random.Random) -> Hostile:
    path = chance.choice(
        ["/", "/v1", "/v1/completions/", "/v1/models/x", "/%00", "/..%2f..", "/v1/completions?stream=true", "/-/x"]
    )
    return Hostile(
        "path", _encode(GOOD), path, chance.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
    )


def _large(chance: random.Random) -> Hostile:
    num_bytes = chance.choice([200_000, 1_100_000, 3_000_000])
    filling = chance.choice([b" ", b"a", b"[", b'"\\', b"{}", b"\xff"])
    body = b'{"model": "base", "prompt": "' + filling * (num_bytes // len(filling)) + b'"}'
    return Hostile("large", body)


KINDS: list[Callable[[random.Random], Hostile]] = [
    *[_odd_fields] * 8,
    *[_odd_messages] * 4,
    *[_damaged] * 4,
    *[_number] * 2,
    _missing,
    _other_value,
    _noise,
    _nested,
    _encoding,
    _header,
    _path,
]
"""By how often they come."""

LARGE = _large
"""For a few of them: they are slow to send."""
