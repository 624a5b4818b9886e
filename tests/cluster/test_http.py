"""The HTTP API as OpenAI's own client and curl use it."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
import requests
from openai import OpenAI

from actors.calibration import FILE, Calibration, Point
from tests import tiny
from tests.cluster.conftest import Deploy, Service, model_args, service_config

PLAIN: dict[str, Any] = {"model": "base", "prompt": "once upon", "max_tokens": 12, "seed": 4}
CHAT: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def service(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> Service:
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(tiny.talkative(tiny.llama(80)), root / "base")
    kind = tiny.save(tiny.talkative(tiny.llama(80, seed=1)), root / "kind")
    point = Point(
        weight=0, num_answers=8, divergence=0, ended=1, distinct_2=1, distinct_2_error=0, longest_repeat=0, num_tokens=9
    )
    calibration = Calibration(
        base="base", temperature=1, top_p=1, max_tokens=9, reward=None, weight=0.8, is_sound=True, points=[point]
    )
    (root / "kind" / FILE).write_text(calibration.model_dump_json())
    silent = tiny.tokenizer(80)
    silent.chat_template = None
    wordless = tiny.save(tiny.llama(80, seed=2), root / "wordless", with_tokenizer=silent)
    guides = {"kind": model_args(kind, base=base), "wordless": model_args(wordless, base=base)}
    profiles: dict[str, Any] = {
        "kinder": {"kind": 0.8},
        "kindest": {"weights": {"kind": "auto"}, "sampling": {"temperature": 0.5, "max_tokens": 3}},
    }
    return deploy(service_config(model_args(base), guides, profiles=profiles))


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with service.openai() as client:
        yield client


def post(service: Service, body: Any, endpoint: str = "completions") -> requests.Response:
    data = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    return requests.post(f"{service.url}/v1/{endpoint}", data=data, headers=headers, timeout=120)


def test_profiles_are_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "kinder", "kindest"]


def test_models_say_what_they_are_and_which_weight_each_guide_bears(service: Service) -> None:
    listed = requests.get(f"{service.url}/v1/models", timeout=60).json()
    assert listed["guides"] == [
        {"id": "kind", "recommended_weight": 0.8},
        {"id": "wordless", "recommended_weight": None},
    ]
    assert {model["max_model_len"] for model in listed["data"]} == {128}
    guidance = {model["id"]: model["guidance"] for model in listed["data"]}
    assert guidance == {
        "base": {"weights": {}, "sampling": {}},
        "kinder": {"weights": {"kind": 0.8}, "sampling": {}},
        "kindest": {"weights": {"kind": "auto"}, "sampling": {"temperature": 0.5, "max_tokens": 3}},
    }


def test_a_weight_may_be_left_to_the_guide(service: Service) -> None:
    def text(model: str, **fields: Any) -> Any:
        answer = post(service, {**PLAIN, "model": model, **fields}).json()
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    assert text("base", guidance={"weights": {"kind": "auto"}}) == text("kinder")
    short = {name: value for name, value in PLAIN.items() if name != "max_tokens"} | {"model": "kindest"}
    answer = post(service, short).json()
    assert (answer["choices"][0]["text"], 3) == text("kinder", temperature=0.5, max_tokens=3)
    refused = post(service, {**PLAIN, "guidance": {"weights": {"wordless": "auto"}}})
    assert refused.status_code == 400
    assert "weights.wordless: 'auto' needs a guide that was calibrated" in refused.json()["error"]["message"]


def test_a_model_can_be_looked_up(client: OpenAI) -> None:
    assert client.models.retrieve("kinder").model_dump(exclude={"shutdown_date"}) == {
        **{"id": "kinder", "object": "model", "created": 0, "owned_by": "trimtab", "max_model_len": 128},
        "guidance": {"weights": {"kind": 0.8}, "sampling": {}},
    }
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'; models are: base, kinder, kindest") as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_health_is_ready(service: Service) -> None:
    answer = requests.get(f"{service.url}/health", timeout=60)
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    answer = requests.head(f"{service.url}/health", timeout=60)
    assert (answer.status_code, answer.content) == (200, b"")


def test_the_service_says_its_version(service: Service) -> None:
    assert requests.get(f"{service.url}/version", timeout=60).json() == {"version": metadata.version("trimtab")}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/chat/completions", "there is no path /chat/completions; use /v1/chat/completions"),
        ("/v1/v1/completions", "there is no path /v1/v1/completions; use /v1/completions"),
        ("/v1/completions/", "there is no path /v1/completions/; use /v1/completions"),
        ("/v1/embeddings", "there is no path /v1/embeddings; /openapi.json lists those there are"),
    ],
)
def test_a_path_that_is_not_there_names_the_right_one(service: Service, path: str, says: str) -> None:
    answer = requests.post(f"{service.url}{path}", json=PLAIN, timeout=60)
    assert answer.status_code == 404
    assert says in answer.json()["error"]["message"]


NEUTRAL: dict[str, Any] = {
    **{"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}},
    **{"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"},
    **{"prompt_cache_key": "k", "ignore_eos": False, "stop": None, "timeout": None, "top_k": None, "stream": None},
}


def test_fields_that_change_nothing_are_taken(service: Service) -> None:
    expected = post(service, {**PLAIN, "max_tokens": 8}).json()["choices"]
    own = {"best_of": 1, "echo": False, "logprobs": None, "max_tokens": 8.0, "seed": 4.0, "guidance": None}
    assert post(service, {**PLAIN, **NEUTRAL, **own}).json()["choices"] == expected
    nulls = {"guidance": {"weights": {"kind": None}}, "stream_options": {"include_usage": None}, "stream": True}
    answer = post(service, {**PLAIN, **NEUTRAL, **own, **nulls})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected[0]["text"]


def test_chat_fields_that_change_nothing_are_taken(service: Service, client: OpenAI) -> None:
    body: dict[str, Any] = {"model": "base", "messages": CHAT, "max_tokens": 8, "seed": 4}
    first = client.chat.completions.create(**body).choices[0].message
    history: list[Any] = [*CHAT, first.model_dump(), {"role": "user", "content": "more"}]
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in history]
    expected = post(service, {**body, "messages": plain}, "chat/completions").json()["choices"]
    own: dict[str, Any] = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False}
    answer = post(service, {**body, **NEUTRAL, **own, "messages": history}, "chat/completions")
    assert answer.json()["choices"] == expected


def test_errors_have_openais_codes(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**PLAIN, "max_tokens": 500})
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**PLAIN, "prompt": "x" * 128, "model": "kinder"})
    assert caught.value.code == "context_length_exceeded"


def test_prometheus_finds_the_figures_of_every_part(service: Service, client: OpenAI) -> None:
    client.completions.create(**{**PLAIN, "model": "kinder"})
    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    wanted = {
        *((name, "Coordinator") for name in ("requests_total", "output_tokens_total", "first_token_seconds_count")),
        *((name, "Coordinator") for name in ("live_sequences", "steps_total", "step_seconds_total")),
        *(("passes_total", name) for name in ("BaseModel", "Guide")),
        *(("cache_use", name) for name in ("BaseModel", "Guide")),
    }
    deadline = time.monotonic() + 120
    # Replicas report when Serve asks for their health, and Ray collects every few seconds.
    while True:
        lines = requests.get(url, timeout=30).text.splitlines()
        found = {
            (name, deployment)
            for name, deployment in wanted
            if any(line.startswith(f"ray_trimtab_{name}{{") and f'deployment="{deployment}"' in line for line in lines)
        }
        if found == wanted:
            return
        assert time.monotonic() < deadline, wanted - found
        time.sleep(1)


def test_a_completion_has_its_parts(client: OpenAI) -> None:
    answer = client.completions.create(**PLAIN)
    assert answer.object == "text_completion"
    assert answer.model == "base"
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].text) == 12
    assert answer.usage is not None
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 9,
        "completion_tokens": 12,
        "total_tokens": 21,
    }


def test_a_chat_completion_has_its_parts(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="kinder", messages=CHAT, max_completion_tokens=5, seed=1)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].message.content or "") == 5


def test_content_may_come_in_text_parts(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="base", messages=CHAT, max_tokens=8, seed=1)
    parts: list[Any] = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    in_parts = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": parts}], max_tokens=8, seed=1
    )
    assert in_parts.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("model", ["base", "kinder"])
def test_a_stream_gives_the_same_text_as_a_whole_answer(client: OpenAI, model: str) -> None:
    settings = {**PLAIN, "model": model}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_many_streams_at_once_lose_and_mix_up_nothing(client: OpenAI) -> None:
    def whole(seed: int) -> str:
        return client.completions.create(**{**PLAIN, "model": "kinder", "seed": seed, "max_tokens": 60}).choices[0].text

    def streamed(seed: int) -> str:
        settings = {**PLAIN, "model": "kinder", "seed": seed, "max_tokens": 60}
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True))

    with ThreadPoolExecutor(24) as pool:
        expected = list(pool.map(whole, range(24)))
        assert list(pool.map(streamed, [*range(24), *range(24)])) == expected * 2
    assert len(set(expected)) == 24


def test_a_chat_stream_names_its_role_once_and_ends(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="kinder", messages=CHAT, max_tokens=6, seed=1, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert len("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == 6
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_profile_is_its_weights_and_weights_replace_it(client: OpenAI) -> None:
    def text(model: str, **body: Any) -> str:
        return client.completions.create(**{**PLAIN, "model": model}, extra_body=body).choices[0].text

    assert text("kinder") == text("base", guidance={"weights": {"kind": 0.8}})
    assert text("kinder", guidance={"weights": {}}) == text("base")
    assert text("kinder") != text("base")


def test_sampling_fields_reach_the_draw(client: OpenAI) -> None:
    greedy = client.completions.create(**{**PLAIN, "temperature": 0}).choices[0].text
    for settings in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-9}, {"extra_body": {"min_p": 1.0}}):
        assert client.completions.create(**PLAIN, **settings).choices[0].text == greedy
    assert client.completions.create(**PLAIN, temperature=5.0).choices[0].text != greedy


def test_a_request_without_a_seed_is_told_the_one_it_got(service: Service) -> None:
    body = {key: value for key, value in PLAIN.items() if key != "seed"}
    first, second = (post(service, body).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = post(service, {**body, "seed": first["seed"]}).json()
    assert again["choices"] == first["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: OpenAI, stream: bool) -> None:
    settings = {**PLAIN, "max_tokens": 60}
    text = client.completions.create(**settings).choices[0].text
    stop = text[7:10]
    cut = text[: text.index(stop)]
    if stream:
        chunks = list(client.completions.create(**settings, stop=[stop, "never there"], stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == cut
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        answer = client.completions.create(**settings, stop=stop)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")


def test_the_end_token_ends_the_text(service: Service) -> None:
    with ThreadPoolExecutor(16) as pool:
        bodies = [{**PLAIN, "seed": seed, "temperature": 4.0, "max_tokens": 110} for seed in range(24)]
        answers = [answer.json() for answer in pool.map(lambda body: post(service, body), bodies)]
    ended = [answer for answer in answers if answer["choices"][0]["finish_reason"] == "stop"]
    assert ended
    for answer in ended:
        assert tiny.END_TOKEN not in answer["choices"][0]["text"]
        assert answer["usage"]["completion_tokens"] < 110


def test_without_max_tokens_an_answer_goes_on_to_the_context_limit(service: Service) -> None:
    answer = post(service, {"model": "base", "messages": CHAT, "temperature": 0}, "chat/completions").json()
    assert answer["usage"]["total_tokens"] == 128 or answer["choices"][0]["finish_reason"] == "stop"


def test_a_completion_without_max_tokens_has_openais_16(service: Service) -> None:
    answer = post(service, {"model": "base", "prompt": "ab", "temperature": 0}).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (16, "length")


@pytest.mark.parametrize(
    ("body", "status", "field", "says"),
    [
        ({"n": 0}, 400, "n", "greater than or equal to 1, not 0"),
        ({"n": 129}, 400, "n", "less than or equal to 128"),
        ({"n": 3, "prompt": ["a"] * 100}, 400, "n", "100 prompts with 3 answers each are 300 answers"),
        ({"n": 3, "best_of": 2}, 400, "best_of", "2 is less than n, 3"),
        ({"logprobs": 21}, 400, "logprobs", "less than or equal to 20, not 21"),
        ({"guidance": {"details": True}}, 400, "guidance.details", "guidance.details only goes with logprobs"),
        ({"presence_penalty": 2.5}, 400, "presence_penalty", "less than or equal to 2, not 2.5"),
        ({"logit_bias": {"80": 1}}, 400, "logit_bias", "the base has no token 80; its ids go up to 79"),
        ({"stop_token_ids": [80]}, 400, "stop_token_ids", "the base has no token 80"),
        ({"min_tokens": 13}, 400, "min_tokens", "13 is more than max_tokens, 12"),
        ({"guidance": {"weights": {"kind": 1}, "beta": 1}}, 400, "guidance.beta", "not supported"),
        (
            {"guidance": {"weights": {"cruel": 1}}},
            400,
            "guidance.weights",
            "no guide 'cruel'; guides are: kind, wordless",
        ),
        ({"guidance": {"weights": {"kind": 1e999}}}, 400, "guidance.weights.kind", "finite number, not inf"),
        ({"guidance": {"weights": {"kind": float("nan")}}}, 400, "guidance.weights.kind", "finite number, not nan"),
        ({"guidance": {"weights": {"kind": 5000}}}, 400, "guidance.weights.kind", "1000"),
        ({"guidance": {"weights": {"kind": "much"}}}, 400, "guidance.weights.kind", "valid number, not 'much'"),
        ({"model": "cruel"}, 404, "model", "no model 'cruel'; models are: base, kinder"),
        ({"model": None}, 400, "model", "model is missing"),
        ({"model": 3}, 400, "model", "valid string, not 3"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": []}, 400, "prompt", "at least 1 item"),
        ({"prompt": ["a", 3]}, 400, "prompt.1", "valid string, not 3"),
        ({"prompt": {"a": 1}}, 400, "prompt.0", "valid string"),
        ({"prompt": [[]]}, 400, "prompt", "prompt is empty"),
        ({"prompt": [1, "a"]}, 400, "prompt.0.1", "valid integer, not 'a'"),
        ({"prompt": [1, 80]}, 400, "prompt", "id 80, and the model was made with 80 tokens"),
        ({"suffix": "x"}, 400, "suffix", "not supported"),
        ({"prompt": "x" * 128}, 400, "prompt", "128 tokens, but the context limit is 128"),
        ({"prompt": "x" * 28, "max_tokens": 101}, 400, "max_tokens", "28 prompt tokens and 101 new ones"),
        ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0, not -1"),
        ({"max_tokens": 0}, 400, "max_tokens", "0 tokens are no answer"),
        ({"temperature": -0.1}, 400, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"top_k": -2}, 400, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.5}, 400, "min_p", "less than or equal to 1"),
        ({"seed": "lucky"}, 400, "seed", "valid integer, not 'lucky'"),
        ({"stop": ["fine", 3]}, 400, "stop.1", "valid string, not 3"),
        ({"stop": [""]}, 400, "stop.0", "at least 1 character"),
        ({"stop": ["x"] * 17}, 400, "stop", "at most 16 items"),
        ({"stream_options": {"include_usage": True}}, 400, None, "stream_options only goes with stream"),
    ],
)
def test_a_bad_field_is_named(service: Service, body: dict[str, Any], status: int, field: str, says: str) -> None:
    for stream in (False, True):
        if stream and "stream_options" in body:
            continue
        answer = post(service, {**PLAIN, **body, "stream": stream})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["param"] == field
        assert says in error["message"]


@pytest.mark.parametrize(
    ("body", "says"), [("{", "not JSON"), ("[]", "valid dictionary"), ("", "missing"), ('{"model": "base"}', "prompt")]
)
def test_a_bad_body_is_explained(service: Service, body: str, says: str) -> None:
    answer = post(service, body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages is empty"),
        ([{"role": "user"}], "messages.0.content is missing"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type: Input should be 'text'"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages.0.tool_calls is not supported"),
    ],
)
def test_bad_messages_are_named(service: Service, messages: Any, says: str) -> None:
    answer = post(service, {"model": "base", "messages": messages}, "chat/completions")
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_a_guide_without_a_chat_template_is_named(service: Service) -> None:
    body = {"model": "base", "messages": CHAT, "guidance": {"weights": {"wordless": 1.0}}}
    answer = post(service, body, "chat/completions")
    assert answer.status_code == 400
    assert "has no chat template" in answer.json()["error"]["message"]
    assert "wordless" in answer.json()["error"]["message"]


def test_openais_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="n: Input should be less than or equal to 128"):
        client.completions.create(**PLAIN, n=300)


def test_the_openapi_schema_lists_the_endpoints(service: Service) -> None:
    paths = requests.get(f"{service.url}/openapi.json", timeout=60).json()["paths"]
    assert set(paths) == {
        *("/health", "/version", "/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions"),
    }
