"""Preference data from a model alone: answers sampled in large batches, and pairs of them by their rewards.

Knows tokens and rewards; neither where rewards come from nor which files hold what.

Shapes: B sequences, L positions so far, V vocabulary.
"""

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def sample_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    max_tokens: int,
    end_token: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """Draw `num_samples` responses to each prompt from the model at a temperature above 0, all in one batch.

    Prompts of about the same length waste the least on padding.

    Returns:
        For each prompt its responses: up to `max_tokens` tokens each, the end token included if it was drawn.
    """
    rows = _sample(model, prompts, num_samples, max_tokens, end_token, generator, temperature)
    return [rows[i : i + num_samples] for i in range(0, len(rows), num_samples)]


@torch.inference_mode()
def _sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    max_tokens: int,
    end_token: int,
    generator: torch.Generator,
    temperature: float,
) -> list[list[int]]:
    """The prompts run once each; their cache is then shared out to the samples."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BL = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BL = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model(
        input_ids=tokens_BL,
        attention_mask=mask_BL,
        position_ids=(mask_BL.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(num_samples)
    mask_BL = mask_BL.repeat_interleave(num_samples, 0)
    logits_BV = output.logits[:, -1].repeat_interleave(num_samples, 0)
    drawn: list[Tensor] = []
    ended_B = torch.zeros(len(mask_BL), dtype=torch.bool)
    for _ in range(max_tokens):
        probabilities_BV = (logits_BV.float() / temperature).softmax(-1)
        drawn.append(torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0])
        ended_B |= drawn[-1] == end_token
        if len(drawn) == max_tokens or ended_B.all():
            break
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], 1)
        output = model(
            input_ids=drawn[-1][:, None],
            attention_mask=mask_BL,
            position_ids=mask_BL.sum(1, keepdim=True) - 1,
            past_key_values=cache,
        )
        logits_BV = output.logits[:, -1]
    return [_until(end_token, row) for row in torch.stack(drawn, 1).tolist()]


def _until(end_token: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(end_token) + 1] if end_token in tokens else tokens


def answer_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pending: Collection[int],
    *,
    num_samples: int,
    max_tokens: int,
    end_token: int,
    temperature: float,
    seed: int,
    batch: int,
) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield the index of every pending prompt with its responses, `batch` prompts of about the same length at a time.

    All prompts together decide which are in a batch, and its first one's rank by length which noise it draws with: the
    prompts that are pending get what they would have got had all been.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch):
        members = by_length[start : start + batch]
        if not any(i in pending for i in members):
            continue
        answers = sample_answers(
            model,
            [prompts[i] for i in members],
            num_samples=num_samples,
            max_tokens=max_tokens,
            end_token=end_token,
            generator=torch.Generator().manual_seed(seed + start),
            temperature=temperature,
        )
        yield from ((i, drawn) for i, drawn in zip(members, answers, strict=True) if i in pending)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """Which two answers to a prompt become a pair."""

    margin: float = 0.0
    """Smallest difference of their rewards; equal rewards have no order and never make a pair."""

    max_length_difference: int | None = None
    """Largest difference of their lengths, in tokens. Summed log-probabilities of answers of different lengths differ
    by nats for every token that one has more: such pairs would have the largest gradients and say little of the reward.
    """

    limit: int | None = None
    """At most so many pairs of a prompt, drawn at random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """The pairs among the answers to one prompt, and what became of the others."""

    pairs: list[tuple[int, int]]
    """Indices of the better and of the worse answer."""

    num_compared: int
    """Pairs of answers whose texts are different and not empty."""

    num_within_margin: int
    num_unlike_in_length: int
    """Of those beyond the margin."""


def pair_answers(
    texts: Sequence[str], lengths: Sequence[int], rewards: Sequence[float], rules: PairRules, rng: random.Random
) -> Pairing:
    """Pair the answers to one prompt with every clearly worse one that the rules allow.

    Args:
        texts: The answers; empty ones are left out, and two that are the same are never compared.
        lengths: Their lengths in tokens.
        rewards: Higher is better.
        rules: What makes a pair.
        rng: Draws which pairs stay where there are more than `rules.limit`.
    """
    pairs: list[tuple[int, int]] = []
    num_compared = num_within_margin = num_unlike_in_length = 0
    for i, j in itertools.combinations(range(len(texts)), 2):
        if not texts[i].strip() or not texts[j].strip() or texts[i] == texts[j]:
            continue
        num_compared += 1
        difference = abs(rewards[i] - rewards[j])
        if difference == 0 or difference < rules.margin:
            num_within_margin += 1
        elif rules.max_length_difference is not None and abs(lengths[i] - lengths[j]) > rules.max_length_difference:
            num_unlike_in_length += 1
        else:
            pairs.append((i, j) if rewards[i] > rewards[j] else (j, i))
    if rules.limit is not None and len(pairs) > rules.limit:
        pairs = [pairs[k] for k in sorted(rng.sample(range(len(pairs)), rules.limit))]
    return Pairing(
        pairs=pairs,
        num_compared=num_compared,
        num_within_margin=num_within_margin,
        num_unlike_in_length=num_unlike_in_length,
    )
