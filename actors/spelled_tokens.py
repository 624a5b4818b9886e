"""Tokens that a template writes, told apart from texts of users that spell them.

A tokenizer takes every text that spells a special token for the token. In what a template makes of a conversation only
the template's own are meant: `<|im_end|>` in a user's text is eight characters or so, and ends nobody's turn.
"""

import json
import re
import secrets
from collections.abc import Collection
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer


class SpelledTokens:
    """Marks where a text spells one of the tokens, and encodes texts so that what is marked stands for itself."""

    def __init__(self, tokenizer: Tokenizer, spellings: Collection[str]) -> None:
        """Take a tokenizer and the spellings, at least one, of tokens that it has."""
        self._tokenizer = tokenizer
        # No client can know these, nor does a template change them.
        self._mark = f"\ue000{secrets.randbits(64)}\ue001"
        self._aliases = {spelling: f"\ue002{secrets.randbits(64)}\ue003" for spelling in spellings}
        alternatives = "|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))
        self._beginning = re.compile(f"(?=(?:{alternatives})).", re.DOTALL)
        # Words are no halves of a spelling: a mark in them would change what a template makes of a role.
        first = {re.escape(spelling[0]) for spelling in spellings if not spelling[0].isalnum()}
        self._first = re.compile("|".join(sorted(first)) or "(?!)")
        self._meant = re.compile(f"(?:{alternatives})(?!{self._mark})")

    def prepare(self) -> None:
        """Make what `encode` needs."""
        _ = self._literal

    def mark(self, text: str) -> str:
        """Return the text with a mark in everything that spells a token."""
        return self._beginning.sub(self._marked, text)

    def mark_beginnings(self, text: str) -> str:
        """Return the text with a mark wherever a token could begin with it, if the rest comes from elsewhere."""
        return self._first.sub(self._marked, text)

    def may_spell(self, text: str) -> bool:
        """Whether a token could begin in the text."""
        return (self._first.search(text) or self._beginning.search(text)) is not None

    def is_marked(self, text: str) -> bool:
        """Whether the text holds a mark."""
        return self._mark in text

    def unmark(self, text: str) -> str:
        """Return the text without marks."""
        return text.replace(self._mark, "")

    def count(self, text: str) -> int:
        """Return how many tokens the text spells without a mark."""
        return len(self._meant.findall(text))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text in which the unmarked spellings alone stand for tokens."""
        aliased = self._meant.sub(lambda found: self._aliases[found[0]], text)
        return list(self._literal.encode(self.unmark(aliased), add_special_tokens=False).ids)

    def _marked(self, found: "re.Match[str]") -> str:
        return found[0] + self._mark

    @cached_property
    def _literal(self) -> Tokenizer:
        """The tokenizer with the tokens' spellings replaced by aliases that nobody else writes: the same ids."""
        description = json.loads(self._tokenizer.to_str())
        for token in description["added_tokens"]:
            token["content"] = self._aliases.get(token["content"], token["content"])
        _rename(description["model"], self._aliases)
        literal = Tokenizer.from_str(json.dumps(description))
        literal.no_truncation()
        literal.no_padding()
        return literal


def special_spellings(tokenizer: Tokenizer) -> set[str]:
    """Return how a tokenizer's special tokens are spelled."""
    return {token.content for token in _added(tokenizer) if token.special and token.content}


def written_spellings(tokenizer: Tokenizer, text: str) -> set[str]:
    """Return how those added tokens are spelled that a text holds, but for white space."""
    return {token.content for token in _added(tokenizer) if token.content in text and token.content.strip()}


def _added(tokenizer: Tokenizer) -> Collection[AddedToken]:
    return tokenizer.get_added_tokens_decoder().values()


def _rename(model: dict[str, Any], aliases: dict[str, str]) -> None:
    """Replace spellings in the vocabulary of a model, and leave out merges that would spell them."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {aliases.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in model["vocab"]]
    if isinstance(unknown := model.get("unk_token"), str):
        model["unk_token"] = aliases.get(unknown, unknown)
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if "".join(_halves(merge)) not in aliases]


def _halves(merge: Any) -> list[str]:
    """A merge's halves: a list, or in older files a text with a space."""
    return merge.split(" ", 1) if isinstance(merge, str) else merge
