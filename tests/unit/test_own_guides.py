"""The data sets of bench.own_guides, and what counts their effect."""

import pytest

from bench.own_guides import MANNERS, ends_in_question, num_words, pairs, pirate_share
from deploy.jobs.prefer.answers import AnswersLine

TEXTS = ("You are a friend of the sea. It is over there.", "My money is gone. The people know it.")
LINE = AnswersLine.model_validate(
    {
        "id": "a",
        "prompt": "say it",
        "answers": [{"text": text, "token_ids": [5], "finish_reason": "stop"} for text in TEXTS],
    }
)
COUNTS = {"question": ends_in_question, "pirate": pirate_share, "short": num_words}


@pytest.mark.parametrize("name", MANNERS)
def test_the_count_of_a_manner_tells_chosen_from_rejected(name: str) -> None:
    made = list(pairs(name, [LINE]))
    assert [pair["rejected"] for pair in made] == list(TEXTS)
    for pair in made:
        chosen, rejected = (COUNTS[name]("say it", str(pair[each])) for each in ("chosen", "rejected"))
        assert chosen < rejected if name == "short" else chosen > rejected == 0


def test_a_coin_chooses_between_two_answers() -> None:
    (pair,) = pairs("random", [LINE])
    assert {pair["chosen"], pair["rejected"]} == set(TEXTS)
