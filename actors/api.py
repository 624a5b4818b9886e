"""What callers, gateways and coordinators hand each other: how a request draws, and the pieces of its answer.

Imports nothing that computes, so that a process that holds no model needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request draws its tokens."""

    temperature: float = 1.0
    """Of the guided distribution; 0 is greedy."""

    top_k: int = 0
    """Keep the k most probable tokens, the lower ones of those that tie; 0 keeps all."""

    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities reach p, after top_k, the lower ones of those that tie;
    1 keeps all."""

    min_p: float = 0.0
    """Keep the tokens at least min_p times as probable as the best, with all that tie; 0 keeps all."""

    seed: int = 0
    """Any integer; its low 64 bits key the noise."""

    @property
    def is_greedy(self) -> bool:
        """Whether the draw is the plain argmax."""
        return self.temperature == 0

    @property
    def signed_seed(self) -> int:
        """The int64 with the seed's low 64 bits."""
        return (self.seed + 2**63) % 2**64 - 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What one request changes of its logits before it draws. Each part is off unless it is given."""

    repetition_penalty: float = 1.0
    """For tokens that prompt or output hold: the base's logit is divided by it if positive, else multiplied."""

    frequency_penalty: float = 0.0
    """Taken from a token's merged logit for each time that the output holds it."""

    presence_penalty: float = 0.0
    """Taken once from those that the output holds."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the merged logits, by token."""

    min_tokens: int = 0
    """Length of the output before which no token can end it."""

    @property
    def is_none(self) -> bool:
        """Whether nothing is changed."""
        return self == Shaping()


@dataclass(frozen=True, slots=True)
class Format:
    """The form that an answer must have."""

    kind: Literal["json", "regex", "choice", "grammar"]
    text: str
    """A JSON schema, a regular expression, a JSON list of texts, or a grammar in GBNF."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Which log probabilities one request wants to see."""

    num_top: int = 0
    """Of so many of the most probable tokens, beside the drawn one's."""

    has_details: bool = False
    """Whether each model's own are shown too."""


class TokenScore(TypedDict):
    """A token and its log probability under the guided distribution, whatever was done to it before the draw."""

    token: int
    text: str
    bytes: list[int]
    """Of the text, also where they are only part of a character."""

    logprob: float | None
    """None for the first token of a prompt, which nothing comes before."""

    voices: NotRequired[dict[str, float]]
    """Each model's own log probability, by its name."""


class Scores(TypedDict):
    """What there is to say of one place of an answer."""

    drawn: TokenScore
    top: list[TokenScore]
    """The most probable tokens, the best first."""

    log_z: NotRequired[float]
    """logprob = base + sum of weight * guide - log_z."""


class Usage(TypedDict):
    """Token counts, as OpenAI's API names them; the prompt's are the base's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptPiece(TypedDict):
    """What an answer begins with that echoes its prompt."""

    text: str
    scores: list[Scores]
    """Of the prompt's tokens, where they were asked for."""


class Piece(TypedDict):
    """What a sequence wrote since the piece before it. The last one has a finish reason."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    usage: Usage
    seed: int
    scores: NotRequired[list[Scores]]
    """Of each token, where they were asked for."""

    prompt_echo: NotRequired[PromptPiece]
    """In the first piece of an answer that echoes it."""


def join(pieces: Sequence[Piece]) -> Piece:
    """Return an answer's pieces, all of them, as one."""
    whole: Piece = {
        **pieces[-1],
        "text": "".join(piece["text"] for piece in pieces),
        "token_ids": [token for piece in pieces for token in piece["token_ids"]],
    }
    if "prompt_echo" in pieces[0]:
        whole["prompt_echo"] = pieces[0]["prompt_echo"]
    if "scores" in pieces[-1]:
        whole["scores"] = [scores for piece in pieces for scores in piece["scores"]]
    return whole


@dataclass(frozen=True, slots=True)
class Resume:
    """What the reader of an answer had received of it when its writer was lost."""

    token_ids: Sequence[int]
    num_chars: int
    """Of its text."""
