"""What a batch makes of its input, line by line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.jobs.batch.lines import Defaults, Line, Pending, parse_line, read_lines

PLAIN = Defaults()


def parse(request: Any, defaults: Defaults = PLAIN, number: int = 1) -> Line:
    return parse_line(json.dumps(request).encode(), number, defaults)


def test_a_line_keeps_its_fields_and_its_name() -> None:
    line = parse({"id": "a", "prompt": "Once", "weights": {"kind": 1.5}, "seed": 3, "stop": ["x"], "temperature": 0})
    assert line.id == "a"
    assert line.error is None
    assert line.fields == {"prompt": "Once", "weights": {"kind": 1.5}, "seed": 3, "stop": ["x"], "temperature": 0}


def test_a_line_without_an_id_goes_by_its_number() -> None:
    assert parse({"prompt": "Once"}, number=7).id == 7


def test_weights_may_be_spelt_as_in_http() -> None:
    as_in_http = parse({"prompt": "Once", "guidance": {"weights": {"kind": 1.5}}})
    plain = parse({"prompt": "Once", "weights": {"kind": 1.5}})
    assert (as_in_http.fields, as_in_http.digest) == (plain.fields, plain.digest)


@pytest.mark.parametrize(
    ("raw", "field", "told"),
    [
        (b"{", None, "not JSON"),
        (b"\xff", None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b'{"prompt": "\\ud800"}', None, "not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', None, "NaN"),
        (b'"x"', None, "object"),
        (b"{}", None, "prompt or messages"),
        (b'{"prompt": "x", "messages": []}', None, "prompt or messages"),
        (b'{"prompt": "x", "suffix": "y"}', "suffix", "not supported"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens", "0 tokens are no answer"),
        (b'{"prompt": "x", "seed": "1"}', "seed", "integer"),
        (b'{"prompt": "x", "id": true}', "id", "string"),
        (b'{"prompt": "x", "weights": {}, "guidance": {"weights": {}}}', None, "not both"),
        (b'{"prompt": "x", "guidance": {"weight": {}}}', "guidance.weight", "not supported"),
    ],
)
def test_a_bad_line_says_why(raw: bytes, field: str | None, told: str) -> None:
    line = parse_line(raw, 3, PLAIN)
    assert line.error is not None
    assert told in str(line.error)
    assert field is None or str(line.error.field).startswith(field)
    assert (line.number, line.id, line.fields) == (3, 3, {})


def test_a_bad_request_goes_by_its_id() -> None:
    assert parse({"id": "a", "prompt": "x", "logprobs": 1}).id == "a"


def test_defaults_fill_what_a_line_leaves_out() -> None:
    defaults = Defaults(fields={"max_tokens": 5, "temperature": 0.5}, guidance={"weights": {"kind": 1.0}})
    assert parse({"prompt": "x", "temperature": 2.0, "seed": 1}, defaults).fields == {
        "prompt": "x",
        "temperature": 2.0,
        "max_tokens": 5,
        "weights": {"kind": 1.0},
        "seed": 1,
    }


@pytest.mark.parametrize("own", [{"model": "base"}, {"weights": {}}, {"guidance": {"weights": {}}}])
def test_a_line_that_says_how_it_is_guided_takes_no_other_guidance(own: dict[str, Any]) -> None:
    fields = parse({"prompt": "x", "seed": 1, **own}, Defaults(guidance={"weights": {"kind": 1.0}})).fields
    assert fields.get("weights") in (None, {})


def test_a_line_without_a_seed_gets_its_own_and_always_the_same() -> None:
    seeds = [parse({"prompt": "x", "seed": None}, Defaults(seed=4), number).fields["seed"] for number in range(1, 50)]
    assert seeds == [parse({"prompt": "x"}, Defaults(seed=4), number).fields["seed"] for number in range(1, 50)]
    others = [parse({"prompt": "x"}, Defaults(seed=5), number).fields["seed"] for number in range(1, 50)]
    assert len({*seeds, *others}) == 98
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_the_digest_tells_requests_apart() -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": "x"},
        {"prompt": "y"},
        {"prompt": "x", "id": 2},
        {"prompt": "x", "id": "1"},
        {"prompt": "x", "seed": 1},
        {"prompt": "x", "max_tokens": 1},
    ]
    digests = [parse(request).digest for request in requests]
    digests.append(parse({"prompt": "x"}, Defaults(seed=1)).digest)
    digests.append(parse({"prompt": "x"}, Defaults(fields={"max_tokens": 2})).digest)
    assert len(set(digests)) == len(digests)
    assert digests[0] == parse_line(b'{ "prompt":"x", "id": 1 }', 1, PLAIN).digest


def test_blank_lines_count_but_are_no_requests(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n\n  \n{"prompt": "y"}')
    assert [(line.number, line.fields["prompt"]) for line in read_lines(path, PLAIN)] == [(1, "x"), (4, "y")]
    pending = Pending(read_lines(path, PLAIN))
    assert len(pending) == 2
    assert [number for number in range(-1, 7) if number in pending] == [1, 4]


@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_line_is_a_request_or_an_error(raw: bytes) -> None:
    line = parse_line(raw, 1, PLAIN)
    assert (line.error is None) == ("prompt" in line.fields or "messages" in line.fields)


def test_only_a_result_of_its_own_settles_a_line() -> None:
    one, two = parse({"prompt": "x"}, number=1), parse({"prompt": "y"}, number=2)
    pending = Pending([one, two])
    assert not pending.settle(1, two.digest)
    assert not pending.settle(9, one.digest)
    assert len(pending) == 2
    assert pending.settle(1, one.digest)
    assert 1 not in pending
    assert 2 in pending
