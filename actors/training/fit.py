"""The optimisation loop: batches in, steps of AdamW under a cosine schedule, one report per step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

WARMUP_SHARE = 0.04
"""Share of the steps over which the learning rate rises from zero."""

MAX_GRADIENT_NORM = 1.0


def fit(
    model: Any,
    batches: Iterable[Item],
    loss: Callable[[Item], Tensor],
    *,
    num_steps: int,
    learning_rate: float,
    report: Callable[[int, float], None],
) -> None:
    """Train what is trainable in `model` for `num_steps` steps, one batch each.

    Args:
        model: A module; parameters that need no gradient stay as they are.
        batches: At least `num_steps` batches.
        loss: The scalar to minimise, of one batch.
        num_steps: Length of the cosine schedule.
        learning_rate: Its highest value.
        report: Called after every step with the number of steps done and the loss.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share_of_rate(step, num_steps))
    model.train()
    for step, batch in zip(range(num_steps), batches, strict=False):
        value = loss(batch)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        report(step + 1, value.item())
    model.eval()


def _share_of_rate(step: int, num_steps: int) -> float:
    num_warmup = max(1, round(num_steps * WARMUP_SHARE))
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))
