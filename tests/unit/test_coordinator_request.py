"""What a caller may ask for, and what it is told otherwise."""

from typing import Any

import pytest

from actors.coordinator.request import Generation, parse_request
from actors.prompts import Prompt
from actors.settings import GuidanceSettings
from cluster.errors import InvalidRequest, UnknownModel

GUIDANCE = GuidanceSettings(
    guides=["kind", "terse"], profiles={"kinder": {"kind": 1.5}, "both": {"terse": 1, "kind": 2}}
)
DEADLINE_S = 600.0


def parse(fields: dict[str, Any]) -> Generation:
    return parse_request(GUIDANCE, fields, DEADLINE_S)


def test_what_is_absent_takes_its_usual_meaning() -> None:
    request = parse({"prompt": "x"})
    assert request.prompt == Prompt(text="x")
    assert request.weights == {}
    assert request.max_tokens is None
    assert request.stop == ()
    assert request.timeout_s == DEADLINE_S
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)


def test_a_seed_is_chosen_where_none_is_given() -> None:
    seeds = {parse({"prompt": "x"}).sampling.seed for _ in range(5)}
    assert len(seeds) == 5
    assert parse({"prompt": "x", "seed": -3}).sampling.seed == -3


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"model": "base"}, {}),
        ({"model": "kinder"}, {"kind": 1.5}),
        ({"model": "both"}, {"kind": 2.0, "terse": 1.0}),
        ({"model": "kinder", "weights": {"terse": -1}}, {"terse": -1.0}),
        ({"model": "kinder", "weights": {}}, {}),
        ({"weights": {"kind": 0.0, "terse": 2}}, {"terse": 2.0}),
    ],
)
def test_weights_come_from_the_request_or_its_profile(fields: dict[str, Any], weights: dict[str, float]) -> None:
    chosen = parse({"prompt": "x", **fields}).weights
    assert list(chosen.items()) == list(weights.items())


@pytest.mark.parametrize("stop", ["end", ["end"]])
def test_one_stop_string_or_a_list(stop: Any) -> None:
    assert parse({"prompt": "x", "stop": stop}).stop == ("end",)


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({}, None, "either prompt or messages"),
        ({"prompt": "x", "messages": []}, None, "either prompt or messages"),
        ({"prompt": 3}, "prompt", "valid string, not 3"),
        ({"prompt": "x", "max_token": 3}, "max_token", "max_token is not supported; leave it out"),
        ({"prompt": "x", "weights": {"cruel": 1}}, "weights", "no guide 'cruel'; guides are: kind, terse"),
        ({"prompt": "x", "weights": {"kind": float("inf")}}, "weights.kind", "finite"),
        ({"prompt": "x", "weights": {"kind": 1e9}}, "weights.kind", "1000"),
        ({"prompt": "x", "weights": {"kind": "1"}}, "weights.kind", "valid number, not '1'"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature", "not nan"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens", "integer"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens", "integer, not True"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content is missing"),
        ({"prompt": "half a \ud800"}, "prompt", "valid string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content.0.text", "valid string"),
        ({"prompt": "x", "timeout": 0}, "timeout", "greater than 0, not 0"),
        ({"prompt": "x", "timeout": 600.5}, "timeout", "600.5 s is more than the limit, 600 s"),
        ({"prompt": "x", "stop": "y" * 1001}, "stop.0", "at most 1000 characters"),
    ],
)
def test_an_impossible_field_is_named_with_its_value(fields: dict[str, Any], field: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        parse(fields)
    assert caught.value.field == field
    assert len(str(caught.value)) < 250


def test_an_unknown_profile_lists_those_there_are() -> None:
    with pytest.raises(UnknownModel, match="no model 'nicer'; models are: base, both, kinder"):
        parse({"prompt": "x", "model": "nicer"})


def test_none_is_absent() -> None:
    nothing = dict.fromkeys(("weights", "max_tokens", "temperature", "top_p", "stop", "messages"))
    assert parse({**nothing, "prompt": "x", "seed": 1}) == parse({"prompt": "x", "seed": 1})


def test_a_request_may_have_a_shorter_time() -> None:
    assert parse({"prompt": "x", "timeout": 2}).timeout_s == 2
