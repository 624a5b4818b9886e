"""Text comes out whole: no half characters, nothing of a stop string, nothing lost."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from actors.coordinator.text import TextWriter
from tests import tiny

CHARACTERS = tiny.tokenizer().backend_tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token per byte, in the byte-level alphabet of GPT-2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BYTES = byte_tokenizer()


def write(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    writer = TextWriter(tokenizer, [], stop)
    pieces = []
    for token in tokens:
        pieces.append(writer.append(token))
        if writer.is_stopped:
            return pieces, True
    return [*pieces, writer.finish()], False


@given(st.text(max_size=30))
def test_the_pieces_make_up_the_text(text: str) -> None:
    pieces, _ = write(BYTES, BYTES.encode(text).ids)
    assert "".join(pieces) == text


@given(st.text(min_size=1, max_size=10))
def test_no_piece_shows_part_of_a_character(text: str) -> None:
    pieces, _ = write(BYTES, BYTES.encode(text).ids)
    assert all("�" not in piece for piece in pieces) or "�" in text


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    tokens = BYTES.encode("aé").ids[:-1]
    assert write(BYTES, tokens)[0] == ["a", "", "�"]


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, is_stopped = write(CHARACTERS, CHARACTERS.encode(text).ids, stop)
    written = "".join(pieces)
    if is_stopped:
        assert text.startswith(written)
        assert any(text.startswith(end, len(written)) for end in stop)
    else:
        assert written == text
    assert not any(end in written for end in stop)
    assert is_stopped == any(end in text for end in stop)


def test_text_that_may_begin_a_stop_string_waits() -> None:
    writer = TextWriter(CHARACTERS, [], ["abc"])
    pieces = [writer.append(token) for token in CHARACTERS.encode("xabxab").ids]
    assert pieces == ["x", "", "", "abx", "", ""]
    assert writer.finish() == "ab"


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_the_end_token_is_no_text(stop: Sequence[str]) -> None:
    tokens = [*CHARACTERS.encode("hi").ids, 0]
    assert "".join(write(CHARACTERS, tokens, stop)[0]) == "hi"


def test_the_space_before_a_first_word_is_kept() -> None:
    words = Tokenizer(models.WordLevel({"▁hello": 0, "▁big": 1, "▁world": 2}, unk_token="▁big"))
    words.decoder = decoders.Metaspace()
    after_prompt = TextWriter(words, [0])
    assert [after_prompt.append(token) for token in (1, 2)] == [" big", " world"]
    assert after_prompt.finish() == ""


def test_bytes_in_any_order_are_written_as_far_as_they_are_characters() -> None:
    # As Llama 2 and Mistral have it: one token per byte where a character has none of its own.
    vocabulary = {"<unk>": 0, "a": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    e_acute = [3 + byte for byte in "é".encode()]
    pieces, _ = write(tokenizer, [1, *e_acute, e_acute[0], 1, *e_acute, 1])
    assert "".join(pieces).startswith("aé")
    assert "".join(pieces).endswith("aéa")
    only_garbage, _ = write(tokenizer, [e_acute[0]] * 30)
    assert set("".join(only_garbage)) == {"�"}
