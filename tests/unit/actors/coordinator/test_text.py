"""Text comes out whole: no half characters, nothing of a stop string, nothing lost."""

from collections.abc import Sequence
from typing import Any

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


def write(
    tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str] = (), **options: Any
) -> tuple[list[str], bool]:
    writer = TextWriter(tokenizer, [], stop, **options)
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


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 and Mistral have it: one token per byte where a character has none of its own."""
    vocabulary = {"<unk>": 0, "a": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


FALLBACK = byte_fallback_tokenizer()
BYTE_LEVEL_IDS = {byte: BYTES.get_vocab()[character] for byte, character in tiny.byte_alphabet().items()}
BYTE_KINDS: dict[str, tuple[Tokenizer, dict[int, int]]] = {
    "byte_level": (BYTES, BYTE_LEVEL_IDS),
    "fallback": (FALLBACK, {byte: 3 + byte for byte in range(256)}),
}


def tokens_of(kind: str, content: bytes) -> tuple[Tokenizer, list[int]]:
    tokenizer, ids = BYTE_KINDS[kind]
    return tokenizer, [ids[byte] for byte in content]


LEADS = st.sampled_from([b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\x80", b"\xff", "é".encode(), "😀".encode(), b"a"])


@pytest.mark.parametrize("kind", BYTE_KINDS)
@given(content=st.one_of(st.binary(max_size=40), st.lists(LEADS, max_size=20).map(b"".join)))
def test_bytes_become_all_the_characters_that_they_hold(kind: str, content: bytes) -> None:
    tokenizer, tokens = tokens_of(kind, content)
    pieces, _ = write(tokenizer, tokens)
    assert "".join(pieces) == content.decode(errors="replace")


@pytest.mark.parametrize("kind", BYTE_KINDS)
@pytest.mark.parametrize("num_stray", range(1, 12))
@pytest.mark.parametrize("character", ["é", "漢", "😀"])
def test_a_character_after_stray_bytes_is_kept(kind: str, num_stray: int, character: str) -> None:
    tokenizer, tokens = tokens_of(kind, b"\xc3" * num_stray + character.encode() + b"a")
    pieces, _ = write(tokenizer, tokens)
    assert "".join(pieces) == "�" * num_stray + character + "a"


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_stray_bytes_do_not_hold_the_text_up(kind: str) -> None:
    tokenizer, tokens = tokens_of(kind, b"\xc3" * 2000)
    pieces, _ = write(tokenizer, tokens)
    assert "".join(pieces[:-1]).count("�") >= 1990


SPACED = ["prepended", "first", "always"]


@pytest.mark.parametrize("kind", SPACED)
@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("hi", ["<turn>", "▁The"], " The"),
        ("hi", ["▁The", "<turn>", "▁The"], " The The"),
        ("hi", ["▁The", "<turn>", "<turn>", "<s>", "▁The"], " The The"),
        ("hi<turn>", ["▁The"], " The"),
        ("hi<turn><turn><turn><turn><turn><turn><turn><turn><turn>", ["▁The"], " The"),
        ("é漢😀é漢😀", ["▁The"], " The"),
        ("hi", ["<turn>", "T", "he"], "The"),
        ("hi", ["▁The", "<0xC3>", "<turn>", "▁The"], " The� The"),
        ("hi", ["▁The", "<0xC3>", "<0xA9>", "▁The"], " Theé The"),
    ],
)
def test_a_word_keeps_its_space_after_tokens_that_are_no_words(
    kind: str, prompt: str, answer: list[str], text: str
) -> None:
    fast = tiny.spacing_tokenizer(kind)
    writer = TextWriter(fast.backend_tokenizer, fast(prompt).input_ids)
    assert "".join([*map(writer.append, fast.convert_tokens_to_ids(answer)), writer.finish()]) == text


@pytest.mark.parametrize(
    ("stop", "answer", "text", "is_stopped"),
    [
        (["<turn>"], ["▁The", "<turn>", "▁The"], " The", True),
        (["<turn>"], ["<turn>", "▁The"], "", True),
        (["he<turn>"], ["▁The", "<turn>", "▁The"], " T", True),
        (["<turn> The"], ["▁The", "<turn>", "▁The", "A"], " The", True),
        (["<turn>A"], ["▁The", "<turn>", "▁The", "A"], " The TheA", False),
        (["<turn>he"], ["▁The", "<turn>"], " The", False),
        (["A", "<turn>"], ["▁The", "A", "<turn>"], " The", True),
        (["<s>", "<turn>"], ["▁The", "<turn>", "<s>"], " The", True),
        # A name in letters is text, and text stops at it as at any other.
        (["<turn>"], ["▁The", "<", "t", "u", "r", "n", ">", "A"], " The", True),
        # Part of a special token's name is in no text.
        (["turn"], ["▁The", "<turn>", "A"], " TheA", False),
        (["ThA"], ["▁", "T", "h", "<turn>", "A"], " ", True),
        ([">A"], ["▁The", "<turn>", "A"], " TheA", False),
    ],
)
def test_a_stop_string_may_name_a_special_token(
    stop: list[str], answer: list[str], text: str, is_stopped: bool
) -> None:
    fast = tiny.spacing_tokenizer("first")
    writer = TextWriter(fast.backend_tokenizer, fast("hi").input_ids, stop)
    assert "".join([*map(writer.append, fast.convert_tokens_to_ids(answer)), writer.finish()]) == text
    assert writer.is_stopped == is_stopped


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ([], " The<turn> The"),
        (["<turn>"], " The"),
        (["urn> T"], " The<t"),
        (["A"], " The<turn> The"),
    ],
)
@pytest.mark.parametrize("includes_stop", [False, True])
def test_special_tokens_may_be_text(stop: list[str], text: str, includes_stop: bool) -> None:
    fast = tiny.spacing_tokenizer("first")
    prompt = fast("hi").input_ids
    writer = TextWriter(fast.backend_tokenizer, prompt, stop, shows_special=True, includes_stop=includes_stop)
    pieces = [writer.append(token) for token in fast.convert_tokens_to_ids(["▁The", "<turn>", "▁The"])]
    ending = stop[0] if writer.is_stopped and includes_stop else ""
    assert "".join([*pieces, writer.finish()]) == text + ending


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_stop_string_may_be_part_of_the_text(text: str, stop: list[str]) -> None:
    tokens = CHARACTERS.encode(text).ids
    without, is_stopped = write(CHARACTERS, tokens, stop)
    pieces, _ = write(CHARACTERS, tokens, stop, includes_stop=True)
    written, ending = "".join(pieces), "".join(pieces).removeprefix("".join(without))
    assert text.startswith(written)
    assert (ending in stop) if is_stopped else not ending


def test_a_named_special_token_is_part_of_the_text_if_the_stop_string_is() -> None:
    fast = tiny.spacing_tokenizer("first")
    writer = TextWriter(fast.backend_tokenizer, fast("hi").input_ids, ["<turn>"], includes_stop=True)
    assert "".join(map(writer.append, fast.convert_tokens_to_ids(["▁The", "<turn>"]))) == " The<turn>"


@pytest.mark.parametrize(
    ("min_tokens", "written"), [(0, "x"), (3, "x"), (4, "xabx"), (7, "xabxabx"), (12, "xabxabxabx")]
)
def test_no_stop_string_ends_a_text_that_is_too_short(min_tokens: int, written: str) -> None:
    pieces, is_stopped = write(CHARACTERS, CHARACTERS.encode("xabxabxabx").ids, ["ab"], min_tokens=min_tokens)
    assert ("".join(pieces), is_stopped) == (written, min_tokens < 12)


def test_the_space_before_a_first_word_is_kept() -> None:
    words = Tokenizer(models.WordLevel({"▁hello": 0, "▁big": 1, "▁world": 2}, unk_token="▁big"))
    words.decoder = decoders.Metaspace()
    after_prompt = TextWriter(words, [0])
    assert [after_prompt.append(token) for token in (1, 2)] == [" big", " world"]
    assert after_prompt.finish() == ""
