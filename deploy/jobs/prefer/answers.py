"""The files of `trimtab prefer`: prompts, and the answers that were sampled to them.

Owns what a line of either holds, and that answers fit the prompts and the options of the run. Knows neither how answers
are sampled nor what becomes of them.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from actors.api import FinishReason
from actors.coordinator.request import ChatMessage, Text, invalid_request
from cluster.errors import InvalidConfiguration
from deploy.jobs.batch.lines import to_json

RECORD_START = b'{"id": '

Model = TypeVar("Model", bound=BaseModel)


class PromptLine(BaseModel):
    """A line of the prompts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | int | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = None

    @model_validator(mode="after")
    def _need_one_prompt(self) -> "PromptLine":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def content(self) -> dict[str, Any]:
        """Return `messages` or `prompt` under its name."""
        if self.messages is None:
            return {"prompt": self.prompt}
        return {"messages": [dict(message.plain()) for message in self.messages]}


class Answer(BaseModel):
    """One answer to a prompt; its tokens hold the end token if that was drawn."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


class AnswersLine(PromptLine):
    """A line of the answers."""

    answers: list[Answer]
    sampling: dict[str, Any] | None = None
    """What they were sampled with; files of other programs need not say."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, the number of its line, and its name."""

    number: int
    id: str | int
    content: Mapping[str, Any]
    """`messages` or `prompt`."""


Answers = Mapping[str | int, Sequence[Answer]]
"""By the prompt's id."""


def read_prompts(path: Path) -> list[Asked]:
    """Return the prompts of a file; blank lines are skipped, and an `id` that is absent is the line's number.

    Raises:
        InvalidConfiguration: a line is no prompt, two have the same id, or there is none.
    """
    prompts: dict[str | int, Asked] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        line = _parse(PromptLine, raw, path, number)
        asked = Asked(number, number if line.id is None else line.id, line.content())
        if asked.id in prompts:
            raise InvalidConfiguration(
                f"{path}, line {number}: the id {asked.id!r} is that of line {prompts[asked.id].number}; give another"
            )
        prompts[asked.id] = asked
    if not prompts:
        raise InvalidConfiguration(f"{path}: holds no prompt; write a JSON object with messages or prompt on each line")
    return list(prompts.values())


def _parse(model: type[Model], raw: bytes, path: Path, number: int) -> Model:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        complaint = str(invalid_request(error.errors()[0])).removeprefix("the body: ")
        raise InvalidConfiguration(f"{path}, line {number}: {complaint}") from error


class AnswersFile:
    """The answers that were sampled so far, a prompt a line; one run at a time writes it.

    Raises:
        InvalidConfiguration: another run writes this file.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, *, num_samples: int, sampling: Mapping[str, Any]) -> None:
        self._path = path
        self._num_samples = num_samples
        self._sampling = sampling
        self._file: IO[bytes] = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise InvalidConfiguration(
                f"another run is writing {path}; wait for it or give another --answers"
            ) from error

    def read(self, prompts: Sequence[Asked]) -> dict[str | int, Sequence[Answer]]:
        """Return the answers that are there, and cut off a last line that was half written.

        Raises:
            InvalidConfiguration: the file holds something else, or answers that do not fit the prompts or the options;
                nothing was changed.
        """
        by_id = {asked.id: asked for asked in prompts}
        answers: dict[str | int, Sequence[Answer]] = {}
        self._file.seek(0)
        lines = self._file.readlines()
        if lines and _is_cut_off(lines[-1]):
            lines.pop()
        for number, raw in enumerate(lines, 1):
            line = _parse(AnswersLine, raw, self._path, number)
            if misfit := self._misfit(line, by_id, answers):
                raise InvalidConfiguration(
                    f"{self._path}, line {number}: {misfit}; give the prompts and options that it was made with, "
                    "or another --answers"
                )
            assert line.id is not None
            answers[line.id] = line.answers
        self._file.truncate(sum(map(len, lines)))
        if lines and not lines[-1].endswith(b"\n"):
            self._file.write(b"\n")
        return answers

    def _misfit(self, line: AnswersLine, by_id: Mapping[str | int, Asked], known: Answers) -> str | None:
        """Say what keeps a line from being what this run would have written."""
        if line.id is None or line.id not in by_id:
            return f"no prompt has the id {line.id!r}"
        asked = by_id[line.id]
        if line.id in known:
            return f"the prompt {line.id!r} has answers on a line above"
        if line.content() != asked.content:
            return f"the prompt {line.id!r} is another one than on line {asked.number} of the prompts"
        if len(line.answers) != self._num_samples:
            return f"it has {len(line.answers)} answers, which is not --samples {self._num_samples}"
        limit = self._sampling["max_tokens"]
        for answer in line.answers:
            length = len(answer.token_ids)
            may_be_cut = "sentence" in self._sampling or length == limit
            if length > limit or (answer.finish_reason == "length" and not may_be_cut):
                return f"an answer of {length} tokens ({answer.finish_reason}) does not fit --max-tokens {limit}"
        for name, value in (line.sampling or {}).items():
            if value != self._sampling.get(name):
                return f"it was sampled with {name} {value!r}, not {self._sampling.get(name)!r}"
        return None

    def append(self, asked: Asked, answers: Sequence[Answer]) -> None:
        """Keep the answers to a prompt, at once."""
        listed = [answer.model_dump() for answer in answers]
        self._file.write(to_json({"id": asked.id, **asked.content, "answers": listed, "sampling": self._sampling}))
        self._file.write(b"\n")
        self._file.flush()

    def close(self) -> None:
        """Let the next run have it; a file that holds nothing is removed."""
        if self._file.seek(0, os.SEEK_END) == 0:
            self._path.unlink()
        self._file.close()


def _is_cut_off(raw: bytes) -> bool:
    if raw.endswith(b"\n") or not raw.startswith(RECORD_START[: len(raw)]):
        return False
    try:
        json.loads(raw)
    except ValueError:
        return True
    return False
