"""What the evaluation measures, on answers whose scores are known."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from actors.prompts import Prompt
from deploy.jobs.evaluation import measures
from deploy.jobs.evaluation.fronts import Point, front, stand
from deploy.jobs.evaluation.measures import Law, Mean, ScoredAnswer
from tests.tiny import llama, tokenizer

TEXTS = [(Prompt("abc"), [5, 6, 7]), (Prompt("abc"), [8]), (Prompt("d"), []), (Prompt("d"), [9, 10])]


def answer(
    reward: float, text: str = "", *, num_tokens: int = 1, law: Law | None = None, has_ended: bool = True
) -> ScoredAnswer:
    return ScoredAnswer(text=text, num_tokens=num_tokens, has_ended=has_ended, law=law, rewards={"r": reward})


def row(*rewards: Sequence[float]) -> list[list[ScoredAnswer]]:
    return [[answer(reward) for reward in prompt] for prompt in rewards]


def point(x: float, y: float, interval: float = 0.0) -> Point:
    return Point("p", Mean(x, interval), Mean(y, interval))


def test_distinct_2_over_a_row_takes_as_many_answers_of_every_row() -> None:
    few = [[answer(0, "a b")], [answer(0, "c d")]]
    many = [[answer(0, "a b"), answer(0, "a b")], [answer(0, "c d"), answer(0, "c d")]]
    assert measures.distinct_2_over_row(many, 1) == measures.distinct_2_over_row(few, 1) == 1
    assert measures.distinct_2_over_row(many, 2) == 1 / 2
    assert measures.distinct_2_in_answer(many) == 1


def logits_of(model: Any, ids: list[int], answered: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids + answered])).logits[0, len(ids) - 1 : -1]
    return logits


def test_laws_are_those_of_each_answers_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two guides of other weights, in batches of one answer and of several: as if each answer were run alone."""
    base, kind, terse, tokens = llama(seed=0), llama(seed=1), llama(seed=2), tokenizer()
    for batch_tokens in (1, 1024):
        monkeypatch.setattr(measures, "BATCH_TOKENS", batch_tokens)
        found = measures.laws(TEXTS, base, tokens, guides=[(kind, 0.5), (terse, -0.3)])
        for (prompt, answered), law in zip(TEXTS, found, strict=True):
            ids = tokens(prompt.text).input_ids
            own = logits_of(base, ids, answered)
            guided = own + 0.5 * logits_of(kind, ids, answered) - 0.3 * logits_of(terse, ids, answered)
            own, guided = own.log_softmax(-1), guided.log_softmax(-1)
            expected = sum(own[i, token].item() for i, token in enumerate(answered))
            assert law.log_prob == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert law.divergence == pytest.approx(float((guided.exp() * (guided - own)).sum()), rel=1e-3, abs=1e-5)


def test_the_law_of_another_writer_is_its_own() -> None:
    base, other, tokens = llama(seed=0), llama(seed=1), tokenizer()
    (found,) = measures.laws(TEXTS[:1], base, tokens, writer=other)
    ids, answered = tokens("abc").input_ids, TEXTS[0][1]
    law, own = (logits_of(model, ids, answered).log_softmax(-1) for model in (other, base))
    assert found.divergence == pytest.approx(float((law.exp() * (law - own)).sum()), rel=1e-3)
    assert measures.laws(TEXTS[:1], base, tokens)[0].divergence == 0


def test_means_per_token_are_over_all_tokens_that_were_measured() -> None:
    answers = [
        [answer(0, num_tokens=1, law=Law(-1.0, 0.5)), answer(0, num_tokens=9)],
        [answer(0, num_tokens=3, law=Law(-7.0, 1.5))],
    ]
    assert measures.per_token(answers, lambda law: law.log_prob) == -2
    assert measures.per_token(answers, lambda law: law.divergence) == 0.5


