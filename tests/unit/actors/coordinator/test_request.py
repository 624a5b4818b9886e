"""What a caller may ask for, and what it is told otherwise."""

from typing import Any

import pytest

from actors.coordinator.request import Generation, parse_request
from actors.prompts import Prompt
from actors.settings import GuidanceSettings, parse_guidance
from cluster.errors import InvalidConfiguration, InvalidRequest, UnknownModel

GUIDANCE = parse_guidance(
    {"guides": ["kind", "terse"], "profiles": {"kinder": {"kind": 1.5}, "both": {"terse": 1, "kind": 2}}}
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
        ({"prompt": [3, "x"]}, "prompt.1", "valid integer, not 'x'"),
        ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "0 tokens are no answer"),
        ({"messages": [], "echo": True}, "echo", "goes with a prompt"),
        ({"prompt": "x", "details": True}, "details", "only goes with logprobs"),
        ({"prompt": "x", "sample": 128}, "sample", "less than 128"),
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
        ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias.x.[key]", "valid integer"),
        ({"prompt": "x", "logit_bias": {"01": 1}}, "logit_bias.01.[key]", "valid integer"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100, not 101"),
        ({"prompt": "x", "frequency_penalty": -2.1}, "frequency_penalty", "greater than or equal to -2"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids.0", "greater than or equal to 0"),
        ({"prompt": "x", "min_tokens": 9, "max_tokens": 8}, "min_tokens", "9 is more than max_tokens, 8"),
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


def test_what_is_not_asked_for_changes_no_logits() -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {}}
    for fields in ({}, neutral, {"min_tokens": 0, "logit_bias": {"3": None}}):
        assert parse({"prompt": "x", **fields}).shaping.is_none


def test_a_prompt_may_be_tokens() -> None:
    assert parse({"prompt": [3, 4.0]}).prompt == Prompt(tokens=[3, 4])


def test_biases_are_by_token_id() -> None:
    assert parse({"prompt": "x", "logit_bias": {"17": -100, 4: 0.5}}).shaping.logit_bias == {17: -100, 4: 0.5}


def test_whole_floats_are_integers() -> None:
    request = parse({"prompt": "x", "max_tokens": 16.0, "seed": 3.0, "top_k": 5.0})
    assert (request.max_tokens, request.sampling.seed, request.sampling.top_k) == (16, 3, 5)


def test_a_message_may_bring_what_an_answer_has() -> None:
    extras: dict[str, Any] = {"refusal": None, "annotations": [], "audio": None, "function_call": {}, "tool_calls": []}
    messages = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "ho", **extras}]
    assert parse({"messages": messages}).prompt.messages == [
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": "ho"},
    ]
    with pytest.raises(InvalidRequest, match=r"messages\.0\.tool_calls is not supported"):
        parse({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]})


def test_none_is_absent() -> None:
    nothing = dict.fromkeys(("weights", "max_tokens", "temperature", "top_p", "stop", "messages"))
    assert parse({**nothing, "prompt": "x", "seed": 1}) == parse({"prompt": "x", "seed": 1})
    assert parse({"prompt": "x", "weights": {"kind": None, "terse": 1}}).weights == {"terse": 1}


def test_a_request_may_have_a_shorter_time() -> None:
    assert parse({"prompt": "x", "timeout": 2}).timeout_s == 2


def test_a_profile_may_say_how_to_sample_and_leave_the_weight_to_the_guide() -> None:
    guidance = GuidanceSettings.model_validate(
        {
            "guides": ["kind", "terse"],
            "profiles": {
                "kinder": {"weights": {"kind": "auto", "terse": 0.5}, "sampling": {"temperature": 0.7, "top_p": 0.9}},
                "short": {"sampling": {"max_tokens": 5}},
                "plain": {"kind": 1.5},
            },
        }
    )

    def parsed(**fields: Any) -> Generation:
        return parse_request(guidance, {"prompt": "x", "seed": 1, **fields}, 60)

    kinder = parsed(model="kinder")
    assert kinder.weights == {"kind": None, "terse": 0.5}
    assert (kinder.sampling.temperature, kinder.sampling.top_p, kinder.max_tokens) == (0.7, 0.9, None)
    other = parsed(model="kinder", temperature=0, weights={"kind": 2, "terse": "auto"}, top_p=None)
    assert other.weights == {"kind": 2.0, "terse": None}
    assert (other.sampling.temperature, other.sampling.top_p) == (0, 0.9), "what a request says comes first"
    assert (parsed(model="short").weights, parsed(model="short").max_tokens) == ({}, 5)
    assert (parsed(model="plain").weights, parsed(model="plain").sampling.temperature) == ({"kind": 1.5}, 1.0)
    with pytest.raises(InvalidRequest, match=r"weights\.kind"):
        parsed(weights={"kind": "much"})


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"weights": {"kind": 1}, "sampling": {"temperatur": 1}}, "temperatur"),
        ({"weights": {"kind": 1}, "sampling": {"top_p": 0}}, "top_p"),
        ({"weights": {"joy": 1}}, "there is no guide 'joy'"),
        ({"kind": "most"}, "profiles.x.weights.kind"),
    ],
)
def test_an_impossible_profile_is_refused(profile: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfiguration, match=says):
        parse_guidance({"guides": ["kind"], "profiles": {"x": profile}})
