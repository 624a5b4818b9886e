"""Sampling answers in a batch, and pairing them."""

from typing import Any

import torch

from actors.training.preferences import pair_answers, sample_answers
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


def test_pairs_are_ordered_by_reward_and_stay_within_their_prompt() -> None:
    rewards_PK = torch.tensor([[0.1, 0.9, -0.5], [0.4, 0.45, 0.9]])
    better, worse = pair_answers(rewards_PK, margin=0.3)
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == {(0, 2), (1, 0), (1, 2), (5, 3), (5, 4)}


def test_an_answer_without_a_reward_is_in_no_pair() -> None:
    better, worse = pair_answers(torch.tensor([[0.1, float("nan"), 0.9]]), margin=0.3)
    assert (better.tolist(), worse.tolist()) == ([2], [0])


def test_pairs_without_a_clear_order_are_left_out() -> None:
    better, worse = pair_answers(torch.tensor([[0.1, 0.2, 0.15]]), margin=0.3)
    assert len(better) == len(worse) == 0
