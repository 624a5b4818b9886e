"""Texts as tokens, as serving sees them, and the order in which a run takes them."""

import statistics
from collections import Counter
from typing import Any

import pytest

from actors.training.data import Pair, Response, Text
from actors.training.encoding import ResponseEncoder, TokenLimits, arrange
from cluster.errors import InvalidConfiguration
from tests.tiny import SPACE_BEFORE_TEXT, spacing_tokenizer, tokenizer

TOKENIZER = tokenizer()
MESSAGES = [{"role": "user", "content": "hi"}]
TOKEN_OF_LINE = spacing_tokenizer("first").convert_tokens_to_ids("<0x0A>")


def encoder(**limits: int) -> ResponseEncoder:
    return ResponseEncoder(TOKENIZER, TokenLimits(**limits))


def tokens(text: str) -> list[int]:
    return list(TOKENIZER(text).input_ids)


def pair(prompt: str = "ab", chosen: str = "cd", rejected: str = "e") -> Pair:
    return Pair(prompt=prompt, chosen=Response(text=chosen), rejected=Response(text=rejected), row=1)


def test_a_plain_prompt_is_taken_as_it_is_and_a_response_ends_with_the_end_token() -> None:
    [encoded] = encoder().pairs([pair()])
    assert encoded.prompt == tokens("ab")
    assert encoded.chosen == [*tokens("cd"), 0]
    assert encoded.rejected == [*tokens("e"), 0]
    assert encoded.length == 5


def test_a_response_that_was_cut_off_has_no_end_token() -> None:
    text = Text(prompt="ab", response=Response(text="cd", is_cut=True), row=1)
    assert encoder().texts([text])[0].response == tokens("cd")


def test_messages_go_through_the_template_up_to_where_the_answer_begins() -> None:
    [encoded] = encoder().texts([Text(prompt=MESSAGES, response=Response(text="cd"), row=1)])
    assert encoded.prompt == tokens("user: hi\nassistant: ")
    # The template writes the answer and a line break; no end token is in it, so one follows.
    assert encoded.response == [*tokens("cd\n"), 0]


@pytest.mark.parametrize("read", ["m['content'][0]['text']", "m['content'] | map(attribute='text') | join"])
def test_a_template_that_reads_parts_gets_them_for_prompts_and_responses(read: str) -> None:
    fast = tokenizer()
    fast.chat_template = (
        f"{{% for m in messages %}}{{{{ m['role'] }}}}: {{{{ {read} }}}}<end>{{% endfor %}}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    [encoded] = ResponseEncoder(fast, TokenLimits()).texts(
        [Text(prompt=[*MESSAGES, REPLY, *MESSAGES], response=Response(text="cd"), row=1)]
    )
    assert encoded.prompt == tokens("user: hi<end>assistant: yes<end>user: hi<end>assistant: ")
    assert encoded.response == [*tokens("cd"), 0]


