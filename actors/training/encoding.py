"""Texts as tokens, the way that serving sees them: a prompt ends where the model's turn begins, a response is what the
model would have appended, with the token that ends its turn unless it was cut off.

Knows tokenizers; not where texts come from, nor what is done with the tokens.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.prompts import Message, Prompt, PromptEncoder
from actors.training.data import Messages, Pair, Response, Text
from cluster.errors import InvalidConfiguration, InvalidRequest

Tokens = list[int]

NUM_CONTEXT_TOKENS = 8
"""Prompt tokens that a response is decoded after: some decoders drop the space at the beginning of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLimits:
    """What fits, counted in tokens; none is no limit."""

    max_prompt: int | None = None
    """Examples with longer prompts are left out."""

    max_response: int | None = None
    """Longer responses are cut to this length, and then lack their end token."""

    max_positions: int | None = None
    """Of the models that see an example: what is longer, prompt and response together, is refused."""


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

    first_refusal: str = ""
    """Why the first row that cannot be used was left out."""

    def lines(self) -> list[str]:
        """The report, one fact a line."""
        reasons = [f"{count} {reason}" for reason, count in sorted(self.changed.items())]
        refusal = [f"the first of those refused: {self.first_refusal}"] if self.first_refusal else []
        return [f"{self.num_examples} examples, {self.num_response_tokens} response tokens", *reasons, *refusal]


