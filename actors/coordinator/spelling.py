"""How single tokens are spelled, for those who look at an answer token by token."""

import json
from functools import lru_cache

from tokenizers import Tokenizer

from actors.coordinator.text import byte_tokens, special_tokens


class Spelling:
    """Spells one tokenizer's tokens: in bytes, and as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._byte_of = byte_tokens(tokenizer)
        self._byte_by_character = _byte_alphabet() if _is_byte_level(tokenizer) else None
        self._before = self._a_word()
        self.spell = lru_cache(maxsize=100_000)(self._spell)
        """Returns a token's text and bytes. What is only part of a character is spelled `bytes:\\xe2\\x80`."""

    def text_bytes(self, num_tokens: int) -> list[bytes]:
        """Return the bytes of the first tokens by id; none of special ones, and where there is no token."""
        known = set(self._tokenizer.get_vocab().values())
        return [
            self._bytes(token) if token in known and token not in self._special else b"" for token in range(num_tokens)
        ]

    def _spell(self, token: int) -> tuple[str, bytes]:
        spelled = self._bytes(token)
        try:
            return spelled.decode(), spelled
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), spelled

    def _bytes(self, token: int) -> bytes:
        if token in self._special:
            return self._special[token].encode()
        if token in self._byte_of:
            return self._byte_of[token]
        name = self._tokenizer.id_to_token(token) or ""
        if self._byte_by_character is not None and all(character in self._byte_by_character for character in name):
            return bytes(self._byte_by_character[character] for character in name)
        # After a word: some decoders drop the space at the beginning of a text.
        before = self._tokenizer.decode([self._before])
        return self._tokenizer.decode([self._before, token], skip_special_tokens=False)[len(before) :].encode()

    def _a_word(self) -> int:
        """A token that is text by itself."""
        for token in sorted(self._tokenizer.get_vocab().values()):
            is_word = token not in self._special and token not in self._byte_of
            if is_word and self._tokenizer.decode([token]).strip().isalnum():
                return token
        return 0


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether each character of a token's name stands for a byte (GPT-2's alphabet)."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    return decoder is not None and any(part["type"] == "ByteLevel" for part in (decoder, *decoder.get("decoders", [])))


def _byte_alphabet() -> dict[str, int]:
    """The byte for which each character of GPT-2's alphabet stands."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
