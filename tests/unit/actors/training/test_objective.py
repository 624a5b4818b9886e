"""The ARM loss, the distillation loss, and log-probabilities at response positions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from actors.training.objective import IGNORED, arm_loss, collate, distillation_loss, response_log_probs, response_logits
from tests.tiny import VOCABULARY_SIZE, llama

Loss = Callable[[torch.Tensor], torch.Tensor]

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
RESPONSES = [[1, 2], [3, 4, 5, 6, 7], [8]]


def _by_hand(model: Any, prompt: list[int], response: list[int]) -> Any:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(response))


@torch.inference_mode()
def test_response_log_probs_equal_those_of_each_sequence_run_alone() -> None:
    model = llama()
    batch = collate(PROMPTS, RESPONSES)
    found = response_log_probs(response_logits(model, batch), batch.targets_BT)
    expected = torch.stack([_by_hand(model, *text) for text in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_logits_come_at_response_positions_only() -> None:
    logits_BTV = response_logits(llama(), collate(PROMPTS, RESPONSES))
    assert logits_BTV.shape == (3, 5, VOCABULARY_SIZE)
    assert logits_BTV.dtype == torch.float32


def test_arm_loss_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen_B, rejected_B = -50 * torch.rand(2, 7, generator=generator)
    terms = [
        -math.log(1 / (1 + math.exp(-0.1 * (chosen - rejected))))
        for chosen, rejected in zip(chosen_B.tolist(), rejected_B.tolist(), strict=True)
    ]
    assert arm_loss(chosen_B, rejected_B, beta=0.1).item() == pytest.approx(sum(terms) / 7, rel=1e-5)


def test_arm_loss_stays_finite_far_out() -> None:
    assert arm_loss(torch.tensor([-1e5]), torch.tensor([0.0]), beta=1.0).item() == pytest.approx(1e5)


def test_distillation_loss_is_the_divergence_at_the_tokens_that_are_there() -> None:
    batch = collate(PROMPTS, RESPONSES)
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 5, 11, generator=generator)
    terms = []
    for row, response in enumerate(RESPONSES):
        for position in range(len(response)):
            p, q = teacher[row, position].softmax(-1), student[row, position].softmax(-1)
            terms.append((p * (p / q).log()).sum().item())
    found = distillation_loss(student, teacher, batch.targets_BT, batch.weights_B).item()
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_a_model_has_nothing_to_learn_from_itself() -> None:
    batch = collate(PROMPTS, RESPONSES)
    logits_BTV = torch.randn(3, 5, 11, requires_grad=True)
    loss = distillation_loss(logits_BTV, logits_BTV.detach(), batch.targets_BT, batch.weights_B)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert logits_BTV.grad is not None
    assert logits_BTV.grad.abs().max().item() < 1e-6


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_gradients_are_those_of_plain_tensor_code(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses run over the vocabulary a few rows at a time, with gradients of their own."""
    monkeypatch.setattr("actors.training.objective.CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(2, 4, 11, generator=generator) for _ in range(2))
    targets = torch.tensor([[1, 2, 3, 4], [5, 6, IGNORED, IGNORED]])
    is_target = targets != IGNORED

    def plain_log_probs(logits: torch.Tensor) -> torch.Tensor:
        chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return (chosen * is_target).sum(1)

    def plain_divergence(logits: torch.Tensor) -> torch.Tensor:
        expected = teacher.log_softmax(-1)
        return ((expected.exp() * (expected - logits.log_softmax(-1))).sum(-1) * is_target).sum() / is_target.sum()

    weights = torch.tensor([0.7, -1.3])
    losses: list[tuple[Loss, Loss]] = [
        (lambda z: (response_log_probs(z, targets) * weights).sum(), lambda z: (plain_log_probs(z) * weights).sum()),
        (
            lambda z: 2.5 * distillation_loss(z, teacher, targets, torch.full((2,), 2 / 6)),
            lambda z: 2.5 * plain_divergence(z),
        ),
    ]
    for found, expected in losses:
        gradients = []
        for loss in (found, expected):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf)
            torch.autograd.backward(value)
            gradients.append((value, leaf.grad))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
