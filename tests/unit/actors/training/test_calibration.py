"""Which weight is recommended, and what it is chosen by."""

from pathlib import Path
from typing import Any

import pytest

from actors.calibration import FILE, Calibration, Point, read_calibration
from actors.training.calibration import Observed, observe, recommend, summarise
from actors.training.card import replace_section
from tests.tiny import llama, tokenizer


def point(weight: float, *, reward: float | None = None, **changes: Any) -> Point:
    sound = {"ended": 0.8, "distinct_2": 0.9, "distinct_2_error": 0.01, "longest_repeat": 2, "num_tokens": 50.0}
    known = {"weight": weight, "num_answers": 100, "reward": reward, "divergence": 0.1 * weight}
    return Point.model_validate({**known, **sound, **changes})


def test_without_a_reward_the_largest_sound_weight_up_to_1_is_recommended() -> None:
    points = [point(0), point(0.5), point(1), point(1.5)]
    assert recommend(points) == (1, True)
    assert recommend([point(0), point(0.5), point(1, ended=0.3)]) == (0.5, True)
    assert recommend([point(0), point(0.5), point(1, distinct_2=0.8)]) == (0.5, True)
    assert recommend([point(0), point(2)]) == (2, True)


def test_with_a_reward_the_smallest_weight_with_nearly_all_of_the_gain_is_recommended() -> None:
    rewards = {0: 0.1, 0.5: 0.3, 1: 0.49, 1.5: 0.5, 2: 0.9}
    points = [point(weight, reward=reward, ended=0.3 if weight == 2 else 0.8) for weight, reward in rewards.items()]
    assert recommend(points) == (1, True), "what 2 gains is not worth that answers do not end"


def test_a_guide_that_ruins_answers_at_every_weight_gets_the_smallest_and_is_not_sound() -> None:
    assert recommend([point(0), point(0.5, ended=0.1), point(1, distinct_2=0.2)]) == (0.5, False)


def test_few_answers_are_not_held_to_what_they_cannot_tell() -> None:
    few = {"num_answers": 8}
    assert recommend([point(0, ended=0.75, **few), point(1, ended=0.5, **few)]) == (1, True)
    wide = {"distinct_2_error": 0.05}
    assert recommend([point(0, distinct_2=0.65, **wide), point(1, distinct_2=0.6, **wide)]) == (1, True)
    assert recommend([point(0, distinct_2=0.65), point(1, distinct_2=0.55)]) == (1, False)
    assert recommend([point(0, ended=0.75, num_answers=1000), point(1, ended=0.5, num_answers=1000)]) == (1, False)


def test_answers_are_summed_up_by_weight() -> None:
    def answer(weight: float, text: str, num_tokens: int, has_ended: bool, divergence: float) -> Observed:
        return Observed(
            weight=weight, prompt=0, text=text, num_tokens=num_tokens, has_ended=has_ended, divergence=divergence
        )

    observed = [
        answer(1, "a a a a", 10, True, 3.0),
        answer(0, "a b c", 4, True, 0.0),
        answer(1, "a b", 2, False, 3.0),
    ]
    base, guided = summarise(observed, lambda answer: len(answer.text))
    assert (base.weight, base.num_answers, base.ended, base.distinct_2, base.reward) == (0, 1, 1, 1, 5)
    assert (guided.weight, guided.divergence, guided.ended, guided.num_tokens) == (1, 0.5, 0.5, 6)
    assert guided.longest_repeat == 3
    assert base.distinct_2_error == 0
    assert guided.distinct_2_error == pytest.approx(1 / 3)
    assert guided.distinct_2 == pytest.approx((1 / 3 + 1) / 2)
    assert summarise(observed, None)[0].reward is None


def test_answers_at_weight_0_are_the_bases_and_cost_no_divergence() -> None:
    observed = observe(
        llama(seed=0),
        llama(seed=1),
        tokenizer(),
        [[5, 6], [7]],
        (0.0, 1.0),
        end_tokens={0},
        max_tokens=5,
        temperature=1.0,
        top_p=1.0,
        seed=1,
    )
    assert [(answer.weight, answer.prompt) for answer in observed] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(answer.divergence == pytest.approx(0, abs=1e-4) for answer in observed[:2])
    assert all(answer.divergence > 0.01 for answer in observed[2:])


def test_what_was_found_is_read_again(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    found = Calibration(
        base="b", temperature=0.7, top_p=0.9, max_tokens=8, reward=None, weight=1.0, is_sound=True, points=[point(0)]
    )
    (tmp_path / FILE).write_text(found.model_dump_json())
    assert read_calibration(tmp_path) == found
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="weight"):
        read_calibration(tmp_path)


def test_a_section_of_a_card_is_written_anew() -> None:
    card = "# guide\n\n## Data\n\nrows\n"
    once = replace_section(card, "## Weights", "## Weights\n\none")
    assert once == f"{card}\n## Weights\n\none\n"
    middle = once + "\n## Settings\n\nsome\n"
    assert replace_section(middle, "## Weights", "## Weights\n\ntwo") == middle.replace("one", "two")
