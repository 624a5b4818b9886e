"""What fields of OpenAI's and vLLM's do to an answer, as OpenAI's own client sends them."""

from typing import Any

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
