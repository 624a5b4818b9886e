"""A request's prompt in one model's own tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import jinja2

from cluster.errors import InvalidRequest


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Either a text, or a conversation whose next turn is wanted."""

    text: str | None = None
    messages: Sequence[Message] | None = None

    @property
    def field(self) -> str:
        """The request's field that it came from."""
        return "prompt" if self.messages is None else "messages"


class PromptEncoder:
    """Encodes prompts for one model: `messages` by its chat template, a text verbatim unless a template was set."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            InvalidRequest: the prompt is empty, or is a conversation and the model has no template for it.
        """
        messages = prompt.messages
        if messages is None and self._template is not None:
            messages = [{"role": "user", "content": prompt.text or ""}]
        if not (prompt.text or prompt.messages):
            raise InvalidRequest(f"{prompt.field} is empty; give at least one character", prompt.field)
        if messages is None:
            tokens = self._tokenizer(prompt.text).input_ids
        else:
            tokens = self._tokenizer(self._render(messages, prompt.field), add_special_tokens=False).input_ids
        if not tokens:
            raise InvalidRequest(f"{prompt.field} holds no token; give some text", prompt.field)
        return list(tokens)

    def _render(self, messages: Sequence[Message], field: str) -> str:
        if self._template is None and not self._tokenizer.chat_template:
            raise InvalidRequest(
                f"{field}: the model {self._tokenizer.name_or_path!r} has no chat template; "
                "send a plain prompt, or set its prompt_template",
                field,
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), chat_template=self._template, add_generation_prompt=True, tokenize=False
                )
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"{field}: the chat template refuses this conversation: {error}", field) from error
