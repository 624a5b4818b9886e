"""A request's prompt in one model's own tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NotRequired, TypedDict

import jinja2

from actors.chat_templates import ChatTemplate
from actors.spelled_tokens import SpelledTokens, special_spellings, written_spellings
from cluster.errors import InvalidRequest


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    name: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, its tokens, or a conversation whose next turn is wanted."""

    text: str | None = None
    messages: Sequence[Message] | None = None
    tokens: Sequence[int] | None = None
    """In the base's tokens, which guides share."""

    @property
    def field(self) -> str:
        """The request's field that it came from."""
        return "prompt" if self.messages is None else "messages"


class PromptEncoder:
    """Encodes prompts for one model: `messages` by its chat template, a text verbatim unless a template was set.

    Special tokens are those that the template writes, and what a text that came verbatim spells. What a message's
    text spells is encoded as the characters that it is.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, *, split_special_tokens: bool = True) -> None:
        """Take a model's tokenizer.

        Args:
            tokenizer: Of the model.
            template: In place of the tokenizer's own.
            split_special_tokens: Whether a special token that a message's text spells is no token.
        """
        self._tokenizer = tokenizer
        self._is_template_set = template is not None
        self._template = ChatTemplate(tokenizer, template)
        self._splits = split_special_tokens

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            InvalidRequest: the prompt is empty, is a conversation and the model has no template for it, or template or
                tokenizer fail on it.
        """
        if prompt.tokens is not None:
            return self._check_tokens(prompt.tokens)
        text = self.text_of(prompt)
        try:
            tokens = self.tokens_of(text, is_rendered=self.is_rendered(prompt))
        except Exception as error:
            # The same text fails on every replica.
            raise InvalidRequest(
                f"{prompt.field}: the model's tokenizer fails on this text: {type(error).__name__}: {error}; change it",
                prompt.field,
            ) from error
        if not tokens:
            raise InvalidRequest(f"{prompt.field} holds no token; give some text", prompt.field)
        return tokens

    def _check_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Return a prompt's tokens as they are, or raise `InvalidRequest`."""
        if not tokens:
            raise InvalidRequest("prompt is empty; give at least one token", "prompt")
        if self._is_template_set:
            raise InvalidRequest(
                f"prompt: the model {self._tokenizer.name_or_path!r} has a prompt_template, which takes no token ids; "
                "send a text",
                "prompt",
            )
        return list(tokens)

    def prepare(self) -> None:
        """Make now what the first conversation that spells a special token would wait for, a second or so."""
        if self._splits and self._spelled is not None:
            self._spelled.prepare()

    def is_rendered(self, prompt: Prompt) -> bool:
        """Whether a template writes the prompt's text, special tokens and all."""
        return prompt.messages is not None or self._is_template_set

    def text_of(self, prompt: Prompt) -> str:
        """Return the text that the prompt's tokens are made of, for `tokens_of`.

        Raises:
            InvalidRequest: as `encode` does.
        """
        if not (prompt.text or prompt.messages):
            raise InvalidRequest(f"{prompt.field} is empty; give at least one character", prompt.field)
        if not self.is_rendered(prompt):
            return prompt.text or ""
        messages = prompt.messages
        if messages is None:
            messages = [{"role": "user", "content": prompt.text or ""}]
        return self.render(messages, prompt.field)

    def tokens_of(self, text: str, *, is_rendered: bool) -> list[int]:
        """Return a text's tokens, with those that the tokenizer puts before a text unless a template wrote it.

        What it puts after a text would end the prompt, and what the text begins with itself is not put there again.
        """
        if is_rendered and self._splits and self._spelled is not None and self._spelled.is_marked(text):
            return self._spelled.encode(text)
        if is_rendered:
            return list(self._tokenizer(text, add_special_tokens=False).input_ids)
        encoded = self._tokenizer(text, return_special_tokens_mask=True)
        is_text = [not is_added for is_added in encoded.special_tokens_mask]
        if True not in is_text:
            return []
        first, end = is_text.index(True), len(is_text) - is_text[::-1].index(True)
        before, tokens = encoded.input_ids[:first], list(encoded.input_ids[first:end])
        return tokens if tokens[:first] == before else [*before, *tokens]

    def name_of(self, token: int) -> str:
        """Return how a token is spelled; nothing for an id that the tokenizer does not know."""
        return str(self._tokenizer.convert_ids_to_tokens(token) or "") if token < len(self._tokenizer) else ""

    def render(self, messages: Sequence[Message], field: str = "messages", *, is_answered: bool = False) -> str:
        """Return the conversation as the template writes it, for `tokens_of`.

        Args:
            messages: Of the conversation.
            field: Of the request, for messages of errors.
            is_answered: Whether the last message is the model's own; else its turn begins after the text.

        Raises:
            InvalidRequest: there is no template, or it fails on this conversation.
        """
        if not self._template.is_there:
            raise InvalidRequest(
                f"{field}: the model {self._tokenizer.name_or_path!r} has no chat template; "
                "send a plain prompt, or set its prompt_template",
                field,
            )
        try:
            return self._render(messages, is_answered)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"{field}: the chat template refuses this conversation: {error}", field) from error
        except Exception as error:
            # A template is a program: on a conversation that it was not made for it may raise whatever Python does.
            raise InvalidRequest(
                f"{field}: the chat template fails on this conversation: {type(error).__name__}: {error}; send other "
                "roles, or mend the template",
                field,
            ) from error

    def _render(self, messages: Sequence[Message], is_answered: bool) -> str:
        spelled = self._spelled if self._splits else None
        given = [*messages[:-1]] if is_answered else messages
        if spelled is None or not any(spelled.may_spell(text) for message in given for text in _texts(message)):
            return self._template.render(messages, is_answered=is_answered)
        rest = messages[len(given) :]
        written, guarded = (
            self._template.render([*(_changed(message, mark) for message in given), *rest], is_answered=is_answered)
            for mark in (spelled.mark, spelled.mark_beginnings)
        )
        # Halves of a spelling may meet only in what the template writes.
        return written if spelled.count(written) == spelled.count(guarded) else guarded

    @cached_property
    def _spelled(self) -> SpelledTokens | None:
        """The special tokens, and those that the template writes around turns; none if there are none."""
        backend = self._tokenizer.backend_tokenizer
        spellings = special_spellings(backend) | written_spellings(backend, self._template.turns())
        return SpelledTokens(backend, spellings) if spellings else None


def _texts(message: Message) -> tuple[str, str]:
    return message["role"], message["content"]


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    return {**message, "role": change(message["role"]), "content": change(message["content"])}
