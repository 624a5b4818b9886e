"""A guide fits a base exactly where their tokens agree."""

import pytest

from actors.guidance import Vocabulary, check_vocabulary
from cluster.errors import InvalidConfiguration


def vocabulary(tokens: str, *, width: int | None = None, end: int = 0) -> Vocabulary:
    return Vocabulary(tokens=tokens.split(), width=width or len(tokens.split()), end_tokens=frozenset({end}))


@pytest.mark.parametrize("guide", ["a b c d", "a b c d extra", "a b c"])
def test_vocabularies_that_agree_on_their_common_part_fit(guide: str) -> None:
    check_vocabulary(vocabulary("a b c d"), vocabulary(guide), guide_name="kind")


def test_the_first_differing_token_is_named() -> None:
    with pytest.raises(InvalidConfiguration, match=r"guide 'kind' .* token 2 is 'X' in the guide and 'c' in the base"):
        check_vocabulary(vocabulary("a b c d"), vocabulary("a b X Y"), guide_name="kind")


def test_a_hole_in_the_ids_does_not_end_the_comparison() -> None:
    base = Vocabulary(tokens=["a", None, "c"], width=3, end_tokens=frozenset({0}))
    with pytest.raises(InvalidConfiguration, match="token 2 is 'X'"):
        check_vocabulary(base, vocabulary("a b X"), guide_name="kind")
    check_vocabulary(base, vocabulary("a b c"), guide_name="kind")


def test_a_guide_that_cannot_end_a_text_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="3 output columns, too few for the base's end token 3"):
        check_vocabulary(vocabulary("a b c d", end=3), vocabulary("a b c"), guide_name="kind")


def test_padded_columns_are_no_tokens() -> None:
    check_vocabulary(vocabulary("a b c d", end=3), vocabulary("a b c", width=8), guide_name="kind")
