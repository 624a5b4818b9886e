"""Texts as tokens, the way that serving sees them: a prompt ends where the model's turn begins, a response is what the
model would have appended, with the token that ends its turn unless it was cut off.

Knows tokenizers; not where texts come from, nor what is done with the tokens.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.prompts import Prompt, PromptEncoder
from actors.training.data import Messages, Pair, Response, Text
from cluster.errors import InvalidConfiguration, InvalidRequest

Tokens = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLimits:
    """What fits, counted in tokens; none is no limit."""

    max_prompt: int | None = None
    """Examples with longer prompts are left out."""

    max_response: int | None = None
    """Longer responses are cut to this length, and then lack their end token."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference in tokens."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A prompt and one response in tokens."""

    prompt: Tokens
    response: Tokens

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return len(self.prompt) + len(self.response)


@dataclass(slots=True)
class Report:
    """What became of the examples on their way to tokens, for people to read."""

    num_examples: int = 0
    num_response_tokens: int = 0
    changed: Counter[str] = field(default_factory=Counter)
    """How many were left out or cut, by reason."""

    def lines(self) -> list[str]:
        """The report, one fact a line."""
        reasons = [f"{count} {reason}" for reason, count in sorted(self.changed.items())]
        return [f"{self.num_examples} examples, {self.num_response_tokens} response tokens", *reasons]


class ResponseEncoder:
    """Encodes prompts and responses for one model."""

    def __init__(self, tokenizer: Any, limits: TokenLimits) -> None:
        """Take a model's tokenizer, which must name its end token.

        Raises:
            InvalidConfiguration: it does not.
        """
        if tokenizer.eos_token_id is None:
            raise InvalidConfiguration(
                f"model: the tokenizer of {tokenizer.name_or_path!r} names no end token (eos_token); set it"
            )
        self._tokenizer = tokenizer
        self._prompts = PromptEncoder(tokenizer)
        self._limits = limits
        self._end_token: int = tokenizer.eos_token_id
        self.report = Report()

    def pairs(self, pairs: Iterable[Pair]) -> list[EncodedPair]:
        """Encode preferences; those that the limits leave nothing of are counted in `report`."""
        encoded = []
        for pair in pairs:
            prompt = self._prompt(pair.prompt, pair.row)
            if prompt is None:
                continue
            chosen, rejected = (self._response(pair.prompt, side) for side in (pair.chosen, pair.rejected))
            if chosen == rejected:
                self.report.changed["left out: both responses are the same tokens"] += 1
                continue
            encoded.append(EncodedPair(prompt, chosen, rejected))
            self._count(chosen, rejected)
        return encoded

    def texts(self, texts: Iterable[Text]) -> list[EncodedText]:
        """Encode single responses; those that the limits leave nothing of are counted in `report`."""
        encoded = []
        for text in texts:
            prompt = self._prompt(text.prompt, text.row)
            if prompt is not None:
                encoded.append(EncodedText(prompt, self._response(text.prompt, text.response)))
                self._count(encoded[-1].response)
        return encoded

    def _count(self, *responses: Tokens) -> None:
        self.report.num_examples += 1
        self.report.num_response_tokens += sum(len(response) for response in responses)

    def _prompt(self, prompt: str | Messages, row: int) -> Tokens | None:
        try:
            tokens = self._prompts.encode(_as_prompt(prompt))
        except InvalidRequest as error:
            raise InvalidConfiguration(f"row {row}: {error}") from error
        limit = self._limits.max_prompt
        if limit is not None and len(tokens) > limit:
            self.report.changed[f"left out: prompts of more than {limit} tokens"] += 1
            return None
        return tokens

    def _response(self, prompt: str | Messages, response: Response) -> Tokens:
        if response.is_cut or isinstance(prompt, str):
            tokens = self._encode(response.text)
        else:
            tokens = self._encode(self._turn(prompt, response.text))
        if not response.is_cut and self._end_token not in tokens:
            tokens.append(self._end_token)
        if self._end_token in tokens:
            # What a template puts after the end of a turn is never generated.
            tokens = tokens[: tokens.index(self._end_token) + 1]
        limit = self._limits.max_response
        if limit is not None and len(tokens) > limit:
            self.report.changed[f"cut: responses of more than {limit} tokens"] += 1
            tokens = tokens[:limit]
        return tokens

    def _turn(self, messages: Messages, response: str) -> str:
        """The response as the template writes it after the prompt; as it is where a template rewrites the prompt."""
        render: Callable[..., str] = self._tokenizer.apply_chat_template
        before = render(messages, add_generation_prompt=True, tokenize=False)
        whole = render([*messages, {"role": "assistant", "content": response}], tokenize=False)
        return whole.removeprefix(before) if whole.startswith(before) else response

    def _encode(self, text: str) -> Tokens:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def _as_prompt(prompt: str | Messages) -> Prompt:
    return Prompt(text=prompt) if isinstance(prompt, str) else Prompt(messages=prompt)  # type: ignore[arg-type]


def arrange(lengths: Sequence[int], *, batch_size: int, num_steps: int, seed: int) -> list[int]:
    """The order of examples over a whole run: shuffled batches, each of examples of about the same length.

    Args:
        lengths: Of every example, in tokens.
        batch_size: Examples of a step, over all workers.
        num_steps: Steps of the run; the examples are shuffled anew each time that they are used up.
        seed: The same seed gives the same order.

    Returns:
        `batch_size * num_steps` indices: step after step, whatever the number of workers that share each.

    Raises:
        InvalidConfiguration: there are fewer examples than one batch takes.
    """
    if len(lengths) < batch_size:
        raise InvalidConfiguration(
            f"--batch-size: {batch_size} is more than the {len(lengths)} examples there are; lower it, or bring more"
        )
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < batch_size * num_steps:
        shuffled = rng.sample(range(len(lengths)), len(lengths))
        batches = []
        for start in range(0, len(shuffled), 16 * batch_size):
            block = sorted(shuffled[start : start + 16 * batch_size], key=lambda index: lengths[index])
            batches += [block[i : i + batch_size] for i in range(0, len(block) - batch_size + 1, batch_size)]
        rng.shuffle(batches)
        order += [index for batch in batches for index in batch]
    return order[: batch_size * num_steps]
