"""What a request changes of its logits before it draws: penalties, biases, a least length, and a grammar's mask.

`reference` does the same one token at a time. A row is float32 [V]; a sequence that asks for nothing has no `Shaper`.
"""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.api import Shaping
from actors.guidance.grammar import GrammarMask

Floats = NDArray[np.float32]


class Shaper:
    """One sequence's shaping, with what depends on the tokens so far. Made again from them, it is the same."""

    def __init__(
        self,
        shaping: Shaping,
        *,
        prompt: Sequence[int],
        end_tokens: Collection[int],
        mask: GrammarMask | None = None,
    ) -> None:
        """Begin behind a prompt.

        Args:
            shaping: what the request asks for.
            prompt: in the base's tokens.
            end_tokens: those that end the output.
            mask: the grammar's, at its beginning.
        """
        self._shaping = shaping
        self._mask = mask
        self._num_tokens = 0
        self._counts: Counter[int] = Counter()
        self._seen = np.array(sorted(set(prompt)), np.int64)
        self._biased = np.fromiter(shaping.logit_bias, np.int64)
        self._bias = np.fromiter(shaping.logit_bias.values(), np.float32)
        self._ends = np.array(sorted(end_tokens), np.int64)

    @property
    def is_masked(self) -> bool:
        """Whether a grammar says which tokens may come."""
        return self._mask is not None

    def append(self, token: int) -> None:
        """Take the next token of the output."""
        self._num_tokens += 1
        self._counts[token] += 1
        if self._counts[token] == 1:
            self._seen = np.union1d(self._seen, [token])
        if self._mask is not None:
            self._mask.append(token)

    def shape_base(self, z_V: Floats) -> None:
        """Change the base's logits in place, before guides are added.

        The repetition penalty (CTRL, arXiv 1909.05858, section 4.1) depends on a constant that is added to all
        logits, and merged logits have an arbitrary one.
        """
        penalty = self._shaping.repetition_penalty
        if penalty != 1:
            seen = self._seen[self._seen < len(z_V)]
            logits = z_V[seen]
            z_V[seen] = np.where(logits > 0, logits / np.float32(penalty), logits * np.float32(penalty))

    def shape_merged(self, z_V: Floats) -> None:
        """Change the merged logits in place, before temperature."""
        shaping = self._shaping
        if self._counts and (shaping.frequency_penalty or shaping.presence_penalty):
            counts = np.fromiter(self._counts.values(), np.float64)
            penalties = shaping.frequency_penalty * counts + shaping.presence_penalty
            z_V[np.fromiter(self._counts, np.int64)] -= penalties.astype(np.float32)
        if len(self._biased):
            z_V[self._biased] += self._bias
        if self._num_tokens < shaping.min_tokens:
            z_V[self._ends[self._ends < len(z_V)]] = -np.inf
        if self._mask is not None:
            self._mask.forbid(z_V)
