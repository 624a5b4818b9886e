"""Answers as OpenAI's API has them: whole, or chunk by chunk."""

import codecs
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from actors.api import Piece, Scores, TokenScore, Usage
from deploy.http.openai_schema import ChatCompletionRequest, CompletionRequest


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
        shown = [[*place["top"], place["drawn"]] if place["drawn"]["logprob"] is not None else [] for place in scores]
        told: dict[str, Any] = {
            "tokens": [place["drawn"]["text"] for place in scores],
            "token_logprobs": [place["drawn"]["logprob"] for place in scores],
            "top_logprobs": [{score["text"]: score["logprob"] for score in tokens} or None for tokens in shown],
            "text_offset": [self._next_offset(place["drawn"]) for place in scores],
        }
        if scores and "log_z" in scores[-1]:
            told["voices"] = [place["drawn"].get("voices") for place in scores]
            told["top_voices"] = [{score["text"]: score["voices"] for score in tokens} or None for tokens in shown]
            told["log_z"] = [place.get("log_z") for place in scores]
        return told

    def _next_offset(self, score: TokenScore) -> int:
        """Characters before a token."""
        offset = self._offset
        self._offset += len(self._text.decode(bytes(score["bytes"])))
        return offset


class Answer:
    """Forms the responses to one request, whole or chunk by chunk.

    Choices are counted over all prompts: those of a prompt follow each other.
    """

    def __init__(self, request: CompletionRequest | ChatCompletionRequest) -> None:
        self._is_chat = isinstance(request, ChatCompletionRequest)
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._num_wanted, self._num_written = request.n, request.num_written
        self._shows_logprobs = bool(request.logprobs) if self._is_chat else request.logprobs is not None
        self._num_open = request.num_answers
        self._choices: defaultdict[int, Choice] = defaultdict(lambda: Choice(is_chat=self._is_chat))

    @property
    def is_finished(self) -> bool:
        """Whether the last chunk of every choice was formed."""
        return self._num_open == 0

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The response that does not stream, from all answers, each in one piece."""
        prompts = [pieces[start : start + self._num_written] for start in range(0, len(pieces), self._num_written)]
        best = [piece for answers in prompts for piece in self._best(answers)]
        return {
            **self._head,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "choices": [self._choice(index, piece, self._whole_content(piece)) for index, piece in enumerate(best)],
            "usage": add_usages([[piece["usage"] for piece in answers] for answers in prompts]),
            "seed": pieces[0]["seed"],
        }

    def _best(self, answers: Sequence[Piece]) -> Sequence[Piece]:
        """Those that were asked for: where more were written, the most probable ones by their tokens' mean."""
        if len(answers) == self._num_wanted:
            return answers
        return sorted(answers, key=_mean_logprob, reverse=True)[: self._num_wanted]

    def _whole_content(self, piece: Piece) -> dict[str, Any]:
        if self._is_chat:
            return {"message": {"role": "assistant", "content": piece["text"]}}
        return {"text": _text(piece)}

    def chunk(self, index: int, piece: Piece, *, with_usage: bool = False) -> dict[str, Any]:
        """One event of a stream; with its choice's token counts so far, if they are wanted."""
        choice = self._choices[index]
        content: dict[str, Any] = {"text": _text(piece)}
        if self._is_chat:
            role = {} if choice.usage else {"role": "assistant"}
            content = {"delta": {**role, "content": piece["text"]}}
        choice.usage = piece["usage"]
        self._num_open -= piece["finish_reason"] is not None
        usage = {"usage": piece["usage"]} if with_usage else {}
        return {**self._stream_head(), "choices": [self._choice(index, piece, content)], "seed": piece["seed"], **usage}

    def usage_chunk(self) -> dict[str, Any]:
        """The last event of a stream whose request asked for token counts."""
        usages = [choice.usage for _, choice in sorted(self._choices.items()) if choice.usage is not None]
        prompts = [usages[start : start + self._num_written] for start in range(0, len(usages), self._num_written)]
        return {**self._stream_head(), "choices": [], "usage": add_usages(prompts)}

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._is_chat else "text_completion"}

    def _choice(self, index: int, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._shows_logprobs:
            prompt = piece["prompt_echo"]["scores"] if "prompt_echo" in piece else []
            logprobs = self._choices[index].logprobs.tell([*prompt, *piece["scores"]])
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": piece["finish_reason"]}


class Choice:
    """What is known of one choice while it is written."""

    def __init__(self, *, is_chat: bool) -> None:
        self.usage: Usage | None = None
        self.logprobs: Logprobs = ChatLogprobs() if is_chat else CompletionLogprobs()


def add_usages(prompts: Sequence[Sequence[Usage]]) -> Usage:
    """Return the token counts of all answers, by prompt; a prompt counts once."""
    num_prompt_tokens = sum(answers[0]["prompt_tokens"] for answers in prompts)
    num_written = sum(usage["completion_tokens"] for answers in prompts for usage in answers)
    return Usage(
        prompt_tokens=num_prompt_tokens, completion_tokens=num_written, total_tokens=num_prompt_tokens + num_written
    )


def _text(piece: Piece) -> str:
    """A piece's text, behind the prompt's where that is wanted."""
    return (piece["prompt_echo"]["text"] if "prompt_echo" in piece else "") + piece["text"]


def _mean_logprob(piece: Piece) -> float:
    return statistics.fmean(place["drawn"]["logprob"] or 0 for place in piece["scores"]) if piece["scores"] else 0.0
