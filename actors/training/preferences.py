"""Preference data from a model alone: answers sampled in large batches, paired by a reward.

Shapes: B sequences, L positions so far, V vocabulary; P prompts, K answers to each.
"""

from collections.abc import Sequence
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
) -> list[list[list[int]]]:
    """Draw `num_samples` responses to each prompt from the model at temperature 1, all in one batch.

    Prompts of about the same length waste the least on padding.

    Returns:
        For each prompt its responses: up to `max_tokens` tokens each, the end token included if it was drawn.
    """
    rows = _sample(model, prompts, num_samples, max_tokens, end_token, generator)
    return [rows[i : i + num_samples] for i in range(0, len(rows), num_samples)]


@torch.inference_mode()
def _sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    max_tokens: int,
    end_token: int,
    generator: torch.Generator,
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
        drawn.append(torch.multinomial(logits_BV.float().softmax(-1), 1, generator=generator)[:, 0])
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


def pair_answers(rewards_PK: Tensor, *, margin: float) -> tuple[Tensor, Tensor]:
    """Pair every answer with every clearly worse one to the same prompt.

    Args:
        rewards_PK: Rewards of K answers to each of P prompts; higher is better, NaN is never compared.
        margin: Pairs whose rewards differ by less are left out: their order says little.

    Returns:
        Indices of the better and of the worse answers, both [N], into the P * K answers laid end to end.
    """
    num_answers = rewards_PK.shape[1]
    prompts, better, worse = (rewards_PK[:, :, None] - rewards_PK[:, None, :] >= margin).nonzero(as_tuple=True)
    return prompts * num_answers + better, prompts * num_answers + worse
