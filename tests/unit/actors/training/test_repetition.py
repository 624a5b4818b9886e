"""How repetition is counted."""

import pytest

from actors.training.repetition import distinct_2, longest_repeat


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("one two three", 0),
        ("It was very very good", 1),
        ("and happy and happy and happy", 4),
        ("You should have a good fit. You should have a good fit.", 6),
        # Said again later is no repetition of what was just said.
        ("a good fit for you, and for me a good fit", 0),
        ("word " * 50, 49),
    ],
)
def test_a_repeat_says_again_what_was_just_said(text: str, expected: int) -> None:
    assert longest_repeat(text) == expected


def test_distinct_2_counts_different_pairs_of_words() -> None:
    assert distinct_2(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct_2(["one", ""]) is None
