"""The held-out prompts of an evaluation, and the seeds of their answers."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError, model_validator

from actors.coordinator.request import ChatMessage, Text
from actors.settings import Settings
from cluster.errors import InvalidConfiguration
from deploy.jobs.batch.lines import derive_seed
from deploy.jobs.evaluation.plan import Plan

MIN_PROMPTS = 2
"""With fewer there is no interval."""


class PromptLine(Settings):
    """A line of the prompts."""

    id: str | int | None = None
    messages: list[ChatMessage] | None = None
    prompt: Text | None = None
    seeds: list[int] | None = None
    """Of another use of the same file: an evaluation derives its own."""

    @model_validator(mode="after")
    def _need_one(self) -> "PromptLine":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


@dataclass(frozen=True, slots=True)
class Prompt:
    """A held-out prompt."""

    id: str | int
    content: str | list[dict[str, str]]
    """A text, or a conversation whose next turn is wanted."""

    @property
    def fields(self) -> dict[str, Any]:
        """As a request has it."""
        return {"prompt" if isinstance(self.content, str) else "messages": self.content}

    @property
    def last(self) -> str:
        """What is asked: the text, or the last turn."""
        return self.content if isinstance(self.content, str) else self.content[-1]["content"]

    def seed(self, sample: int) -> int:
        """Return the seed of its answer number `sample`: the same in every row, whatever other prompts there are."""
        return derive_seed(f"{sample}:{json.dumps(self.content)}")


def read_prompts(plan: Plan) -> list[Prompt]:
    """Return the plan's prompts.

    Raises:
        InvalidConfiguration: there are too few, or a line is no prompt or repeats another.
    """
    if not plan.prompts_path.is_file():
        raise InvalidConfiguration(f"prompts: there is no file {plan.prompts_path}")
    prompts: dict[str, Prompt] = {}
    for number, text in enumerate(plan.prompts_path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = PromptLine.model_validate_json(text)
        except ValidationError as error:
            complaint = error.errors()[0]
            field = ".".join(map(str, complaint["loc"]))
            raise InvalidConfiguration(f"prompts: line {number}: {field}: {complaint['msg']}") from error
        content = line.prompt or [_plain(message) for message in line.messages or ()]
        key = json.dumps(content)
        if key in prompts:
            raise InvalidConfiguration(f"prompts: line {number} repeats {prompts[key].id!r}; drop one of them")
        prompts[key] = Prompt(number if line.id is None else line.id, content)
    if len(prompts) < MIN_PROMPTS:
        raise InvalidConfiguration(f"prompts: an interval needs at least {MIN_PROMPTS}, not {len(prompts)}")
    return list(prompts.values())


def _plain(message: ChatMessage) -> dict[str, str]:
    plain = message.plain()
    return {"role": plain["role"], "content": plain["content"]}