def test_ends_lengths_and_repeats() -> None:
    answers = [
        [answer(0, "so so so so", num_tokens=4), answer(0, "fine", num_tokens=2, has_ended=False)],
        [answer(0, "good", num_tokens=3), answer(0, "good", num_tokens=3)],
    ]
    ended = measures.share_ended(answers)
    assert ended.value == 0.75
    assert ended.interval == pytest.approx(1.96 * math.sqrt(0.125 / 2))
    assert measures.mean_length(answers) == 3
    assert measures.longest_repeat_95(answers) == pytest.approx(0.85 * 3)


def test_answers_to_one_prompt_are_one_observation() -> None:
    found = measures.mean_reward(row([0, 1], [0, 0], [1, 0.5]), "r")
    means = [0.5, 0, 0.75]
    deviation = math.sqrt(sum((mean - sum(means) / 3) ** 2 for mean in means) / 2)
    assert found.value == pytest.approx(sum(means) / 3)
    assert found.interval == pytest.approx(1.96 * deviation / math.sqrt(3))


def test_the_best_of_each_group_is_kept() -> None:
    picked = measures.best_of(row([1, 3, 2, 0], [0, 0, 5, 4]), 2, "r")
    assert [[one.rewards["r"] for one in answers] for answers in picked] == [[3, 2], [0, 5]]


def test_answers_are_compared_pair_by_pair_and_small_differences_are_ties() -> None:
    outcome = measures.compare(row([1, 0.04], [0]), row([0, 0.5], [0.05]), "r")
    # First prompt: two wins, a tie, a defeat of four; second: a tie.
    assert (outcome.win, outcome.tie, outcome.lose) == pytest.approx((25, 62.5, 12.5))
    back = measures.compare(row([0, 0.5], [0.05]), row([1, 0.04], [0]), "r")
    assert (back.win, back.tie, back.lose) == pytest.approx((12.5, 62.5, 25))


def test_recovery_is_the_share_of_the_gap() -> None:
    source, target = row([0], [0.2], [0.1], [0.1]), row([1], [1.2], [0.9], [1.3])
    half = row([0.5], [0.7], [0.5], [0.7])
    found = measures.recovery(half, source, target, "r")
    assert found is not None
    assert found.share == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5), "every prompt goes half its way, so every resample does"
    uneven = measures.recovery(row([0], [1.2], [0.1], [1.3]), source, target, "r")
    assert uneven is not None
    assert uneven.low < uneven.share - 0.2 < uneven.share + 0.2 < uneven.high
    assert uneven == measures.recovery(row([0], [1.2], [0.1], [1.3]), source, target, "r"), "the same in every run"
    assert measures.recovery(half, target, source, "r") is None


def test_a_front_has_only_points_that_no_other_beats() -> None:
    points = [point(0, 1), point(0.4, 0.4), point(0.5, 0.6), point(1, 0), point(1, -1), point(0, 0.9)]
    assert [(p.x.value, p.y.value) for p in front(points)] == [(0, 1), (0.5, 0.6), (1, 0)]


@pytest.mark.parametrize(
    ("x", "y", "lead"),
    [(0.5, 0.5, 0.0), (0.6, 0.6, 0.1), (0.4, 0.4, -0.1), (1.2, -5, 0.2), (-3, 1.5, 0.5), (0, 0, -0.5)],
)
def test_the_lead_is_taken_at_the_worst_place_of_the_front(x: float, y: float, lead: float) -> None:
    standing = stand(point(x, y), [point(0, 1), point(1, 0)])
    assert standing.lead == standing.margin == pytest.approx(lead, abs=1e-3)
    assert standing.is_on_or_above is (standing.lead >= 0)


def test_intervals_let_a_point_count_as_on_the_front() -> None:
    below, line = (0.4, 0.4), [point(0, 1, 0.06), point(1, 0, 0.06)]
    assert not stand(point(*below, 0.05), line).is_on_or_above
    standing = stand(point(*below, 0.08), line)
    assert standing.is_on_or_above, "sqrt(0.08² + 0.06²) reaches from 0.4 to 0.5"
    assert standing.lead == pytest.approx(-0.1)
    assert stand(point(0.4, 0.4), [point(0.5, 0.5)]).lead == pytest.approx(-0.1), "a front of one point"
