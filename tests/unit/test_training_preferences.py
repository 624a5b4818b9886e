"""Sampling answers in a batch, and pairing them."""

import random
from typing import Any

import torch

from actors.training.preferences import Pairing, PairRules, answer_prompts, pair_answers, sample_answers
from tests.tiny import llama

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


def _sample(**changes: Any) -> list[list[list[int]]]:
    settings: dict[str, Any] = {
        "num_samples": 4,
        "max_tokens": 6,
        "end_token": 0,
        "generator": torch.Generator().manual_seed(3),
    }
    return sample_answers(llama(), PROMPTS, **{**settings, **changes})


def test_every_prompt_gets_its_number_of_answers() -> None:
    answers = _sample()
    assert [len(drawn) for drawn in answers] == [4, 4, 4]
    assert all(1 <= len(answer) <= 6 for drawn in answers for answer in drawn)


def test_the_same_seed_gives_the_same_answers() -> None:
    assert _sample() == _sample()


def test_an_answer_stops_after_its_end_token() -> None:
    first = _sample()[0][0]
    end_token = first[2]
    stopped = _sample(end_token=end_token)[0][0]
    assert stopped == first[: first.index(end_token) + 1]


def test_answers_follow_the_models_own_distribution() -> None:
    """With padding in the batch, the first token of each prompt's answers fits the prompt run alone."""
    model = llama()
    answers = sample_answers(
        model, PROMPTS, num_samples=4000, max_tokens=2, end_token=0, generator=torch.Generator().manual_seed(0)
    )
    for prompt, drawn in zip(PROMPTS, answers, strict=True):
        with torch.inference_mode():
            first = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
            likely = int(first.argmax())
            second = model(input_ids=torch.tensor([[*prompt, likely]])).logits[0, -1].softmax(-1)
        starts = torch.bincount(torch.tensor([answer[0] for answer in drawn]), minlength=len(first)) / len(drawn)
        torch.testing.assert_close(starts, first, rtol=0, atol=0.04)
        follow = [answer[1] for answer in drawn if answer[0] == likely and len(answer) > 1]
        share = torch.bincount(torch.tensor(follow), minlength=len(second)) / len(follow)
        torch.testing.assert_close(share, second, rtol=0, atol=0.12)


def test_a_temperature_flattens_the_distribution() -> None:
    model = llama()
    answers = sample_answers(
        model,
        [PROMPTS[0]],
        num_samples=4000,
        max_tokens=1,
        end_token=0,
        generator=torch.Generator().manual_seed(0),
        temperature=2.0,
    )
    with torch.inference_mode():
        wanted = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 2).softmax(-1)
    starts = torch.bincount(torch.tensor([answer[0] for answer in answers[0]]), minlength=len(wanted)) / 4000
    torch.testing.assert_close(starts, wanted, rtol=0, atol=0.04)


def _answer(prompts: list[list[int]], pending: set[int]) -> dict[int, list[list[int]]]:
    settings: dict[str, Any] = {"num_samples": 3, "max_tokens": 5, "end_token": 0, "temperature": 1.0}
    return dict(answer_prompts(llama(), prompts, pending, seed=4, batch=2, **settings))


def test_prompts_are_answered_in_batches_of_like_length() -> None:
    answers = _answer(PROMPTS, {0, 1, 2})
    # By length: 1 and 2, then 0, which is number 2 of all.
    assert [answers[1], answers[2]] == sample_answers(
        llama(),
        [PROMPTS[1], PROMPTS[2]],
        num_samples=3,
        max_tokens=5,
        end_token=0,
        generator=torch.Generator().manual_seed(4),
    )
    assert [answers[0]] == sample_answers(
        llama(), [PROMPTS[0]], num_samples=3, max_tokens=5, end_token=0, generator=torch.Generator().manual_seed(4 + 2)
    )


def test_what_is_left_is_answered_as_it_would_have_been() -> None:
    whole = _answer(PROMPTS, {0, 1, 2})
    for pending in ({0}, {1}, {2, 0}, set[int]()):
        assert _answer(PROMPTS, pending) == {i: whole[i] for i in pending}


def _pair(rewards: list[float], rules: PairRules, lengths: list[int] | None = None, seed: int = 0) -> Pairing:
    texts = [f"answer {i}" for i in range(len(rewards))]
    return pair_answers(texts, lengths or [5] * len(rewards), rewards, rules, random.Random(seed))


def test_pairs_are_ordered_by_reward() -> None:
    pairing = _pair([0.1, 0.9, -0.5], PairRules())
    assert set(pairing.pairs) == {(1, 0), (0, 2), (1, 2)}
    assert pairing.num_compared == 3


def test_pairs_without_a_clear_order_are_left_out() -> None:
    pairing = _pair([0.5, 0.75, 2.0], PairRules(margin=1.25))
    assert pairing.pairs == [(2, 0), (2, 1)]
    assert pairing.num_within_margin == 1


def test_equal_rewards_are_no_pair_without_a_margin_either() -> None:
    pairing = _pair([0.5, 0.5], PairRules())
    assert (pairing.pairs, pairing.num_within_margin) == ([], 1)


def test_answers_of_unlike_length_are_no_pair() -> None:
    pairing = _pair([0.0, 1.0, 1.0], PairRules(margin=0.5, max_length_difference=2), lengths=[5, 7, 8])
    assert pairing.pairs == [(1, 0)]
    assert (pairing.num_within_margin, pairing.num_unlike_in_length) == (1, 1)


def test_texts_that_are_the_same_or_empty_are_not_compared() -> None:
    texts = ["yes", "", "yes", " \n", "no"]
    pairing = pair_answers(texts, [1] * 5, [1.0, 5.0, 2.0, 4.0, 3.0], PairRules(), random.Random(0))
    assert set(pairing.pairs) == {(4, 0), (4, 2)}
    assert pairing.num_compared == 2


def test_a_limit_draws_from_all_pairs() -> None:
    rewards = [float(i) for i in range(6)]
    every = set(_pair(rewards, PairRules()).pairs)
    drawn = [_pair(rewards, PairRules(limit=3), seed=seed).pairs for seed in range(40)]
    assert all(len(set(pairs)) == 3 for pairs in drawn)
    assert {pair for pairs in drawn for pair in pairs} == every
    assert _pair(rewards, PairRules(limit=3), seed=7).pairs == drawn[7]
