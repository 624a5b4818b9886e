"""A prompt in a model's own tokens, or a refusal that names the request's field."""

import pytest
from tokenizers import normalizers, processors

from actors.prompts import Message, Prompt, PromptEncoder
from cluster.errors import InvalidRequest
from tests import tiny

ASKED: list[Message] = [{"role": "user", "content": "hi"}]
FAILING = {
    "{% set s = none %}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% endif %}"
    "{{ 'sys ' + s }}{{ messages[-1]['content'] }}": "TypeError",
    "{{ messages[5].content.strip() }}": "has no element 5",
    "{{ messages[0]['content'] | int(base=99) // 0 }}": "Error",
    "{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}": "RecursionError",
    "{{ raise_exception('no such roles') }}": "no such roles",
    "{{ messages | map(attribute='content') | sum }}": "TypeError",
    "{% for m in messages %}{{ m['content'] }}": "template",
}


@pytest.mark.parametrize(("template", "told"), FAILING.items())
@pytest.mark.parametrize("is_set", [False, True])
def test_whatever_a_template_raises_refuses_the_messages(template: str, told: str, is_set: bool) -> None:
    fast = tiny.tokenizer()
    if not is_set:
        fast.chat_template = template
    encoder = PromptEncoder(fast, template if is_set else None)
    with pytest.raises(InvalidRequest, match=told) as caught:
        encoder.encode(Prompt(messages=ASKED))
    assert caught.value.field == "messages"
    assert "Traceback" not in caught.value.message
    if is_set:
        with pytest.raises(InvalidRequest) as caught:
            encoder.encode(Prompt("hi"))
        assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    "prompt", [Prompt("half a pair: \ud83d"), Prompt(messages=[{"role": "user", "content": "\ud83d"}])]
)
def test_a_text_that_the_tokenizer_fails_on_is_refused(prompt: Prompt) -> None:
    with pytest.raises(InvalidRequest, match="tokenizer fails on this text") as caught:
        PromptEncoder(tiny.tokenizer()).encode(prompt)
    assert caught.value.field == prompt.field


SPECIAL = [("<s>", 1), ("</s>", 0)]


@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A </s>"])
@pytest.mark.parametrize("text", ["The", "<s>The", "The</s>", "<s>The</s>", "<s><s>The", "The<s>", "<turn>The"])
def test_a_text_has_one_beginning_and_no_end_but_its_own(single: str, text: str) -> None:
    fast = tiny.spacing_tokenizer("byte_level")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=SPECIAL)
    plain = fast(text, add_special_tokens=False).input_ids
    num_added = single.count("<s>")
    has_its_own = plain[:num_added] == [1] * num_added
    expected = plain if has_its_own else [1] * num_added + plain
    assert PromptEncoder(fast).encode(Prompt(text)) == expected
    # A template writes what it wants.
    rendered = PromptEncoder(fast, "{{ messages[0]['content'] }}", split_special_tokens=False).encode(Prompt(text))
    assert rendered == plain


def test_a_text_without_tokens_of_its_own_is_refused() -> None:
    fast = tiny.spacing_tokenizer("first")
    fast.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(InvalidRequest, match="holds no token"):
        PromptEncoder(fast).encode(Prompt("  "))


def test_a_message_says_who_speaks_to_a_template_that_asks() -> None:
    encoder = PromptEncoder(
        tiny.tokenizer(), "{% for m in messages %}{{ m.name or m.role }}:{{ m.content }}{% endfor %}"
    )
    named: list[Message] = [{"role": "user", "content": "hi", "name": "ann"}, *ASKED]
    assert encoder.text_of(Prompt(messages=named)) == "ann:hiuser:hi"


def test_token_ids_are_a_prompt_as_they_are_unless_a_template_is_set() -> None:
    assert PromptEncoder(tiny.tokenizer()).encode(Prompt(tokens=[3, 1, 4])) == [3, 1, 4]
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        PromptEncoder(tiny.tokenizer()).encode(Prompt(tokens=[]))
    with pytest.raises(InvalidRequest, match="has a prompt_template, which takes no token ids"):
        PromptEncoder(tiny.tokenizer(), "{{ messages[0].content }}").encode(Prompt(tokens=[3]))