def test_what_a_template_puts_after_the_end_of_a_turn_is_not_learnt() -> None:
    with_end = tokenizer()
    with_end.chat_template = (
        "{% for message in messages %}{{ message['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    encoder = ResponseEncoder(with_end, TokenLimits())
    [encoded] = encoder.texts([Text(prompt=MESSAGES, response=Response(text="cd"), row=1)])
    assert encoded.response[-1] == 0
    assert encoded.response.count(0) == 1


def test_prompts_beyond_the_limit_are_left_out_and_counted() -> None:
    limited = encoder(max_prompt=3)
    assert len(limited.pairs([pair("abc"), pair("abcd"), pair("abcde")])) == 1
    assert limited.report.changed == Counter({"left out: prompts of more than 3 tokens": 2})
    assert limited.report.num_examples == 1


def test_long_responses_are_cut_and_lose_their_end() -> None:
    limited = encoder(max_response=2)
    [encoded] = limited.pairs([pair(chosen="abc", rejected="d")])
    assert encoded.chosen == tokens("ab")
    assert encoded.rejected == [*tokens("d"), 0]
    assert limited.report.changed == Counter({"cut: responses of more than 2 tokens": 1})
    assert limited.report.num_response_tokens == 4


def test_a_pair_that_the_cut_makes_equal_is_left_out() -> None:
    limited = encoder(max_response=2)
    assert limited.pairs([pair(chosen="abc", rejected="abd")]) == []
    assert limited.report.changed["left out: both responses are the same tokens"] == 1


def test_messages_without_a_template_are_refused_with_their_row() -> None:
    plain = tokenizer()
    plain.chat_template = None
    text = Text(prompt=MESSAGES, response=Response(text="cd"), row=7)
    with pytest.raises(InvalidConfiguration, match=r"row 7: .*no chat template"):
        ResponseEncoder(plain, TokenLimits()).texts([text])


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)
NEEDS_SYSTEM = (
    "{% set s = none %}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% endif %}"
    "{{ 'sys ' + s }}{{ messages[-1]['content'] }}"
)
ONE_ANSWER = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ 1 // (2 - loop.index0) }}{% endif %}"
    "{% endfor %}"
)
SYSTEM = {"role": "system", "content": "be brief"}
REPLY = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("template", "good", "bad", "told"),
    [
        (ALTERNATING, MESSAGES, [*MESSAGES, *MESSAGES], "roles must alternate"),
        (ALTERNATING, MESSAGES, [SYSTEM, *MESSAGES], "roles must alternate"),
        (NEEDS_SYSTEM, [SYSTEM, *MESSAGES], MESSAGES, "TypeError"),
        # Only the answer is what the template fails on.
        (ONE_ANSWER, MESSAGES, [SYSTEM, *MESSAGES], "ZeroDivisionError"),
        (
            "{{ messages[2]['content'] }}{{ messages[0]['content'] }}",
            [*MESSAGES, REPLY, *MESSAGES],
            MESSAGES,
            "messages",
        ),
    ],
)
def test_a_conversation_that_the_template_refuses_names_its_row_or_is_counted(
    template: str, good: list[dict[str, str]], bad: list[dict[str, str]], told: str
) -> None:
    fast = tokenizer()
    fast.chat_template = template
    rows = [
        Pair(prompt=prompt, chosen=Response(text="cd"), rejected=Response(text="e"), row=row)
        for row, prompt in enumerate([good, bad, good, bad], 1)
    ]
    with pytest.raises(InvalidConfiguration, match=rf"row 2: .*{told}.*--skip-bad-rows"):
        ResponseEncoder(fast, TokenLimits()).pairs(rows)
    skipping = ResponseEncoder(fast, TokenLimits(), skip_bad_rows=True)
    assert len(skipping.pairs(rows)) == 2
    assert skipping.report.changed == Counter({"left out: conversations that the chat template refuses": 2})
    assert any("row 2: " in line and told in line for line in skipping.report.lines())
    assert len(skipping.texts([Text(prompt=row.prompt, response=row.chosen, row=row.row) for row in rows])) == 2


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(InvalidConfiguration, match="no end token"):
        ResponseEncoder(endless, TokenLimits())


