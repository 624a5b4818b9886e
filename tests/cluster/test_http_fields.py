"""What fields of OpenAI's and vLLM's do to an answer, as OpenAI's own client sends them."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from deploy.client import Client
from tests import tiny
from tests.cluster.conftest import Deploy, Service, model_args, service_config
from tests.cluster.test_http import CHAT, PLAIN, post

NUM_TOKENS = 97
"""Braces among them."""

TOKENIZER = tiny.tokenizer(NUM_TOKENS)
GUIDED: dict[str, Any] = {**PLAIN, "model": "kinder"}


@pytest.fixture(scope="module")
def service(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> Service:
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.talkative(tiny.llama(NUM_TOKENS)), root / "base")
    kind = tiny.save(tiny.talkative(tiny.llama(NUM_TOKENS, seed=1)), root / "kind")
    guides = {"kind": model_args(kind, base=base)}
    return deploy(service_config(model_args(base), guides, profiles={"kinder": {"kind": 0.8}}))


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with service.openai() as client:
        yield client


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
    endless = {str(token(tiny.END_TOKEN)): -100}
    body: dict[str, Any] = {"model": "kinder", "messages": CHAT, "max_tokens": 9, "seed": 4, "logit_bias": endless}
    body["logprobs"] = True
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


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_are_those_of_their_sample_indices(client: OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {**GUIDED, "max_tokens": 20}
    python = {"prompt": PLAIN["prompt"], "seed": PLAIN["seed"], "max_tokens": 20, "model": "kinder"}
    expected = [Client().generate(**python, sample=sample)["text"] for sample in range(4)]
    assert len(set(expected)) == 4
    if stream:
        options: Any = {"include_usage": True}
        *chunks, last = client.completions.create(**fields, n=4, stream=True, stream_options=options)
        texts = [""] * 4
        for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected
        assert [chunk.choices[0].finish_reason for chunk in chunks].count("length") == 4
        usage = last.usage
    else:
        answer = client.completions.create(**fields, n=4)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 80, 89)
    assert client.completions.create(**fields).choices[0].text == expected[0]


def test_a_chat_gives_several_answers(client: OpenAI) -> None:
    body: dict[str, Any] = {"model": "kinder", "messages": CHAT, "max_tokens": 8, "seed": 4}
    whole = client.chat.completions.create(**body, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    streamed = [""] * 3
    for chunk in client.chat.completions.create(**body, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_a_request_may_have_several_prompts(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "kinder", "max_tokens": 6, "seed": 4}
    prompts = ["once upon", "a time", "x"]
    single = [client.completions.create(prompt=prompt, **fields, n=2) for prompt in prompts]
    answer = client.completions.create(prompt=prompts, **fields, n=2)
    assert [choice.text for choice in answer.choices] == [choice.text for one in single for choice in one.choices]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    ids: list[list[int]] = TOKENIZER(prompts).input_ids
    by_tokens = client.completions.create(prompt=ids, **fields, n=2)
    assert by_tokens.choices == answer.choices
    alone = client.completions.create(prompt=ids[0], **fields)
    assert alone.choices[0].text == answer.choices[0].text


def test_the_best_of_several_answers(client: OpenAI) -> None:
    fields: dict[str, Any] = {**GUIDED, "temperature": 1.5}
    written = client.completions.create(**fields, n=5, logprobs=0).choices
    logprobs: list[Any] = [choice.logprobs.token_logprobs for choice in written if choice.logprobs]
    best = sorted(range(5), key=lambda i: -fmean(logprobs[i]))
    given = client.completions.create(**fields, n=2, best_of=5)
    assert [choice.text for choice in given.choices] == [written[i].text for i in best[:2]]
    assert [choice.logprobs for choice in given.choices] == [None, None]
    assert given.usage is not None
    assert given.usage.completion_tokens == sum(map(len, logprobs))


def test_an_answer_may_begin_with_its_prompt(client: OpenAI) -> None:
    answer = text(client)
    assert text(client, echo=True) == PLAIN["prompt"] + answer
    assert text(client, echo=True, max_tokens=0) == PLAIN["prompt"]
    streamed = client.completions.create(**GUIDED, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PLAIN["prompt"] + answer
    ids: list[int] = TOKENIZER(PLAIN["prompt"]).input_ids
    assert text(client, prompt=ids, echo=True) == PLAIN["prompt"] + answer


@pytest.mark.parametrize("model", ["base", "kinder"])
def test_a_prompts_tokens_have_the_log_probabilities_that_they_have_in_answers(client: OpenAI, model: str) -> None:
    fields: dict[str, Any] = {**PLAIN, "model": model, "max_tokens": 60, "logprobs": 3}
    written = client.completions.create(**fields).choices[0]
    whole = PLAIN["prompt"] + written.text
    told = client.completions.create(**{**fields, "prompt": whole, "max_tokens": 0}, echo=True)
    choice = told.choices[0]
    assert (choice.text, choice.finish_reason) == (whole, "length")
    assert choice.logprobs is not None
    assert written.logprobs is not None
    assert choice.logprobs.tokens == list(whole)
    assert choice.logprobs.text_offset == list(range(len(whole)))
    logprobs = choice.logprobs.token_logprobs or []
    assert logprobs[0] is None
    assert (choice.logprobs.top_logprobs or [])[0] is None
    # The token that ended the text is none of the prompt's.
    expected = (written.logprobs.token_logprobs or [])[: len(written.text)]
    assert logprobs[len(PLAIN["prompt"]) :] == pytest.approx(expected, abs=1e-4)
    assert told.usage is not None
    assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (len(whole), 0)
    more = client.completions.create(**{**fields, "max_tokens": 5}, echo=True).choices[0]
    assert more.logprobs is not None
    assert more.logprobs.tokens == list(whole[: len(PLAIN["prompt"]) + 5])


def test_a_reply_is_scored_with_each_models_own(service: Service) -> None:
    body = {**GUIDED, "prompt": "it was so kind", "max_tokens": 0, "echo": True, "logprobs": 0}
    told = post(service, {**body, "guidance": {"details": True}}).json()["choices"][0]["logprobs"]
    assert (told["voices"][0], told["log_z"][0]) == (None, None)
    for logprob, voices, log_z in zip(told["token_logprobs"][1:], told["voices"][1:], told["log_z"][1:], strict=True):
        check_details({"logprob": logprob, "voices": voices, "log_z": log_z}, {"kind": 0.8})


class Person(BaseModel):
    """What a client's own model asks for."""

    name: Annotated[str, Field(max_length=6)]
    age: Annotated[int, Field(ge=0, le=99)]
    moods: Annotated[list[Literal["glad", "sad"]], Field(max_length=3)]


