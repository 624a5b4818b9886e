"""From tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

NUM_CONTEXT_TOKENS = 8
"""Prompt tokens that the first token is decoded after: some tokenizers drop the space at the beginning of a text."""

MAX_CHARACTER_TOKENS = 8
"""A character has at most four bytes; bytes that are none after so many tokens never will be."""

REPLACEMENT = "\ufffd"
"""What a decoder shows for bytes that are no character, or not yet."""


class TextWriter:
    """Detokenises one answer as it grows.

    Text that may yet turn out to be the beginning of a stop string is held back until it cannot.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens = list(prompt[-NUM_CONTEXT_TOKENS:])
        # Tokens are decoded after those before them, from `_start`; the text up to `_read` is written.
        self._start = 0
        self._read = len(self._tokens)
        self._held = ""

    def append(self, token: int) -> str:
        """Take the next token and return the text that is certain because of it, often none."""
        if self.is_stopped:
            return ""
        self._tokens.append(token)
        text = self._unread_text()
        if text.endswith(REPLACEMENT) and len(self._tokens) - self._read < MAX_CHARACTER_TOKENS:
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._release(text)

    def finish(self) -> str:
        """Return what was held back, with bytes that never became a character shown as U+FFFD."""
        if self.is_stopped:
            return ""
        text = self._release(self._unread_text()) + self._held
        self._held = ""
        return text

    def _unread_text(self) -> str:
        written = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(written) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
