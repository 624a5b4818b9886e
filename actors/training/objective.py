"""The losses that guides are trained with, on logits at response positions only.

Knows prompts and responses as token lists; not where they come from nor how the weights move.

Shapes: B sequences, L positions of prompt and response, T positions of the response, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The target of a position that holds padding."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts padded on their left and responses padded on their right, so that all responses start at one column."""

    tokens_BL: Tensor
    mask_BL: Tensor
    """1 where there is a token, 0 where there is padding."""

    targets_BT: Tensor
    """The response's tokens, `IGNORED` where there is padding."""

    @property
    def positions_BL(self) -> Tensor:
        """Positions as the model counts them: padding on the left takes none."""
        return (self.mask_BL.cumsum(1) - 1).clamp(min=0)


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Put prompts and their responses, neither of them empty, into one batch."""
    num_prompt = max(len(prompt) for prompt in prompts)
    num_response = max(len(response) for response in responses)
    tokens_BL = torch.zeros(len(prompts), num_prompt + num_response, dtype=torch.long)
    mask_BL = torch.zeros_like(tokens_BL)
    targets_BT = torch.full((len(prompts), num_response), IGNORED)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        filled = slice(num_prompt - len(prompt), num_prompt + len(response))
        tokens_BL[row, filled] = torch.tensor([*prompt, *response])
        mask_BL[row, filled] = 1
        targets_BT[row, : len(response)] = torch.tensor(response)
    return Batch(tokens_BL, mask_BL, targets_BT)


def response_logits(model: Any, batch: Batch) -> Tensor:
    """The model's logits for every token of the responses, float32 [B, T, V].

    The output layer runs on these positions alone: with a large vocabulary it is a good part of the cost.
    """
    length, num_response = batch.tokens_BL.shape[1], batch.targets_BT.shape[1]
    output = model(
        input_ids=batch.tokens_BL,
        attention_mask=batch.mask_BL,
        position_ids=batch.positions_BL,
        use_cache=False,
        # Indices, not a count: they copy the rows, and on a mere view of them the output layer is ten times as slow.
        logits_to_keep=torch.arange(length - num_response - 1, length - 1),
    )
    return output.logits.float()


def response_log_probs(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """log p(response | prompt): the tokens' log-probabilities summed over the response, [B]."""
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(targets_BT.shape).sum(1)


def arm_loss(chosen_B: Tensor, rejected_B: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta * (log p(chosen) - log p(rejected))), the mean over pairs.

    The inputs are summed response log-probabilities under the guide itself: no reference model, no length
    normalisation, no margin (GenARM, arXiv 2410.08193, equation 6).
    """
    return -F.logsigmoid(beta * (chosen_B - rejected_B)).mean()


def distillation_loss(logits_BTV: Tensor, teacher_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """KL(teacher || model) over the whole vocabulary, the mean over the responses' tokens, in nats."""
    teacher = teacher_BTV.flatten(0, 1).log_softmax(-1)
    probabilities = teacher.exp()
    entropy = -(probabilities * teacher).sum(-1)
    divergence = F.cross_entropy(logits_BTV.flatten(0, 1), probabilities, reduction="none") - entropy
    return divergence[targets_BT.flatten() != IGNORED].mean()
