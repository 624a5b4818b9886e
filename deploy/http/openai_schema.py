"""The HTTP API's bodies: OpenAI's completions and chat completions, and one field more, `guidance`.

Requests hold the fields that are supported and no others, so that nothing is silently ignored. Fields of OpenAI's that
cannot change a text are taken, and of those that are not supported the values that change nothing; see docs/api.md.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from actors.coordinator.fields import Fields, Integer, impossible
from actors.coordinator.request import (
    MAX_ANSWERS,
    MAX_LOGPROBS,
    ChatMessage,
    GenerationRequest,
    TextOptions,
    TextOrTokens,
    Weights,
    choose_seed,
)
from actors.settings import Profile

ErrorType = Literal["invalid_request_error", "overloaded_error", "server_error"]

COMPLETION_TOKENS = 16
"""What /v1/completions writes where nobody says how much, as OpenAI's does."""

Prompts = Annotated[
    list[TextOrTokens],
    Field(min_length=1, max_length=MAX_ANSWERS),
    BeforeValidator(lambda prompt: prompt if _is_list_of_prompts(prompt) else [prompt]),
]
"""One prompt or several."""


def _is_list_of_prompts(prompt: Any) -> bool:
    """Whether it is neither a text nor one prompt's tokens."""
    return isinstance(prompt, list) and not any(isinstance(item, int | float) for item in prompt[:1])


class Guidance(Fields):
    """How a request is steered."""

    weights: Weights | None = None
    """By guide, in place of the profile's."""

    details: bool = False
    """Whether log probabilities come with each model's own."""


class StreamOptions(Fields):
    """What a stream holds beside its text."""

    include_usage: bool = False
    """Whether a last chunk gives the token counts."""

    continuous_usage_stats: bool = False
    """Whether every chunk gives those of its choice so far."""

    include_obfuscation: bool = False
    """Without effect: no chunk is padded to hide how long its text is."""


class WithoutEffect(BaseModel):
    """Fields of OpenAI's that are taken, since they cannot change a text."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TextRequest(TextOptions, WithoutEffect):
    """What both endpoints take."""

    model: str
    """A profile: a named set of weights."""

    n: Integer = Field(default=1, ge=1, le=MAX_ANSWERS)
    """Answers to each prompt."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    guidance: Guidance | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "TextRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options only goes with stream: true")
        return self

    @property
    def num_written(self) -> int:
        """Answers that are written to each prompt."""
        return self.n

    @property
    def num_answers(self) -> int:
        """Answers that are written to all prompts."""
        return self.num_written * len(self._prompts())

    def requests(self, profiles: Mapping[str, Profile]) -> list[dict[str, Any]]:
        """Return one request for each answer, as the coordinator takes it: what was given, by the coordinator's names.

        Answers to one prompt follow each other, and differ in their sample index.
        """
        fields = {"seed": choose_seed(), **self._fields(profiles)}
        return [
            {**fields, **prompt, "sample": sample} for prompt in self._prompts() for sample in range(self.num_written)
        ]

    def _prompts(self) -> list[dict[str, Any]]:
        """The fields in which prompts differ, of each prompt."""
        return [{}]

    def _fields(self, profiles: Mapping[str, Profile]) -> dict[str, Any]:
        given = self.model_dump(exclude_unset=True, by_alias=True, include=set(GenerationRequest.model_fields))
        if self.guidance is not None and self.guidance.weights is not None:
            given["weights"] = self.guidance.weights
        if self.guidance is not None and self.guidance.details:
            given["details"] = True
        return given


class CompletionRequest(TextRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
    max_tokens: Integer | None = Field(default=None, ge=0)
    """0 only goes with `echo`."""

    logprobs: Integer | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Of each token, and of so many most probable ones."""

    best_of: Integer | None = Field(default=None, ge=1, le=MAX_ANSWERS)
    """Answers that are written to each prompt, of which the `n` most probable ones are given."""

    echo: bool = False
    """Whether an answer begins with its prompt."""

    @model_validator(mode="after")
    def _check_numbers(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise impossible(f"best_of: {self.best_of} is less than n, {self.n}", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise impossible("best_of: which answers are the best is known at their end; leave stream out", "best_of")
        if self.num_answers > MAX_ANSWERS:
            raise impossible(
                f"n: {len(self.prompt)} prompts with {self.num_written} answers each are {self.num_answers} answers; "
                f"one request may have {MAX_ANSWERS}",
                "n",
            )
        return self

    @property
    def num_written(self) -> int:
        """Answers that are written to each prompt."""
        return self.best_of or self.n

    def _prompts(self) -> list[dict[str, Any]]:
        return [{"prompt": prompt} for prompt in self.prompt]

    def _fields(self, profiles: Mapping[str, Profile]) -> dict[str, Any]:
        """Those of all prompts; the length that nobody has said is OpenAI's."""
        given = super()._fields(profiles)
        profile = profiles.get(self.model)
        if "max_tokens" not in given and (profile is None or profile.sampling.max_tokens is None):
            given["max_tokens"] = COMPLETION_TOKENS
        if self.num_written > self.n:
            given.setdefault("logprobs", 0)
        return given


class ChatCompletionRequest(TextRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: Integer | None = Field(default=None, ge=1)
    """OpenAI's newer name of max_tokens."""

    logprobs: bool = False
    """Whether each token's log probability is told."""

    top_logprobs: Integer = Field(default=0, ge=0, le=MAX_LOGPROBS)
    """And those of so many most probable tokens."""

    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _name_the_limit_once(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs only goes with logprobs: true")
        return self

    def _fields(self, profiles: Mapping[str, Profile]) -> dict[str, Any]:
        given = super()._fields(profiles)
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        given.pop("logprobs", None)
        if self.logprobs:
            given["logprobs"] = self.top_logprobs
        return given


class ErrorAnswer(BaseModel):
    """Body of every answer that is an error."""

    error: "ErrorDetail"


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None
