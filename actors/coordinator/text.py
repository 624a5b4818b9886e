"""From tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Mapping, Sequence
from functools import lru_cache

from tokenizers import Tokenizer

NUM_CONTEXT_TOKENS = 8
"""Prompt tokens that the first token is decoded after: some tokenizers drop the space at the beginning of a text."""

NUM_SEARCHED_TOKENS = 64
"""Prompt tokens among which those are looked for: special tokens and single bytes say nothing of spaces."""

MAX_OPEN_CHARACTERS = 3
"""A character has at most four bytes: what a decoder shows for the first three of them may still become it."""

MAX_UNREAD_TOKENS = 256
"""Tokens in a row that end in no whole character, after which they are taken for text as they are."""

REPLACEMENT = "\ufffd"
"""What a decoder shows for bytes that are no character, or not yet."""


class TextWriter:
    """Detokenises one answer as it grows.

    Text that may yet turn out to be the beginning of a stop string is held back until it cannot. Special tokens are no
    text unless they are asked for, but a stop string may name them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        *,
        includes_stop: bool = False,
        shows_special: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Begin behind a prompt.

        Args:
            tokenizer: the base's.
            prompt: in its tokens.
            stop: texts that end the answer.
            includes_stop: whether the text that ends it is part of it.
            shows_special: whether the names of special tokens are text.
            min_tokens: the answer's, before which no text ends it.
        """
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._includes_stop = includes_stop
        self._shows_special = shows_special
        self._num_until_stop = min_tokens
        self._special, self._byte_of = special_tokens(tokenizer), byte_tokens(tokenizer)
        self._special_stop = [text for text in stop if any(name in text for name in self._special.values())]
        # Text tokens alone: a decoder that drops the space before a first word drops it after a special token too.
        self._tokens = self._context(prompt)
        # Tokens are decoded after those before them, from `_start`; the text up to `_read` is written, and `_num_given`
        # characters of what follows.
        self._start = 0
        self._read = len(self._tokens)
        self._num_given = 0
        # Of tokens that stand for one byte: decoders take a run of them for characters only as a whole.
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._hidden: list[int] = []
        """Places of held characters that are no text, but of a special token's name."""

    def append(self, token: int) -> str:
        """Take the next token and return the text that is certain because of it, often none."""
        if self.is_stopped:
            return ""
        self._num_until_stop -= 1
        byte = self._byte_of.get(token)
        if byte is not None:
            return self._release(self._rest() + self._bytes.decode(byte))
        before = self._bytes.decode(b"", final=True)
        name = self._special.get(token)
        if name is None:
            self._tokens.append(token)
            return self._release(before + self._certain())
        if self._shows_special:
            return self._release(before + name)
        written = self._release(before)
        if self._stop and not self.is_stopped:
            self._hidden += range(len(self._held), len(self._held) + len(name))
            written += self._release(name)
        return written

    def finish(self) -> str:
        """Return what was held back, with bytes that never became a character shown as U+FFFD."""
        if self.is_stopped:
            return ""
        text = self._release(self._rest() + self._bytes.decode(b"", final=True))
        if not self.is_stopped:
            text += self._take(len(self._held))
        return text

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last text tokens."""
        searched = prompt[-NUM_SEARCHED_TOKENS:]
        texts = [token for token in searched if token not in self._special and token not in self._byte_of]
        return texts[-NUM_CONTEXT_TOKENS:]

    def _certain(self) -> str:
        """The text of unread tokens, but for what later ones may change."""
        text = self._unread()
        num_open = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_OPEN_CHARACTERS)
        if not num_open or len(self._tokens) - self._read > MAX_UNREAD_TOKENS:
            return self._rest()
        certain = text[: max(0, len(text) - num_open)]
        self._num_given += len(certain)
        return certain

    def _rest(self) -> str:
        """The text of all unread tokens."""
        text = self._unread()
        if self._read < len(self._tokens):
            self._start, self._read, self._num_given = self._read, len(self._tokens), 0
        return text

    def _unread(self) -> str:
        if self._read == len(self._tokens):
            return ""
        written = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(written) + self._num_given :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        """Take more characters, and return the text that is certain not to begin a stop string."""
        if not self._stop:
            return text
        self._held += text
        shown = self._held
        places: Sequence[int] = range(len(self._held))
        if self._hidden:
            places = [place for place in places if place not in self._hidden]
            shown = "".join(self._held[place] for place in places)
        found = [(places[at], stop) for stop in self._stop if (at := shown.find(stop)) >= 0]
        found += [(at, stop) for stop in self._special_stop if (at := self._held.find(stop)) >= 0]
        if found and self._num_until_stop <= 0:
            self.is_stopped = True
            first, stop = min(found)
            written = self._take(first) + (stop if self._includes_stop else "")
            self._held = ""
            return written
        begins = [places[-length] for stop in self._stop if (length := _overlap(shown, stop))]
        begins += [len(self._held) - _overlap(self._held, stop) for stop in self._special_stop]
        return self._take(min(begins, default=len(self._held)))

    def _take(self, end: int) -> str:
        """Hold what comes before that place no longer, and return what is text of it."""
        taken, self._held = self._held[:end], self._held[end:]
        if self._hidden:
            taken = "".join(character for place, character in enumerate(taken) if place not in self._hidden)
            self._hidden = [place - end for place in self._hidden if place >= end]
        return taken


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    """Return the names of special tokens, by id."""
    return {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


@lru_cache(maxsize=8)
def byte_tokens(tokenizer: Tokenizer) -> Mapping[int, bytes]:
    """Return what tokens stand for that stand for one byte, by id, if the tokenizer has them and decodes them so."""
    names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    numbers = {byte: tokenizer.token_to_id(name) for byte, name in names.items()}
    return {
        number: bytes([byte])
        for byte, number in numbers.items()
        if number is not None and tokenizer.decode([number]) != names[byte]
    }


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
