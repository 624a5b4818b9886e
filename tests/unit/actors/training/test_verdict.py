"""What is said of a guide at the end of its training."""

import pytest

from actors.training.verdict import chance, judge


def test_the_chance_of_a_coin_is_the_binomial_tail() -> None:
    assert chance(0, 10) == 1
    assert chance(10, 10) == pytest.approx(2**-10)
    assert chance(8, 10) == pytest.approx((45 + 10 + 1) / 2**10)


@pytest.mark.parametrize(
    ("num_pairs", "accuracy", "margin", "is_useful", "says"),
    [
        (40, 0.8, 5.0, True, "ranks 32 of 40 kept-back pairs rightly (80%)"),
        (40, 0.5, 0.0, False, "may have no order that can be learnt"),
        (40, 0.6, 1.0, False, "more pairs or more --steps may help"),
        (40, 0.0, -83.0, False, "OF NO USE: it ranks 0 of 40"),
        (3, 1.0, 5.0, False, "3 kept-back pairs cannot tell"),
        (40, 0.9, 3143.0, True, "its margin is 3143 nats a pair"),
        (40, 0.9, -1.0, True, "its mean margin is -1.0 nats"),
        (0, 0.0, 0.0, True, "no pair was kept back"),
    ],
)
def test_a_verdict_says_whether_the_guide_ranks_unseen_pairs(
    num_pairs: int, accuracy: float, margin: float, is_useful: bool, says: str
) -> None:
    verdict = judge(num_pairs=num_pairs, accuracy=accuracy, margin=margin)
    assert verdict.is_useful == is_useful
    assert says in "\n".join(verdict.lines)


def test_labels_at_random_pass_in_one_case_of_a_hundred_at_most() -> None:
    for num_pairs in (10, 30, 45, 200):
        least = next(
            k for k in range(num_pairs + 1) if judge(num_pairs=num_pairs, accuracy=k / num_pairs, margin=1).is_useful
        )
        assert chance(least, num_pairs) <= 0.01
        assert least <= 0.5 * num_pairs + 1.5 * num_pairs**0.5 + 1, "a guide of some worth is not refused"
