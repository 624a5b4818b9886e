"""Single tokens, as text and in bytes."""

import pytest

from actors.coordinator.spelling import Spelling
from tests import tiny
from tests.tokenizer_families import FAMILIES
from tests.unit.actors.coordinator.test_text import BYTES


def test_the_bytes_of_a_text_are_those_of_its_tokens() -> None:
    spelling = Spelling(BYTES)
    text = "naïve 漢字 😀\n"
    assert b"".join(spelling.spell(token)[1] for token in BYTES.encode(text).ids) == text.encode()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_the_tokens_of_a_text_are_spelled_as_it_is(family: str) -> None:
    fast = FAMILIES[family]()
    spelling = Spelling(fast.backend_tokenizer)
    for text in (
        "The other",
        "they'd do.",
        "naïve Straße",
        "hi 👋🏽 there",
        "a  b   c",
        "x\n\n\ny\n    return [there]",
    ):
        tokens = fast(text, add_special_tokens=False).input_ids
        if fast.decode(tokens) != text:
            continue  # Unigram without bytes does not have all characters.
        spelled = b"".join(spelling.spell(token)[1] for token in tokens).decode()
        # Some put a space before a text, which the decoder takes away again.
        assert spelled.removeprefix(" ") == text


def test_part_of_a_character_is_spelled_in_hex() -> None:
    spelling = Spelling(BYTES)
    assert [spelling.spell(token) for token in BYTES.encode("é").ids] == [
        ("bytes:\\xc3", b"\xc3"),
        ("bytes:\\xa9", b"\xa9"),
    ]


@pytest.mark.parametrize("kind", tiny.SPACE_BEFORE_TEXT)
def test_a_word_has_its_space_and_a_special_token_its_name(kind: str) -> None:
    fast = tiny.spacing_tokenizer(kind)
    spelling = Spelling(fast.backend_tokenizer)
    word = fast.convert_tokens_to_ids("ĠThe" if kind == "byte_level" else "▁The")
    assert spelling.spell(word) == (" The", b" The")
    assert spelling.spell(fast.convert_tokens_to_ids("<turn>")) == ("<turn>", b"<turn>")
    assert spelling.spell(fast.convert_tokens_to_ids("he")) == ("he", b"he")


def test_a_token_that_stands_for_a_byte() -> None:
    fast = tiny.spacing_tokenizer("first")
    spelling = Spelling(fast.backend_tokenizer)
    assert spelling.spell(fast.convert_tokens_to_ids("<0xC3>")) == ("bytes:\\xc3", b"\xc3")
    assert spelling.spell(fast.convert_tokens_to_ids("<0x41>")) == ("A", b"A")


def test_characters() -> None:
    spelling = Spelling(tiny.tokenizer().backend_tokenizer)
    assert [spelling.spell(token)[0] for token in (0, 1, 2, 4)] == [tiny.END_TOKEN, "\n", " ", "a"]
