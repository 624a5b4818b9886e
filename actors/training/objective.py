"""The losses that guides are trained with, on logits at response positions only.

Knows prompts and responses as token lists; not where they come from nor how the weights move.

Shapes: B sequences, L positions of prompt and response, T positions of the response, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The target of a position that holds padding."""

CHUNK = 32
"""Rows over the vocabulary that are worked on at once."""


OUTPUT_CHUNK = 128
"""Rows whose products with the output layer are made at once: fewer leave a processor's cores idle."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts padded on their left and responses padded on their right, so that all responses start at one column."""

    tokens_BL: Tensor
    mask_BL: Tensor
    """1 where there is a token, 0 where there is padding."""

    targets_BT: Tensor
    """The response's tokens, `IGNORED` where there is padding."""

    weights_B: Tensor
    """What each token of a response counts in a mean over tokens, such that the mean over rows is the loss."""

    @property
    def num_targets_B(self) -> Tensor:
        """Tokens of each response."""
        return (self.targets_BT != IGNORED).sum(1)

    @property
    def positions_BL(self) -> Tensor:
        """Positions as the model counts them: padding on the left takes none."""
        return (self.mask_BL.cumsum(1) - 1).clamp(min=0)


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    weights: Sequence[float] | None = None,
) -> Batch:
    """Put prompts and their responses, neither of them empty, into one batch; each token counts alike by default."""
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
    weights = weights or token_weights([len(response) for response in responses])
    return Batch(tokens_BL, mask_BL, targets_BT, torch.tensor(weights))


def token_weights(lengths: Sequence[int]) -> list[float]:
    """Return `Batch.weights_B` of responses that are one batch together, of these lengths."""
    return [len(lengths) / sum(lengths)] * len(lengths)


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


def guided_logits(base_BTV: Tensor, guide_BTU: Tensor, weight: float) -> Tensor:
    """`actors.guidance.merge` on whole responses, with a gradient: base + weight * guide, [B, T, V].

    What a guide has beyond V is cut off, and what it lacks of V is forbidden.
    """
    num_missing = base_BTV.shape[-1] - guide_BTU.shape[-1]
    weighted_BTU = weight * guide_BTU[..., : base_BTV.shape[-1]]
    if num_missing > 0:
        weighted_BTU = F.pad(weighted_BTU, (0, num_missing), value=-torch.inf)
    return base_BTV + weighted_BTU


