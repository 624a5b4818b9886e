"""The rewards that ship, and how a reward of the user's own is found."""

import math
import sys
from pathlib import Path

import pytest

from actors.training.rewards import (
    EXAMPLE,
    distinct_sentences,
    fresh_plainness,
    fresh_positivity,
    freshness,
    load_reward,
    plainness,
    positivity,
    score,
    sentence_plainness,
    sentence_positivity,
)
from cluster.errors import InvalidConfiguration


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with modules of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def test_positivity_is_vaders_compound_score() -> None:
    assert positivity("x", "What a wonderful day") > 0.5
    assert positivity("x", "a table") == 0
    assert positivity("x", "a terrible, awful day") < -0.5


def test_plainness_is_the_readability_index_turned_round() -> None:
    # 21 letters and digits in 4 words and 2 sentences.
    index = 4.71 * 21 / 4 + 0.5 * 4 / 2 - 21.43
    assert plainness("x", "Seven-5 apples. Green ones!") == pytest.approx(1 - max(0.0, index) / 10)
    words = "considerable difficulties " * 2
    index = 4.71 * 12 + 0.5 * 4 - 21.43
    assert index > 20
    assert plainness("x", words) == -1
    # 5 letters a word.
    assert plainness("x", "seven eight three\nother words again") == pytest.approx(
        1 - (4.71 * 30 / 6 + 1.5 - 21.43) / 10
    )


@pytest.mark.parametrize("text", ["", " \n", "...", "- !"])
def test_what_has_no_word_is_not_plain(text: str) -> None:
    assert plainness("x", text) == -1


def test_short_words_and_sentences_are_plain() -> None:
    assert plainness("x", "I am. We go. It is so") == 1
    assert plainness("x", "We go. " * 3) > plainness("x", "Nevertheless unquestionably extraordinary")


def test_the_shipped_rewards_are_found_by_name() -> None:
    assert load_reward(EXAMPLE) is sentence_positivity
    assert load_reward("actors.training.rewards:plainness") is plainness


def test_a_reward_in_the_current_directory_is_found(folder: Path) -> None:
    (folder / "rewards_of_mine").mkdir()
    (folder / "rewards_of_mine" / "short.py").write_text("def short(prompt, response): return -len(response)")
    reward = load_reward("rewards_of_mine.short:short")
    assert score(reward, "x", ["four", ""], number=1) == [-4.0, 0.0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "positivity",
            "'positivity' is not of the form module:function, such as actors.training.rewards:sentence_positivity",
        ),
        ("actors/training/rewards.py:positivity", "is not of the form"),
        (":f", "is not of the form"),
        (".rewards:f", "is not of the form"),
        ("no_such_module:f", "there is no module 'no_such_module' in "),
        ("actors.no_such_module:f", "there is no module 'actors.no_such_module'"),
        ("actors.training.rewards:kindness", "kindness does not exist in "),
        ("actors.training.rewards:EXAMPLE", "EXAMPLE is no function in "),
        ("broken_reward:f", "importing broken_reward raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("faulty_reward:f", "importing faulty_reward raised ZeroDivisionError"),
    ],
)
def test_a_name_of_no_reward_is_refused(folder: Path, name: str, told: str) -> None:
    (folder / "broken_reward.py").write_text("import no_such_package")
    (folder / "faulty_reward.py").write_text("1 / 0")
    with pytest.raises(InvalidConfiguration) as refused:
        load_reward(name)
    assert told in str(refused.value)


def test_a_reward_that_fails_names_the_prompt() -> None:
    def fails(prompt: object, response: str) -> float:
        return 1 / len(response)

    with pytest.raises(InvalidConfiguration, match="reward of answer 2 to prompt 7 raised ZeroDivisionError: division"):
        score(fails, "x", ["a", ""], number=7)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "high"])
def test_a_reward_that_is_no_number_names_the_prompt(value: float) -> None:
    with pytest.raises(InvalidConfiguration, match="reward of answer 1 to prompt 7"):
        score(lambda prompt, response: value, "x", ["a"], number=7)


def test_the_rewards_of_sentences_are_not_won_by_saying_it_again() -> None:
    once = "The day was long. I am happy. It rained."
    for again in (once + " I am happy." * 20, once + " I AM happy!\n" * 3, once.replace("happy", "happy and happy")):
        assert sentence_positivity("x", again) == pytest.approx(sentence_positivity("x", once), abs=1e-9)
        assert sentence_plainness("x", again) == pytest.approx(sentence_plainness("x", once), abs=0.25)
        assert positivity("x", again) > positivity("x", once)


def test_the_rewards_of_sentences_do_not_grow_with_length() -> None:
    """A sentence as positive as the others changes nothing; one that is not lowers the mean."""
    text = "I love this place. We love this town."
    assert sentence_positivity("x", f"{text} They love this street.") == pytest.approx(sentence_positivity("x", text))
    assert sentence_positivity("x", f"{text} A table has four legs.") < sentence_positivity("x", text)
    assert sentence_positivity("x", "...") == 0
    assert sentence_plainness("x", "...") == -1
    assert sentence_plainness("x", "The cat sat.") > sentence_plainness("x", "Incontrovertible institutionalisation.")


def test_sentences_are_told_apart_by_their_words() -> None:
    assert distinct_sentences("It is 3.5 m. It is 3.5 M!\nNo? no\n\n--- Yes") == ["It is 3.5 m.", "No?", "--- Yes"]


def test_what_was_said_before_is_not_fresh() -> None:
    assert freshness("The cat sat.", "A dog ran off.") == 1
    assert freshness("The cat sat.", "The cat ran.") == 0.5
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    assert freshness(turns, "A b, c e.") == pytest.approx(1 / 3)
    assert freshness("x", "no no no no") == pytest.approx(1 / 3)
    assert fresh_positivity("x", "I love it.") == sentence_positivity("x", "I love it.") + 1
    assert fresh_plainness("I love it.", "I love it.") == sentence_plainness("x", "I love it.")