class ResponseEncoder:
    """Encodes prompts and responses for one model."""

    def __init__(
        self,
        tokenizer: Any,
        limits: TokenLimits,
        end_tokens: Collection[int] = (),
        *,
        skip_bad_rows: bool = False,
    ) -> None:
        """Take a model's tokenizer.

        Args:
            tokenizer: Of the model.
            limits: What fits.
            end_tokens: All that end a text, as `actors.vocabularies.end_tokens` has them. The tokenizer's own is one.
            skip_bad_rows: Count rows that cannot be used, instead of stopping at the first.

        Raises:
            InvalidConfiguration: there is no end token.
        """
        self._end_tokens = {*end_tokens} | ({tokenizer.eos_token_id} - {None})
        if not self._end_tokens:
            raise InvalidConfiguration(
                f"model: the tokenizer of {tokenizer.name_or_path!r} names no end token (eos_token); set it"
            )
        self._tokenizer = tokenizer
        self._prompts = PromptEncoder(tokenizer)
        self._limits = limits
        self._skip_bad_rows = skip_bad_rows
        # What ends a response whose template ends it with nothing.
        self._end_token: int = min(self._end_tokens) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.report = Report()

    def pairs(self, pairs: Iterable[Pair]) -> list[EncodedPair]:
        """Encode preferences; those that are left out are counted in `report`.

        Raises:
            InvalidConfiguration: the chat template refuses a conversation, or an example has more tokens than the model
                has positions, and bad rows are not to be skipped.
        """
        encoded = []
        for pair in pairs:
            sides = self._encoded(pair.row, pair.prompt, pair.chosen, pair.rejected)
            if sides is None:
                continue
            prompt, (chosen, rejected) = sides
            if chosen == rejected:
                self.report.changed["left out: both responses are the same tokens"] += 1
                continue
            encoded.append(EncodedPair(prompt, chosen, rejected))
            self._count(chosen, rejected)
        return encoded

    def texts(self, texts: Iterable[Text]) -> list[EncodedText]:
        """Encode single responses; those that are left out are counted in `report`.

        Raises:
            InvalidConfiguration: the chat template refuses a conversation, or an example has more tokens than the model
                has positions, and bad rows are not to be skipped.
        """
        encoded = []
        for text in texts:
            if (found := self._encoded(text.row, text.prompt, text.response)) is not None:
                prompt, (response,) = found
                encoded.append(EncodedText(prompt, response))
                self._count(response)
        return encoded

    def _count(self, *responses: Tokens) -> None:
        self.report.num_examples += 1
        self.report.num_response_tokens += sum(len(response) for response in responses)

    def _encoded(
        self, row: int, prompt: str | Messages, *responses: Response
    ) -> tuple[Tokens, tuple[Tokens, ...]] | None:
        """A row's prompt and responses; none, and a count, if it is left out."""
        limit = self._limits.max_prompt
        try:
            tokens = self._prompts.encode(_as_prompt(prompt))
            if limit is not None and len(tokens) > limit:
                self.report.changed[f"left out: prompts of more than {limit} tokens"] += 1
                return None
            encoded = tuple(self._response(prompt, tokens, response) for response in responses)
        except InvalidRequest as error:
            self._refuse(row, error.message, "conversations that the chat template refuses")
            return None
        longest, positions = len(tokens) + max(map(len, encoded)), self._limits.max_positions
        if positions is not None and longest > positions:
            self._refuse(
                row,
                f"{longest} tokens, prompt and response together, are more than the {positions} positions of the "
                "model; cut responses with --max-response-tokens, leave long prompts out with --max-prompt-tokens",
                f"examples of more than {positions} tokens, the model's positions",
            )
            return None
        return tokens, encoded

    def _refuse(self, row: int, told: str, reason: str) -> None:
        """Count a row that cannot be used.

        Raises:
            InvalidConfiguration: bad rows are not to be skipped.
        """
        if not self._skip_bad_rows:
            raise InvalidConfiguration(f"row {row}: {told}, or leave such rows out with --skip-bad-rows")
        self.report.changed[f"left out: {reason}"] += 1
        self.report.first_refusal = self.report.first_refusal or f"row {row}: {told}"

    def _response(self, prompt: str | Messages, prompt_tokens: Tokens, response: Response) -> Tokens:
        before = self._prompts.text_of(_as_prompt(prompt))
        after = self._turn(prompt, before, response) if isinstance(prompt, list) else response.text
        tokens = self._following(prompt_tokens, before, after, is_rendered=isinstance(prompt, list))
        if not response.is_cut and self._end_tokens.isdisjoint(tokens):
            tokens.append(self._end_token)
        end = next((i for i, token in enumerate(tokens) if token in self._end_tokens), len(tokens))
        # What a template puts after the end of a turn is never generated.
        tokens = tokens[: end + 1]
        limit = self._limits.max_response
        if limit is not None and len(tokens) > limit:
            self.report.changed[f"cut: responses of more than {limit} tokens"] += 1
            tokens = tokens[:limit]
        return tokens

    def _turn(self, messages: Messages, before: str, response: Response) -> str:
        """The response as the template writes it after the prompt; as it is where a template rewrites prompt or answer.

        A model writes the space between a prompt and its answer itself: the template adds it where the answer lacks it.
        """
        text = response.text
        answered: list[Message] = [*messages, {"role": "assistant", "content": text}]  # type: ignore[list-item]
        whole = self._prompts.render(answered, is_answered=True)
        turn = whole.removeprefix(before)
        if not whole.startswith(before) or text.strip() not in turn:
            return text
        lead = turn[: max(0, turn.find(text))]
        space = lead if lead.isspace() else ""
        if text.startswith(space):
            turn, space = turn.removeprefix(space), ""
        return space + text if response.is_cut else turn

    def _following(self, prompt: Tokens, before: str, after: str, *, is_rendered: bool) -> Tokens:
        """The tokens of a text that follows a prompt: what the whole text has after the prompt's own tokens.

        Where a token of the whole text spans the border, those that decode to the text after the prompt's. A text
        encoded by itself is no answer to that: many tokenizers put a space before it.
        """
        whole = self._prompts.tokens_of(before + after, is_rendered=is_rendered)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        candidates = [tokens for anchor in ("", "\n", "a") if (tokens := self._after_anchor(anchor, after)) is not None]
        context = prompt[-NUM_CONTEXT_TOKENS:]
        wanted = self._decode(context) + after
        return next((tokens for tokens in candidates if self._decode([*context, *tokens]) == wanted), candidates[-1])

    def _after_anchor(self, anchor: str, text: str) -> Tokens | None:
        """A text's tokens after another text's; none if a token spans the border."""
        first, both = self._encode(anchor), self._encode(anchor + text)
        return both[len(first) :] if both[: len(first)] == first else None

    def _encode(self, text: str) -> Tokens:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _decode(self, tokens: Tokens) -> str:
        return str(self._tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False))


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
