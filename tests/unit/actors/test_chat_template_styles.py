"""Chat templates in the manners that models have: what is served, what is trained, and what is refused."""

from typing import Any

import pytest

from actors.prompts import Prompt, PromptEncoder
from actors.training.data import Response, Text
from actors.training.encoding import ResponseEncoder, TokenLimits
from cluster.errors import InvalidRequest
from tests import tiny

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Why?"}
ANSWERED = {"role": "assistant", "content": "So."}
THOUGHT = {"role": "assistant", "content": "<think>hm</think>So."}
TALK = [ASKED, ANSWERED, ASKED]
NL = "{{ '\\n' }}"

STYLES: dict[str, str] = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<end>" + NL + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant" + NL + "{% endif %}",
    "llama 2": "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ (system if loop.first else '') + m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} <end>{% endif %}{% endfor %}",
    "llama 3": "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>" + NL + "{% if m.role == 'system' %}It is {{ date_string }}. {% endif %}"
    "{{ m.content | trim }}<end>{% endfor %}{% if add_generation_prompt %}<|assistant|>" + NL + "{% endif %}",
    "mistral": "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}<end>{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "gemma": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<turn>{{ role }}" + NL + "{{ m['content'] | trim }}<end>" + NL + "{% endfor %}"
    "{% if add_generation_prompt %}<turn>model" + NL + "{% endif %}",
    "zephyr": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\\n' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
    "qwen 3": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}" + NL + "{{ content }}<end>" + NL + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant" + NL + "{% if enable_thinking is defined and not "
    "enable_thinking %}<think></think>{% endif %}{% endif %}",
    "deepseek": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<User>{{ m.content }}{% else %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>') | last %}{% endif %}<Assistant>{{ content }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<Assistant>{% endif %}",
    "parts": "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "tools": "{% if tools %}Tools: {{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
    "{{ m.tool_calls | tojson }}{% endif %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "generation": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "loops": "{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}<{{ m.role }}>{{ m.content }}<end>"
    "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
}
ENDS = {
    "chatml": "<|im_start|>user\nWhy?<end>\n<|im_start|>assistant\n",
    "llama 2": "[INST] Why? [/INST]",
    "llama 3": "<|user|>\nWhy?<end><|assistant|>\n",
    "mistral": "[INST]Why?[/INST]",
    "gemma": "<turn>user\nWhy?<end>\n<turn>model\n",
    "zephyr": "<|user|>\nWhy?<end><|assistant|>\n",
    "qwen 3": "<|im_start|>user\nWhy?<end>\n<|im_start|>assistant\n",
    "deepseek": "<User>Why?<Assistant>",
    "parts": "<user>Why?<end><assistant>",
    "tools": "<user>Why?<end><assistant>",
    "generation": "<user>Why?<end><assistant>",
    "loops": "<user>Why?<end><assistant>",
}
"""What each makes of one question."""

REFUSED = {
    "llama 2": [[ASKED, ASKED], [ANSWERED, ASKED]],
    "mistral": [[SYSTEM, ASKED]],
    "gemma": [[SYSTEM, ASKED]],
}


def decoded(fast: Any, tokens: list[int]) -> str:
    return str(fast.backend_tokenizer.decode(tokens, skip_special_tokens=False))


def styled(style: str) -> Any:
    fast = tiny.tokenizer()
    fast.chat_template = STYLES[style]
    return fast


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("before", [[], [ASKED, ANSWERED], [ASKED, THOUGHT], [SYSTEM], [SYSTEM, ASKED, ANSWERED]])
def test_a_conversation_is_served_as_its_style_has_it(style: str, before: list[Any]) -> None:
    fast = styled(style)
    messages = [*before, ASKED]
    if before[:1] == [SYSTEM] and style in REFUSED and style != "llama 2":
        return
    text = decoded(fast, PromptEncoder(fast).encode(Prompt(messages=messages)))
    assert text == fast.apply_chat_template(
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        if style == "parts"
        else messages,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text.count("Why?") == sum(message is ASKED for message in messages)
    assert text.count("So.") == sum(message["role"] == "assistant" for message in messages)
    assert ("hm" in text) == (THOUGHT in before and style not in ("qwen 3", "deepseek"))
    if not before:
        assert text == ENDS[style]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("prompt", [[ASKED], TALK])
@pytest.mark.parametrize("is_cut", [False, True])
def test_training_has_the_prompt_as_served_and_the_answer_to_its_first_end(
    style: str, prompt: list[Any], is_cut: bool
) -> None:
    fast = styled(style)
    [encoded] = ResponseEncoder(fast, TokenLimits()).texts(
        [Text(prompt=prompt, response=Response(text="Yes, so.", is_cut=is_cut), row=1)]
    )
    assert encoded.prompt == PromptEncoder(fast).encode(Prompt(messages=prompt))
    answer = decoded(fast, encoded.response)
    assert answer.lstrip().removesuffix("<end>").rstrip() == "Yes, so."
    assert answer.endswith("<end>") != is_cut


@pytest.mark.parametrize(("style", "messages"), [(style, refused) for style in REFUSED for refused in REFUSED[style]])
def test_what_a_style_refuses_is_told_in_its_words(style: str, messages: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"alternate|supported") as caught:
        PromptEncoder(styled(style)).encode(Prompt(messages=messages))
    assert caught.value.field == "messages"
