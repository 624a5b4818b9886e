"""Texts as tokens, as serving sees them, and the order in which a run takes them."""

import statistics
from collections import Counter

import pytest

from actors.training.data import Pair, Response, Text
from actors.training.encoding import ResponseEncoder, TokenLimits, arrange
from cluster.errors import InvalidConfiguration
from tests.tiny import tokenizer

TOKENIZER = tokenizer()
MESSAGES = [{"role": "user", "content": "hi"}]


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


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(InvalidConfiguration, match="no end token"):
        ResponseEncoder(endless, TokenLimits())


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
