"""The HTTP API's bodies: OpenAI's completions and chat completions, and one field more, `guidance`.

Requests hold the fields that are supported and no others, so that nothing is silently ignored.
"""

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from actors.api import FinishReason, Piece, Usage
from actors.coordinator.admission import Caller
from actors.coordinator.request import ChatMessage, StopStrings, Text
from actors.settings import ProfileWeight

ErrorType = Literal["invalid_request_error", "overloaded_error", "server_error"]


class Guidance(BaseModel):
    """How a request is steered."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weights: dict[str, ProfileWeight]
    """By guide, in place of the profile's."""


class StreamOptions(BaseModel):
    """What a stream holds beside its text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    """Whether a last chunk gives the token counts."""


class TextRequest(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: StopStrings | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    guidance: Guidance | None = None
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds until the last token, at most the service's own deadline."""

    _caller: Caller | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "TextRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options only goes with stream: true")
        return self

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def is_for(self, caller: Caller) -> None:
        """Note whom the request is for, which no body can say."""
        self._caller = caller

    def fields(self) -> dict[str, Any]:
        """The request as the coordinator takes it: what was given, by the coordinator's names."""
        given = self.model_dump(exclude_none=True, exclude={"stream", "stream_options", "guidance"})
        if self.guidance is not None:
            given["weights"] = self.guidance.weights
        if self._caller is not None:
            given["caller"] = self._caller
        return given


class CompletionRequest(TextRequest):
    """Body of POST /v1/completions."""

    prompt: Text


class ChatCompletionRequest(TextRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name of max_tokens."""

    @model_validator(mode="after")
    def _name_the_limit_once(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    def fields(self) -> dict[str, Any]:
        """The request as the coordinator takes it."""
        given = super().fields()
        if "max_completion_tokens" in given:
            given["max_tokens"] = given.pop("max_completion_tokens")
        return given


class Answer:
    """Forms the responses to one request, whole or chunk by chunk."""

    def __init__(self, request: CompletionRequest | ChatCompletionRequest) -> None:
        self._is_chat = isinstance(request, ChatCompletionRequest)
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._is_first = True

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The response that does not stream."""
        content: dict[str, Any] = {"text": piece["text"]}
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": piece["text"]}}
        return {
            **self._head,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "choices": [self._choice(content, piece["finish_reason"])],
            "usage": piece["usage"],
            "seed": piece["seed"],
        }

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One event of a stream."""
        content: dict[str, Any] = {"text": piece["text"]}
        if self._is_chat:
            role = {"role": "assistant"} if self._is_first else {}
            content = {"delta": {**role, "content": piece["text"]}}
            self._is_first = False
        return {
            **self._stream_head(),
            "choices": [self._choice(content, piece["finish_reason"])],
            "seed": piece["seed"],
        }

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last event of a stream whose request asked for token counts."""
        return {**self._stream_head(), "choices": [], "usage": usage}

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._is_chat else "text_completion"}

    @staticmethod
    def _choice(content: dict[str, Any], finish_reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


class ErrorAnswer(BaseModel):
    """Body of every answer that is an error."""

    error: "ErrorDetail"


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None
