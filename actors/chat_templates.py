"""A model's chat template: how it wants a message's content, and the text that it makes of a conversation."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any


class ChatTemplate:
    """Renders conversations. A template that reads contents as lists of parts, and loses texts, is given parts."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        """Take the tokenizer's template, or the one given."""
        self._tokenizer = tokenizer
        self._template = template
        # What a role is called is the client's to say, so not without a limit.
        self._reads_parts = lru_cache(maxsize=64)(self._find_reads_parts)

    @property
    def is_there(self) -> bool:
        """Whether there is a template at all."""
        return self._template is not None or bool(self._tokenizer.chat_template)

    def render(self, messages: Sequence[Mapping[str, Any]], *, is_answered: bool = False) -> str:
        """Return the conversation's text; raises whatever the template does.

        Args:
            messages: With a text as their content.
            is_answered: Whether the last message is the model's own; else its turn begins after the text.
        """
        return self._apply([_as_parts(m) if self._reads_parts(m["role"]) else m for m in messages], is_answered)

    def turns(self) -> str:
        """Return a conversation of turns that spell nothing; nothing if the template takes no such conversation."""
        for order in (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",)):
            try:
                return self.render([{"role": role, "content": _word(0)} for role in order], is_answered=True)
            except Exception:  # A template is a program, and may raise whatever Python has.
                continue
        return ""

    def _apply(self, messages: Sequence[Mapping[str, Any]], is_answered: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self._template,
            add_generation_prompt=not is_answered,
            tokenize=False,
        )
        return str(text)

    def _find_reads_parts(self, role: str) -> bool:
        """Whether a message of this role is lost as a text, and written as parts."""
        for conversation in _conversations(role):
            for is_parts in (False, True):
                for are_others_parts in (False, True):
                    messages = [
                        _as_parts(message) if (is_parts if message["role"] == role else are_others_parts) else message
                        for message in conversation
                    ]
                    if self._writes(messages, role):
                        return is_parts
        return False

    def _writes(self, messages: Sequence[Mapping[str, Any]], role: str) -> bool:
        """Whether the text of the last message of a role can be found in what the template makes of a conversation."""
        try:
            text = self._apply(messages, messages[-1]["role"] == "assistant")
        except Exception:  # As in `turns`.
            return False
        place = max(i for i, message in enumerate(messages) if message["role"] == role)
        return _word(place) in text


def _conversations(role: str) -> list[list[dict[str, Any]]]:
    """Conversations in which templates that are strict about the order of turns have a message of this role."""
    orders = {
        "user": [("user",), ("system", "user")],
        "assistant": [("user", "assistant", "user"), ("user", "assistant"), ("system", "user", "assistant", "user")],
    }.get(role, [(role, "user"), ("user", role), ("user", "assistant", role), ("user", "assistant", role, "user")])
    return [[{"role": name, "content": _word(i)} for i, name in enumerate(order)] for order in orders]


def _word(place: int) -> str:
    """A text that no template writes of itself."""
    return f"{70315926481 + place}"


def _as_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
