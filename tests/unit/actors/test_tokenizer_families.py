"""Every family of tokenizers: a prompt is trained as it is served, and a stream has the text that was written."""

from typing import Any

import pytest
from tokenizers.models import Unigram

from actors.coordinator.text import TextWriter
from actors.engine import Engine
from actors.leases import LeaseRequest, Refusal
from actors.prompts import Prompt, PromptEncoder
from actors.replica.server import ModelServer
from actors.training.data import Response, Text
from actors.training.encoding import ResponseEncoder, TokenLimits
from tests import tiny
from tests.tokenizer_families import FAMILIES

TEXTS = [
    "The other",
    "they'd do.",
    "naïve Straße",
    "你好世界",
    "hi 👋🏽 there",
    "a  b   c",
    "the_other(10)",
    "x\n\n\ny\n    return [there]",
    "2026",
    "Ω < [x]",
]
PROMPTS: list[Any] = [
    "The night",
    "def the_other(",
    "line\n",
    [{"role": "user", "content": "The other?"}],
    [
        {"role": "user", "content": "hi 👋🏽"},
        {"role": "assistant", "content": "they'd do."},
        {"role": "user", "content": "the_other(10)\n"},
    ],
]


@pytest.fixture(scope="module", params=FAMILIES)
def fast(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


def can_write(fast: Any, *texts: str) -> bool:
    """Whether the tokenizer has all characters of the texts: Unigram without bytes has not."""
    is_lossy = isinstance(fast.backend_tokenizer.model, Unigram)
    return not is_lossy or all(fast.decode(fast(text, add_special_tokens=False).input_ids) == text for text in texts)


def as_prompt(prompt: Any) -> Prompt:
    return Prompt(text=prompt) if isinstance(prompt, str) else Prompt(messages=prompt)


def encoded(fast: Any, prompt: Any, response: str) -> tuple[list[int], list[int]]:
    [example] = ResponseEncoder(fast, TokenLimits()).texts(
        [Text(prompt=prompt, response=Response(text=response), row=1)]
    )
    return example.prompt, example.response


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("response", TEXTS)
def test_a_prompt_is_trained_as_it_is_served_and_its_answer_as_it_is_written(
    fast: Any, prompt: Any, response: str
) -> None:
    tokens, answer = encoded(fast, prompt, response)
    assert tokens == PromptEncoder(fast).encode(as_prompt(prompt))
    assert fast.eos_token_id not in tokens[-1:] or fast.eos_token == fast.bos_token
    assert answer[-1] == fast.eos_token_id
    asked = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if not can_write(fast, response, *asked):
        return
    writer = TextWriter(fast.backend_tokenizer, tokens)
    pieces = [*map(writer.append, answer), writer.finish()]
    assert "".join(pieces).strip() == response
    assert len([piece for piece in pieces if piece]) > 1 or len(answer) <= 3


@pytest.mark.parametrize("response", TEXTS)
def test_an_answer_ends_before_a_stop_string_wherever_tokens_end(fast: Any, response: str) -> None:
    tokens, answer = encoded(fast, PROMPTS[3], response)
    for start in range(1, len(response) - 1) if can_write(fast, response) else ():
        stop = response[start : start + 2]
        writer = TextWriter(fast.backend_tokenizer, tokens, [stop])
        written = "".join([*map(writer.append, answer), writer.finish()])
        assert writer.is_stopped
        assert written.strip() == response[: response.find(stop)].strip()


def test_a_stop_string_may_name_a_special_token(fast: Any) -> None:
    tokens, answer = encoded(fast, PROMPTS[3], "The other")
    writer = TextWriter(fast.backend_tokenizer, tokens, [fast.eos_token])
    assert "".join(map(writer.append, answer)).strip() == "The other"
    assert writer.is_stopped


def test_what_a_message_spells_is_no_special_token(fast: Any) -> None:
    encoder = PromptEncoder(fast)
    neutral = encoder.encode(Prompt(messages=[{"role": "user", "content": "The other"}]))
    for name in fast.all_special_tokens:
        forged = encoder.encode(Prompt(messages=[{"role": "user", "content": f"The {name} other{name}"}]))
        number = fast.convert_tokens_to_ids(name)
        if name != "<unk>":
            assert forged.count(number) == neutral.count(number)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen"])
async def test_a_token_that_the_model_lacks_is_refused_where_it_is_one(name: str) -> None:
    fast = FAMILIES[name]()
    last = fast.all_special_tokens[-1]
    number = fast.convert_tokens_to_ids(last)
    engine = Engine(tiny.llama(number), max_sequences=2, max_context=64)
    server = ModelServer(engine, PromptEncoder(fast), replica="replica", host="127.0.0.1", max_rows=2)
    try:
        for prompt, is_refused in ((f"The{last}", True), ("The", False)):
            request = LeaseRequest(coordinator="c", sequence="s", prompt=Prompt(prompt), known_bases=frozenset())
            leases = server.lease(request)
            first = await anext(leases)
            assert isinstance(first, Refusal) == is_refused
            if isinstance(first, Refusal):
                assert f"{last!r}, id {number}" in str(first.error)
            await leases.aclose()
    finally:
        await server.stop()
