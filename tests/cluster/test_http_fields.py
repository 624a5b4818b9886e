"""What fields of OpenAI's and vLLM's do to an answer, as OpenAI's own client sends them."""

import math
from typing import Any

import pytest
from openai import OpenAI

from tests import tiny
from tests.cluster.conftest import Service
from tests.cluster.test_http import CHAT, PLAIN, client, post, service

__all__ = ["client", "service"]

TOKENIZER = tiny.tokenizer(80)
GUIDED: dict[str, Any] = {**PLAIN, "model": "kinder"}


def token(text: str) -> int:
    return int(TOKENIZER.convert_tokens_to_ids(text))


def text(client: OpenAI, **fields: Any) -> str:
    return client.completions.create(**{**GUIDED, **fields}).choices[0].text


def test_a_bias_forbids_and_forces(client: OpenAI) -> None:
    assert text(client, logit_bias={str(token("q")): 100}) == "q" * 12
    plain = text(client, max_tokens=60)
    favourite = max(set(plain), key=plain.count)
    assert favourite not in text(client, max_tokens=60, logit_bias={str(token(favourite)): -100})
    answer = client.chat.completions.create(
        model="kinder", messages=CHAT, max_tokens=4, logit_bias={str(token("q")): 100}
    )
    assert answer.choices[0].message.content == "qqqq"


def test_penalties_make_greedy_text_less_repetitive(client: OpenAI) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 60}
    plain = len(set(text(client, **greedy)))
    assert len(set(text(client, **greedy, frequency_penalty=2.0))) > plain
    assert len(set(text(client, **greedy, presence_penalty=2.0))) > plain
    assert len(set(text(client, **greedy, extra_body={"repetition_penalty": 2.0}))) > plain


def test_a_token_may_end_the_text(client: OpenAI, service: Service) -> None:
    plain = text(client)
    end = token(plain[5])
    written = plain[: plain.index(plain[5])]
    answer = client.completions.create(**GUIDED, extra_body={"stop_token_ids": [end]})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (written, "stop")
    shown = post(service, {**GUIDED, "stop_token_ids": [end], "include_stop_str_in_output": True}).json()
    assert shown["choices"][0]["text"] == written + plain[5]
    by_text = post(service, {**GUIDED, "stop": plain[5], "include_stop_str_in_output": True}).json()
    assert by_text["choices"][0]["text"] == written + plain[5]


def test_nothing_ends_a_text_that_is_too_short(client: OpenAI) -> None:
    plain = text(client)
    stop: dict[str, Any] = {"stop": plain[1]}
    assert text(client, **stop) == plain[: plain.index(plain[1])]
    long = text(client, **stop, extra_body={"min_tokens": 6})
    assert long.startswith(plain[:5])
    forced = {str(token(tiny.END_TOKEN)): 100}
    assert text(client, logit_bias=forced) == ""
    assert len(text(client, logit_bias=forced, extra_body={"min_tokens": 7})) == 7


def test_the_end_token_may_be_a_token_like_any_other(client: OpenAI) -> None:
    forced = {str(token(tiny.END_TOKEN)): 100}
    answer = client.completions.create(**GUIDED, logit_bias=forced, extra_body={"ignore_eos": True})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "length")
    shown = {"ignore_eos": True, "skip_special_tokens": False}
    assert text(client, logit_bias=forced, extra_body=shown) == 12 * tiny.END_TOKEN


def check_details(entry: Any, weights: dict[str, float]) -> None:
    """Check that a token's log probability is made of the models' own."""
    guided = entry["voices"]["base"] + sum(weight * entry["voices"][name] for name, weight in weights.items())
    assert guided - entry["log_z"] == pytest.approx(entry["logprob"], abs=1e-4)


def test_a_chat_tells_log_probabilities(client: OpenAI) -> None:
    body: dict[str, Any] = {"model": "kinder", "messages": CHAT, "max_tokens": 9, "seed": 4, "logprobs": True}
    answer = client.chat.completions.create(**body, top_logprobs=3).choices[0]
    assert answer.logprobs is not None
    assert answer.logprobs.content is not None
    assert "".join(entry.token for entry in answer.logprobs.content) == answer.message.content
    for entry in answer.logprobs.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        best = [score.logprob for score in entry.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert entry.logprob <= best[0] <= 0
    chunks = list(client.chat.completions.create(**body, top_logprobs=3, stream=True))
    streamed = [entry for chunk in chunks for entry in (chunk.choices[0].logprobs or answer.logprobs).content or []]
    assert streamed == answer.logprobs.content
    bare = client.chat.completions.create(**body).choices[0].logprobs
    assert bare is not None
    assert [entry.top_logprobs for entry in bare.content or []] == [[]] * 9


def test_details_tell_each_models_own(service: Service) -> None:
    body = {"model": "base", "messages": CHAT, "max_tokens": 5, "seed": 4, "logprobs": True, "top_logprobs": 2}
    weights = {"kind": -0.7}
    guided = {**body, "guidance": {"weights": weights, "details": True}}
    for entry in post(service, guided, "chat/completions").json()["choices"][0]["logprobs"]["content"]:
        check_details(entry, weights)
        for score in entry["top_logprobs"]:
            check_details({**score, "log_z": entry["log_z"]}, weights)
    alone = {**body, "guidance": {"details": True}}
    for entry in post(service, alone, "chat/completions").json()["choices"][0]["logprobs"]["content"]:
        assert entry["voices"] == {"base": pytest.approx(entry["logprob"], abs=1e-4)}
    told = post(service, {**GUIDED, "logprobs": 2, "guidance": {"details": True}}).json()["choices"][0]["logprobs"]
    for log_z, logprob, voices in zip(told["log_z"], told["token_logprobs"], told["voices"], strict=True):
        check_details({"logprob": logprob, "voices": voices, "log_z": log_z}, {"kind": 0.8})
    assert [set(tokens) for tokens in told["top_voices"]] == [set(tokens) for tokens in told["top_logprobs"]]


def test_a_completion_tells_log_probabilities(client: OpenAI) -> None:
    answer = client.completions.create(**GUIDED, logprobs=2).choices[0]
    told = answer.logprobs
    assert told is not None
    assert "".join(told.tokens or []) == answer.text
    assert told.text_offset == list(range(12))
    for token, logprob, top in zip(told.tokens or [], told.token_logprobs or [], told.top_logprobs or [], strict=True):
        assert top[token] == logprob
        assert len(top) in (2, 3)
    pieces = [chunk.choices[0] for chunk in client.completions.create(**GUIDED, logprobs=2, stream=True)]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for piece in pieces for value in getattr(piece.logprobs, field)] == getattr(told, field)


def test_log_probabilities_are_of_the_text_without_penalties(client: OpenAI) -> None:
    plain = client.completions.create(**GUIDED, logprobs=0).choices[0].logprobs
    forced = client.completions.create(
        **{**GUIDED, "max_tokens": 1}, logprobs=20, logit_bias={str(token("q")): 100}, temperature=0.3
    ).choices[0]
    assert plain is not None
    assert forced.logprobs is not None
    assert forced.text == "q"
    top = (forced.logprobs.top_logprobs or [])[0]
    assert sum(math.exp(logprob) for logprob in top.values()) < 1.0001
    assert top["q"] < 0
    first = (plain.tokens or [])[0]
    assert first not in top or top[first] == pytest.approx((plain.token_logprobs or [])[0], abs=1e-4)
