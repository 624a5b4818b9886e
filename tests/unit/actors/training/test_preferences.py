"""Pairing answers by their rewards."""

import random

from actors.training.preferences import Pairing, PairRules, pair_answers


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


def test_the_widest_pairs_share_no_answer() -> None:
    rewards = [0.0, 5.0, 1.0, 4.0, 2.0]
    assert _pair(rewards, PairRules(widest=True)).pairs == [(1, 0), (3, 2)]
    assert _pair(rewards, PairRules(widest=True, limit=1)).pairs == [(1, 0)]


def test_lengths_may_differ_by_a_ratio() -> None:
    pairing = _pair([0.0, 1.0, 2.0], PairRules(max_length_ratio=1.5), lengths=[100, 150, 151])
    assert set(pairing.pairs) == {(1, 0), (2, 1)}
    assert pairing.num_unlike_in_length == 1


def test_an_answer_that_is_stuck_is_never_the_better_one() -> None:
    texts = ["so good so good so good", "good", "bad"]
    pairing = pair_answers(texts, [5] * 3, [3.0, 2.0, 1.0], PairRules(max_repeat=2), random.Random(0))
    assert pairing.pairs == [(1, 2)]
    assert pairing.num_stuck == 2
    worst = pair_answers(texts, [5] * 3, [0.0, 2.0, 1.0], PairRules(max_repeat=2), random.Random(0))
    assert set(worst.pairs) == {(1, 0), (1, 2), (2, 0)}, "it may be the worse one"
