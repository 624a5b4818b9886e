"""Which guides fit which base: tokens must agree one by one where both vocabularies have them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What of a model's vocabulary guidance depends on."""

    tokens: Sequence[str | None]
    """Token strings by id, as the tokenizer has them; None where it has none."""

    width: int
    """Columns of the model's logits; often padded beyond the tokenizer's tokens."""

    end_tokens: frozenset[int]
    """Ids that end a text."""

    @property
    def digest(self) -> str:
        """Of the tokens: equal where they are."""
        return hashlib.sha256(repr(list(self.tokens)).encode()).hexdigest()[:16]


def check_vocabulary(base: Vocabulary, guide: Vocabulary, *, guide_name: str) -> None:
    """Check that a guide can steer a base.

    Raises:
        InvalidConfiguration: the tokenizers differ on a token that both have (the first one is named), or the guide
            can give no logit to one of the base's end tokens, so that no text would ever end.
    """
    for token, (ours, theirs) in enumerate(zip(base.tokens, guide.tokens, strict=False)):
        if ours is not None and theirs is not None and ours != theirs:
            raise InvalidConfiguration(
                f"guide {guide_name!r} has another tokenizer than the base: token {token} is {theirs!r} in the guide "
                f"and {ours!r} in the base. Use a guide that was trained from a model with the base's tokenizer."
            )
    unreachable = sorted(end for end in base.end_tokens if end >= guide.width)
    if unreachable:
        raise InvalidConfiguration(
            f"guide {guide_name!r} has {guide.width} output columns, too few for the base's end token "
            f"{unreachable[0]}: no guided text could end. Use a guide whose vocabulary includes it."
        )