def test_a_client_parses_what_it_asked_for(client: OpenAI) -> None:
    for seed in range(6):
        parsed = client.chat.completions.parse(
            model="kinder", messages=CHAT, response_format=Person, max_tokens=100, seed=seed
        ).choices[0]
        assert parsed.finish_reason == "stop"
        assert isinstance(parsed.message.parsed, Person)


def test_a_form_that_the_models_have_no_tokens_for_is_refused(service: Service) -> None:
    answer = post(service, {**GUIDED, "structured_outputs": {"choice": ["yes", "漢"]}})
    assert answer.json()["choices"][0]["text"] == "yes"
    answer = post(service, {**GUIDED, "structured_outputs": {"choice": ["漢"]}})
    assert answer.status_code == 400
    assert "no token of base, kind goes on in the form that was asked for" in answer.json()["error"]["message"]


def test_any_json_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base", messages=CHAT, response_format={"type": "json_object"}, max_tokens=100, seed=4, temperature=0.2
    ).choices[0]
    content = answer.message.content or ""
    assert content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_a_pattern_and_a_grammar(service: Service, client: OpenAI, stream: bool) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({"choice": ["yes", "no", "not now"]}, "yes|no|not now"),
        ({"regex": "[a-c]{3,5}(!|[?]{2})"}, "[a-c]{3,5}(!|[?]{2})"),
        ({"grammar": 'root ::= "x" | "y" root'}, "y*x"),
    ]
    for form, pattern in asked:
        body: dict[str, Any] = {**GUIDED, "max_tokens": 60, "extra_body": {"structured_outputs": form}}
        if stream:
            chunks = list(client.completions.create(**body, stream=True))
            written, finish_reason = (
                "".join(chunk.choices[0].text for chunk in chunks),
                chunks[-1].choices[0].finish_reason,
            )
        else:
            answer = client.completions.create(**body).choices[0]
            written, finish_reason = answer.text, answer.finish_reason
        assert re.fullmatch(pattern, written)
        assert finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "The parenthesis is not closed"),
        ({"structured_outputs": {"grammar": "root ::="}}, "EBNF parser error"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "not: this",
        ),
    ],
)
def test_a_form_that_cannot_be_is_refused(service: Service, fields: dict[str, Any], says: str) -> None:
    for stream in (False, True):
        answer = post(service, {**GUIDED, **fields, "stream": stream})
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]
