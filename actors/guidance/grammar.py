"""Answers that keep to a grammar: which tokens may come next, as a mask over the merged logits.

Guides know nothing of it: the mask comes after the merge, before temperature. Tokens that end a text are legal where
the grammar accepts what there is, and nowhere else. By xgrammar, which is imported when it is first needed.
"""

import json
import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api import Format
from cluster.errors import InvalidRequest

CACHE_BYTES = 64 * 2**20
"""Of compiled grammars, for one base."""

MAX_WHITESPACE = 2
"""Characters between the parts of JSON: a small model may otherwise write spaces without end."""

Floats = NDArray[np.float32]


class GrammarMask:
    """Where one answer stands in its grammar."""

    def __init__(self, compiled: Any, num_tokens: int) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bits = xgrammar.allocate_token_bitmask(1, num_tokens)
        self._bytes = self._bits.numpy().view(np.uint8)

    def append(self, token: int) -> None:
        """Take the next token, which was legal."""
        is_legal = self._matcher.accept_token(token)
        assert is_legal, token

    def forbid(self, z_V: Floats) -> None:
        """Make the logits -inf, in place, of tokens that are not legal next."""
        if self._matcher.fill_next_token_bitmask(self._bits):
            is_legal = np.unpackbits(self._bytes[0], count=len(z_V), bitorder="little")
            np.copyto(z_V, -np.inf, where=is_legal == 0)


class Grammars:
    """Compiles grammars for one base's tokens, and keeps those that were used last. For one thread at a time."""

    def __init__(self, spell: Callable[[], list[bytes]], end_tokens: Collection[int]) -> None:
        """Take what spells all tokens by id, with no bytes for those that are no text, and the tokens that end one."""
        self._spell = spell
        self._end_tokens = end_tokens
        self._compiler: Any = None
        self._num_tokens = 0

    def prepare(self) -> None:
        """Import the compiler and give it the tokens, once: seconds that no grammar is to blame for."""
        if self._compiler is None:
            import xgrammar

            tokens = self._spell()
            self._num_tokens = len(tokens)
            info = xgrammar.TokenizerInfo(tokens, stop_token_ids=sorted(self._end_tokens))
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)

    def mask(self, form: Format) -> GrammarMask:
        """Return the mask of an answer's first token.

        Raises:
            InvalidRequest: there is no such grammar.
        """
        try:
            compiled = self._compile(form)
            return GrammarMask(compiled, self._num_tokens)
        except RuntimeError as error:
            raise InvalidRequest(f"{form.kind}: {_reason(error)}") from error

    def _compile(self, form: Format) -> Any:
        self.prepare()
        match form.kind:
            case "json":
                return self._compiler.compile_json_schema(form.text, max_whitespace_cnt=MAX_WHITESPACE)
            case "regex":
                return self._compiler.compile_regex(form.text)
            case "choice":
                choices = " | ".join(map(_literal, json.loads(form.text)))
                return self._compiler.compile_grammar(f"root ::= {choices}")
            case "grammar":
                return self._compiler.compile_grammar(form.text)


def _literal(text: str) -> str:
    """A text as a grammar quotes it."""
    return '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'


def _reason(error: RuntimeError) -> str:
    """What the compiler says, without its clock and its source."""
    return re.sub(r"^\[[^\]]*\] \S+?:\d+: ", "", str(error).strip()).splitlines()[0]
