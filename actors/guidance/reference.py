"""The oracle: guided generation in one process, one sequence, as plainly as it can be written.

It runs transformers models directly and draws with noise over the whole vocabulary. Every other path (batched,
remote, over any transport) must give the same tokens.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actors.api import Sampling, Shaping
from actors.guidance.merge import Guidance, merge
from actors.guidance.noise import WORDS, noise
from actors.guidance.sampling import keep_likely, scale


@dataclass(slots=True, kw_only=True)
class Voice:
    """A model with the prompt in its own tokens and, for a guide, its weight."""

    model: Any
    """A transformers causal language model."""

    prompt: Sequence[int]
    weight: float = 1.0


@dataclass(slots=True)
class ReferenceText:
    """What the oracle wrote."""

    tokens: list[int] = field(default_factory=list)
    """The drawn tokens, with the end token if one was drawn."""

    margins: list[float] = field(default_factory=list)
    """For each token, how far the best score (noise included) was ahead of the second."""

    laws: list[Tensor] = field(default_factory=list)
    """For each token, log probabilities in float64: the guided distribution's, then each voice's own, [1 + voices, V].
    Where a guide has fewer tokens than the base, its own end there with -inf."""


@torch.inference_mode()
def generate(
    base: Voice,
    guides: Sequence[Voice] = (),
    *,
    sampling: Sampling | None = None,
    shaping: Shaping | None = None,
    max_tokens: int,
    end_tokens: Collection[int] = (),
    spelled: Collection[int] | None = None,
    sample: int = 0,
    is_legal: Callable[[Sequence[int], int], bool] | None = None,
    keeps_laws: bool = False,
) -> ReferenceText:
    """Write up to `max_tokens` tokens from the guided distribution.

    Guides of weight 0 are left out; the others are summed in the order given. `spelled` are the ids that stand for
    tokens, with the end tokens; columns of the logits for other ids are never drawn. All are if it is absent.
    `is_legal` says of the output so far and a token whether the token may come next.
    """
    sampling = sampling or Sampling()
    shaping = shaping or Shaping()
    guides = [guide for guide in guides if guide.weight != 0]
    voices = [base, *guides]
    caches: list[Any] = [None] * len(voices)
    appended: list[Sequence[int]] = [voice.prompt for voice in voices]
    text = ReferenceText()
    while len(text.tokens) < max_tokens and not (text.tokens and text.tokens[-1] in end_tokens):
        rows = []
        for i, voice in enumerate(voices):
            output = voice.model(
                input_ids=torch.tensor([appended[i]]), past_key_values=caches[i], use_cache=True, logits_to_keep=1
            )
            caches[i] = output.past_key_values
            rows.append(output.logits[0, -1])
        guidance = [Guidance(guide.weight, row) for guide, row in zip(guides, rows[1:], strict=True)]
        if keeps_laws:
            text.laws.append(laws(rows, guidance))
        base_row = penalize_repetition(rows[0], shaping, [*base.prompt, *text.tokens])
        z_1V = merge([base_row], [guidance])
        if spelled is not None:
            z_1V[0, [column for column in range(z_1V.shape[1]) if column not in spelled]] = -torch.inf
        z_1V = shape(z_1V, shaping, text.tokens, end_tokens)
        if is_legal is not None:
            illegal = [token for token in range(z_1V.shape[1]) if not is_legal(text.tokens, token)]
            z_1V[0, illegal] = -torch.inf
        scores_V = noisy_scores(z_1V, sampling, len(text.tokens), sample)
        best, second = scores_V.topk(2).values.tolist()
        text.tokens.append(int(scores_V.argmax()))
        text.margins.append(best - second)
        appended = [text.tokens[-1:]] * len(voices)
    return text


def laws(rows: Sequence[Tensor], guidance: Sequence[Guidance]) -> Tensor:
    """Return the log probabilities of the guided distribution and of each voice alone, float64 [1 + voices, V]."""
    z_V = merge([rows[0]], [guidance])[0]
    own = [torch.full_like(z_V, -torch.inf, dtype=torch.float64) for _ in rows]
    for law_V, row in zip(own, rows, strict=True):
        num_common = min(len(law_V), len(row))
        law_V[:num_common] = row[:num_common].double().log_softmax(-1)
    return torch.stack([z_V.double().log_softmax(-1), *own])


def penalize_repetition(z_V: Tensor, shaping: Shaping, tokens: Collection[int]) -> Tensor:
    """Return the base's logits with those of tokens in prompt and output made smaller."""
    z_V = z_V.clone().float()
    for token in set(tokens):
        logit, penalty = z_V[token], shaping.repetition_penalty
        z_V[token] = logit / penalty if logit > 0 else logit * penalty
    return z_V


def shape(z_1V: Tensor, shaping: Shaping, output: Sequence[int], end_tokens: Collection[int]) -> Tensor:
    """Return the merged logits with penalties, bias and the least length. Changes them in place."""
    for token, count in Counter(output).items():
        z_1V[0, token] -= shaping.frequency_penalty * count + shaping.presence_penalty
    for token, bias in shaping.logit_bias.items():
        z_1V[0, token] += bias
    if len(output) < shaping.min_tokens:
        z_1V[0, list(end_tokens)] = -torch.inf
    return z_1V


def noisy_scores(z_1V: Tensor, sampling: Sampling, position: int, sample: int) -> Tensor:
    """What the draw maximises, float64 [V], with noise for every token."""
    if sampling.is_greedy:
        return z_1V[0].double()
    scores_V = keep_likely(scale(z_1V, [sampling]), [sampling])[0]
    blocks = torch.arange(-(-len(scores_V) // WORDS))
    counters = torch.tensor([position, sample, sampling.signed_seed])
    return scores_V + noise(blocks, *counters).flatten()[: len(scores_V)]