INST = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'].strip() }}</s>{% endif %}{% endfor %}"
)
LINES = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TURNS = (
    "<s>{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
COLONS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def spacing(kind: str, template: str) -> Any:
    fast = spacing_tokenizer(kind)
    fast.chat_template = template
    return fast


def decoded(fast: Any, tokens: list[int]) -> str:
    return str(fast.backend_tokenizer.decode(tokens, skip_special_tokens=False))


@pytest.mark.parametrize("kind", SPACE_BEFORE_TEXT)
@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize(
    ("template", "given", "pieces"),
    [
        (INST, "The he", ["_The", "_", "he"]),
        (INST, " The", ["_The"]),
        (LINES, "The he", ["T", "he", "_", "he"]),
        (LINES, " The", ["_The"]),
        (TURNS, "The", ["T", "he"]),
        # The prompt ends in the space, which the whole text has in a token with the word.
        (COLONS, "The", ["T", "he"]),
    ],
)
def test_a_response_has_the_tokens_that_a_model_would_have_appended(
    kind: str, is_cut: bool, template: str, given: str, pieces: list[str]
) -> None:
    fast = spacing(kind, template)
    text = Text(prompt=[{"role": "user", "content": "hi The"}], response=Response(text=given, is_cut=is_cut), row=1)
    end = 2 if template == TURNS else 0
    [encoded] = ResponseEncoder(fast, TokenLimits(), {0, end}).texts([text])
    space = "Ġ" if kind == "byte_level" else "▁"
    assert fast.convert_ids_to_tokens(encoded.response[: len(pieces)]) == [p.replace("_", space) for p in pieces]
    assert encoded.response[len(pieces) :] == ([] if is_cut else [end])


@pytest.mark.parametrize("kind", SPACE_BEFORE_TEXT)
@pytest.mark.parametrize("prompt", ["hi", "hi ", "The"])
@pytest.mark.parametrize("response", ["The", " The", "\nhe"])
def test_a_response_goes_on_from_a_text_without_a_space_of_its_own(kind: str, prompt: str, response: str) -> None:
    fast = spacing_tokenizer(kind)
    [encoded] = ResponseEncoder(fast, TokenLimits()).texts(
        [Text(prompt=prompt, response=Response(text=response), row=1)]
    )
    assert encoded.prompt == fast(prompt).input_ids
    assert decoded(fast, [*encoded.prompt, *encoded.response]).removeprefix("<s>").strip() == (
        f"{prompt}{response}</s>"
    )


@pytest.mark.parametrize(
    ("ends", "end"), [({0}, [2, TOKEN_OF_LINE, 0]), ({0, 2}, [2]), ({2}, [2]), (set(), [2, TOKEN_OF_LINE, 0])]
)
def test_a_response_ends_with_the_first_of_all_end_tokens(ends: set[int], end: list[int]) -> None:
    fast = spacing("first", TURNS)
    [encoded] = ResponseEncoder(fast, TokenLimits(), ends).texts(
        [Text(prompt=MESSAGES, response=Response(text="he"), row=1)]
    )
    assert encoded.response[1:] == end


def test_end_tokens_stand_in_for_a_tokenizers_own() -> None:
    fast = spacing("first", TURNS)
    fast.eos_token = None
    [encoded] = ResponseEncoder(fast, TokenLimits(), {7}).texts([Text(prompt="a", response=Response(text="b"), row=1)])
    assert encoded.response[-1] == 7


LENGTHS = [(7 * i) % 23 for i in range(50)]


def test_an_order_repeats_with_its_seed_and_changes_with_another() -> None:
    order = arrange(LENGTHS, batch_size=4, num_steps=10, seed=1)
    assert order == arrange(LENGTHS, batch_size=4, num_steps=10, seed=1)
    assert order != arrange(LENGTHS, batch_size=4, num_steps=10, seed=2)


def test_every_example_comes_once_before_any_comes_again() -> None:
    order = arrange(LENGTHS, batch_size=5, num_steps=20, seed=0)
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert order[:50] != order[50:]


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    short = arrange(LENGTHS, batch_size=4, num_steps=5, seed=0)
    assert arrange(LENGTHS, batch_size=4, num_steps=30, seed=0)[: len(short)] == short


def test_examples_of_a_batch_are_about_equally_long() -> None:
    lengths = list(range(400))
    order = arrange(lengths, batch_size=4, num_steps=100, seed=0)
    spreads = [max(order[i : i + 4]) - min(order[i : i + 4]) for i in range(0, 400, 4)]
    assert statistics.median(spreads) < 40


def test_more_in_a_batch_than_there_are_examples_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="--batch-size: 8 is more than the 5 examples"):
        arrange([1] * 5, batch_size=8, num_steps=1, seed=0)