def response_log_probs(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """log p(response | prompt): the tokens' log-probabilities summed over the response, [B]."""
    log_probs_N: Tensor = _TargetLogProbs.apply(logits_BTV.flatten(0, 1), targets_BT.flatten())  # type: ignore[no-untyped-call]
    return log_probs_N.view(targets_BT.shape).sum(1)


def steered_law(
    shift_BTD: Tensor, hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What an output layer without bias says of responses, without and with a shift of the hidden states before it.

    Rows without a target cost nothing, and logits are never all there. Gradients reach the shift alone.

    Args:
        shift_BTD: What is added to the hidden states.
        hidden_BTD: Those of a frozen model.
        weight_VD: The output layer.
        targets_BT: The responses' tokens.

    Returns:
        log p(response) without the shift and with it, and KL(with it || without it) summed over the response, each [B],
        in nats.
    """
    is_target_BT = targets_BT != IGNORED
    chosen = (shift_BTD[is_target_BT], hidden_BTD[is_target_BT], weight_VD, targets_BT[is_target_BT])
    by_token = _SteeredLaw.apply(*chosen)  # type: ignore[no-untyped-call]
    before_B, after_B, divergence_B = (
        of_token_N.new_zeros(targets_BT.shape).masked_scatter(is_target_BT, of_token_N).sum(1)
        for of_token_N in by_token
    )
    return before_B, after_B, divergence_B


def divergence(guided_BTV: Tensor, base_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """KL(guided || base) summed over the responses' tokens, [B], in nats."""
    guided_BTV, base_BTV = guided_BTV.log_softmax(-1), base_BTV.log_softmax(-1)
    # A token that a guide forbids has probability 0, and adds nothing.
    by_token_BT = (guided_BTV.exp() * (guided_BTV - base_BTV).nan_to_num(neginf=0.0)).sum(-1)
    return (by_token_BT * (targets_BT != IGNORED)).sum(1)


def arm_loss(chosen_B: Tensor, rejected_B: Tensor, *, beta: float, margin: float = 0.0) -> Tensor:
    """-log sigmoid(beta * (log p(chosen) - log p(rejected)) - margin), the mean over pairs.

    With summed response log-probabilities under the guide itself and no margin this is GenARM's objective (arXiv
    2410.08193, equation 6): no reference model, no length normalisation.
    """
    return -F.logsigmoid(beta * (chosen_B - rejected_B) - margin).mean()


def dpo_loss(chosen_B: Tensor, rejected_B: Tensor, reference: tuple[Tensor, Tensor], *, beta: float) -> Tensor:
    """-log sigmoid(beta * (log p/p_ref(chosen) - log p/p_ref(rejected))), the mean over pairs (arXiv 2305.18290).

    Args:
        chosen_B: Summed response log-probabilities of the chosen responses.
        rejected_B: Those of the rejected ones.
        reference: The same two under the model as it was before training.
        beta: How dear it is to move away from the reference.
    """
    chosen_reference_B, rejected_reference_B = reference
    return arm_loss(chosen_B - chosen_reference_B, rejected_B - rejected_reference_B, beta=beta)


def distillation_loss(logits_BTV: Tensor, teacher_BTV: Tensor, targets_BT: Tensor, weights_B: Tensor) -> Tensor:
    """KL(teacher || model) over the whole vocabulary, in nats: the weighted sum over a response's tokens, mean over B.

    With `Batch.weights_B` it is the mean over the batch's tokens. No gradient reaches the teacher.
    """
    is_target_N = targets_BT.flatten() != IGNORED
    divergence_N: Tensor = _Divergence.apply(logits_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1), is_target_N)  # type: ignore[no-untyped-call]
    return (divergence_N.view(targets_BT.shape).sum(1) * weights_B).mean()


# What follows runs over the vocabulary a few rows at a time, so that each pass finds the last one's numbers in the
# processor's cache; plain tensor code makes half a dozen passes through memory, which took longer than the model.


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


class _TargetLogProbs(torch.autograd.Function):
    """log softmax(logits) at the targets, [N]; 0 where the target is `IGNORED`."""

    @staticmethod
    def forward(context: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        log_sums_N = torch.cat([logits_NV[rows].logsumexp(-1) for rows in _chunks(len(logits_NV), CHUNK)])
        is_target_N = targets_N != IGNORED
        targets_N = targets_N.clamp(min=0)
        context.save_for_backward(logits_NV, log_sums_N, targets_N, is_target_N)
        return (logits_NV.gather(1, targets_N[:, None])[:, 0] - log_sums_N) * is_target_N

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits_NV, log_sums_N, targets_N, is_target_N = context.saved_tensors
        gradient_N = gradients[0] * is_target_N
        gradient_NV = torch.empty_like(logits_NV)
        for rows in _chunks(len(logits_NV), CHUNK):
            chunk = torch.sub(logits_NV[rows], log_sums_N[rows, None], out=gradient_NV[rows])
            chunk.exp_().mul_(-gradient_N[rows, None])
            chunk.scatter_add_(1, targets_N[rows, None], gradient_N[rows, None])
        return gradient_NV, None


class _SteeredLaw(torch.autograd.Function):
    """`steered_law` by token, [N]; its gradients are made on the way forward."""

    @staticmethod
    def forward(
        context: Any, shift_ND: Tensor, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        before_N, after_N, divergence_N = hidden_ND.new_empty(3, len(hidden_ND), dtype=torch.float32)
        by_log_prob_ND, by_divergence_ND = torch.empty(2, *hidden_ND.shape, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows in _chunks(len(hidden_ND), OUTPUT_CHUNK):
                targets_C1, hidden_CD = targets_N[rows, None], hidden_ND[rows].float()
                base_CV, steered_CV = (
                    F.linear(states.to(weight_VD.dtype), weight_VD).float().log_softmax(-1)
                    for states in (hidden_CD, hidden_CD + shift_ND[rows])
                )
                before_N[rows] = base_CV.gather(1, targets_C1)[:, 0]
                after_N[rows] = steered_CV.gather(1, targets_C1)[:, 0]
                probabilities_CV = steered_CV.exp()
                ratio_CV = steered_CV.sub_(base_CV)
                divergence_N[rows] = torch.linalg.vecdot(probabilities_CV, ratio_CV)
                ratio_CV.sub_(divergence_N[rows, None]).mul_(probabilities_CV)
                by_divergence_ND[rows] = (ratio_CV.to(weight_VD.dtype) @ weight_VD).float()
                error_CV = probabilities_CV.neg_()
                error_CV.scatter_add_(1, targets_C1, torch.ones_like(error_CV[:, :1]))
                by_log_prob_ND[rows] = (error_CV.to(weight_VD.dtype) @ weight_VD).float()
        context.save_for_backward(by_log_prob_ND, by_divergence_ND)
        context.mark_non_differentiable(before_N)
        return before_N, after_N, divergence_N

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        by_log_prob_ND, by_divergence_ND = context.saved_tensors
        _, of_log_prob_N, of_divergence_N = gradients
        return by_log_prob_ND * of_log_prob_N[:, None] + by_divergence_ND * of_divergence_N[:, None], None, None, None


class _Divergence(torch.autograd.Function):
    """KL(teacher || model) by row, [N]; 0 where there is no target. Its gradient is made on the way forward."""

    @staticmethod
    def forward(context: Any, logits_NV: Tensor, teacher_NV: Tensor, is_target_N: Tensor) -> Tensor:
        divergence_N = logits_NV.new_empty(len(logits_NV))
        gradient_NV = torch.empty_like(logits_NV)
        buffers_3CV = logits_NV.new_empty(3, CHUNK, logits_NV.shape[1])
        for rows in _chunks(len(logits_NV), CHUNK):
            teacher, probabilities, model = buffers_3CV[:, : rows.stop - rows.start]
            torch.log_softmax(teacher_NV[rows], -1, out=teacher)
            torch.log_softmax(logits_NV[rows], -1, out=model)
            torch.exp(teacher, out=probabilities)
            divergence_N[rows] = torch.linalg.vecdot(probabilities, teacher.sub_(model))
            torch.sub(model.exp_(), probabilities, out=gradient_NV[rows])
        context.save_for_backward(gradient_NV, is_target_N)
        return divergence_N * is_target_N

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient_NV, is_target_N = context.saved_tensors
        return gradient_NV.mul_((gradients[0] * is_target_N)[:, None]), None, None
