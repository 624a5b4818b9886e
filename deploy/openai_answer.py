"""Answers as OpenAI's API has them: whole, or chunk by chunk."""

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from actors.api import Piece, Scores, TokenScore, Usage
from deploy.openai_schema import ChatCompletionRequest, CompletionRequest


class Logprobs(Protocol):
    """Tells of log probabilities, those of each piece after those of the piece before it."""

    def tell(self, scores: Sequence[Scores]) -> dict[str, Any]:
        """Return what a choice has as its `logprobs`."""
        ...


class ChatLogprobs:
    """A list with an object for each token."""

    def tell(self, scores: Sequence[Scores]) -> dict[str, Any]:
        """Return what a choice has as its `logprobs`."""
        return {"content": [self._entry(place) for place in scores], "refusal": None}

    @classmethod
    def _entry(cls, place: Scores) -> dict[str, Any]:
        details = {"log_z": place["log_z"]} if "log_z" in place else {}
        return {**cls._token(place["drawn"]), "top_logprobs": [cls._token(score) for score in place["top"]], **details}

    @staticmethod
    def _token(score: TokenScore) -> dict[str, Any]:
        details = {"voices": score["voices"]} if "voices" in score else {}
        return {"token": score["text"], "logprob": score["logprob"], "bytes": score["bytes"], **details}


class CompletionLogprobs:
    """Parallel lists, in which the most probable tokens always include the drawn one."""

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def tell(self, scores: Sequence[Scores]) -> dict[str, Any]:
        """Return what a choice has as its `logprobs`."""
        shown = [[*place["top"], place["drawn"]] for place in scores]
        told: dict[str, Any] = {
            "tokens": [place["drawn"]["text"] for place in scores],
            "token_logprobs": [place["drawn"]["logprob"] for place in scores],
            "top_logprobs": [{score["text"]: score["logprob"] for score in tokens} for tokens in shown],
            "text_offset": [self._next_offset(place["drawn"]) for place in scores],
        }
        if scores and "log_z" in scores[0]:
            told["voices"] = [place["drawn"]["voices"] for place in scores]
            told["top_voices"] = [{score["text"]: score["voices"] for score in tokens} for tokens in shown]
            told["log_z"] = [place["log_z"] for place in scores]
        return told

    def _next_offset(self, score: TokenScore) -> int:
        """Characters before a token."""
        offset = self._offset
        self._offset += len(self._text.decode(bytes(score["bytes"])))
        return offset


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
        self._logprobs: Logprobs = ChatLogprobs() if self._is_chat else CompletionLogprobs()

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The response that does not stream."""
        content: dict[str, Any] = {"text": piece["text"]}
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": piece["text"]}}
        return {
            **self._head,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "choices": [self._choice(content, piece)],
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
            "choices": [self._choice(content, piece)],
            "seed": piece["seed"],
        }

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last event of a stream whose request asked for token counts."""
        return {**self._stream_head(), "choices": [], "usage": usage}

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._is_chat else "text_completion"}

    def _choice(self, content: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs.tell(piece["scores"]) if "scores" in piece else None
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": piece["finish_reason"]}
