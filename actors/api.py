"""What callers, gateways and coordinators hand each other: how a request draws, and the pieces of its answer.

Imports nothing that computes, so that a process that holds no model needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

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


class Usage(TypedDict):
    """Token counts, as OpenAI's API names them; the prompt's are the base's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Piece(TypedDict):
    """What a sequence wrote since the piece before it. The last one has a finish reason."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    usage: Usage
    seed: int


@dataclass(frozen=True, slots=True)
class Resume:
    """What the reader of an answer had received of it when its writer was lost."""

    token_ids: Sequence[int]
    num_chars: int
    """Of its text."""
