"""Chat templates: every text of a conversation is in what they make of it, however they read contents."""

import pytest

from actors.chat_templates import ChatTemplate
from actors.prompts import Message, Prompt, PromptEncoder
from cluster.errors import InvalidRequest
from tests import tiny

CONVERSATION: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "why"},
]


def each(body: str) -> str:
    """A template that writes a line for each message: its role, and what `body` makes of its content."""
    return (
        "{% for m in messages %}{{ m['role'] }}: " + body + "{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


FIRST_PART = "{{ m['content'][0]['text'] }}"
PARTS_ONLY = {
    "a loop": each("{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"),
    "a loop over texts": each(
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    ),
    "the first part": each(FIRST_PART),
    "filters": each("{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}"),
    "a macro": "{% macro write(c) %}{% for part in c %}{{ part['text'] }}{% endfor %}{% endmacro %}"
    + each("{{ write(m['content']) }}"),
    "another variable": each("{% set parts = m['content'] %}{% for p in parts %}{{ p['text'] }}{% endfor %}"),
    "an error for texts": each(
        "{% if m['content'] is string %}{{ raise_exception('parts are needed') }}{% endif %}" + FIRST_PART
    ),
    "a Python error for texts": each("{{ (m['content'] + [])[0]['text'] }}"),
    "characters on lines of their own": each(
        "{% for p in m['content'] %}{% if p is mapping %}{{ p['text'] }}{% else %}{{ p }},{% endif %}{% endfor %}"
    ),
    "a text of the system's": each(
        "{% if m['role'] == 'system' %}{{ m['content'].strip() }}{% else %}" + FIRST_PART + "{% endif %}"
    ),
    "parts of the user's": each(
        "{% if m['role'] == 'user' %}" + FIRST_PART + "{% else %}{{ m['content'] + '' }}{% endif %}"
    ),
    "turns that alternate": "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
    + each(
        "{% if loop.index0 >= first and (m['role'] == 'user') != (loop.index0 % 2 == first) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}" + FIRST_PART
    ),
}
BOTH = each(
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endif %}"
)
RENDERED = "system: be brief\nuser: hi\nassistant: hello\nuser: why\n"


@pytest.mark.parametrize(
    "template", [tiny.CHAT_TEMPLATE, BOTH, *PARTS_ONLY.values()], ids=["texts", "both", *PARTS_ONLY]
)
@pytest.mark.parametrize("is_set", [False, True])
def test_contents_are_given_as_the_template_reads_them(template: str, is_set: bool) -> None:
    fast = tiny.tokenizer()
    if not is_set:
        fast.chat_template = template
    chat = ChatTemplate(fast, template if is_set else None)
    assert chat.render(CONVERSATION) == RENDERED + "assistant: "
    assert chat.render(CONVERSATION[:3], is_answered=True) == RENDERED.removesuffix("user: why\n")
    assert chat.render(CONVERSATION[1:2]) == "user: hi\nassistant: "


@pytest.mark.parametrize("role", ["developer", "tool"])
def test_other_roles_are_read_as_parts_too(role: str) -> None:
    chat = ChatTemplate(tiny.tokenizer(), PARTS_ONLY["a loop"])
    assert chat.render([{"role": role, "content": "news"}, CONVERSATION[1]]) == f"{role}: news\nuser: hi\nassistant: "


def test_a_prompt_with_a_set_template_is_read_as_parts_too() -> None:
    fast = tiny.tokenizer()
    tokens = PromptEncoder(fast, PARTS_ONLY["the first part"]).encode(Prompt("hi"))
    assert tokens == fast("user: hi\nassistant: ").input_ids


def test_a_template_that_never_writes_contents_is_left_as_it_is() -> None:
    assert ChatTemplate(tiny.tokenizer(), "{{ messages | length }}").render(CONVERSATION) == "4"


def test_what_the_template_refuses_in_every_form_is_refused() -> None:
    encoder = PromptEncoder(tiny.tokenizer(), "{{ raise_exception('no such roles') }}")
    with pytest.raises(InvalidRequest, match="no such roles"):
        encoder.encode(Prompt(messages=CONVERSATION))
