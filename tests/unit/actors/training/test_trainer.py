"""The objectives as training computes them, against what the model itself says and losses written by hand."""

import math
from typing import Any

import pytest
import torch

from actors.training.derive import add_adapter, cut_layers
from actors.training.encoding import EncodedPair, EncodedText
from actors.training.objective import Batch
from actors.training.run import RunSettings
from actors.training.trainer import ArmObjective, DistillationObjective, DpoObjective, collate_examples
from cluster.errors import InvalidConfiguration
from tests.tiny import llama

# peft reads a property that transformers has renamed; nothing we can say differently.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PAIRS = [
    EncodedPair([5, 6, 7, 8], [1, 2], [3, 4, 5, 6]),
    EncodedPair([9], [10, 11, 12], [13]),
    EncodedPair([14, 15], [16], [17, 18]),
]


def log_prob(model: Any, prompt: list[int], response: list[int]) -> float:
    """Summed over the response, from the model's logits for this sequence alone."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return float(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(response)))


def batch() -> Batch:
    return Batch(**collate_examples(PAIRS))


def moved(model: Any, seed: int = 1) -> Any:
    """The model under an adapter that is no longer zero."""
    adapted = add_adapter(model, rank=4, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return adapted


def sigmoid_loss(differences: list[float]) -> float:
    return sum(math.log1p(math.exp(-difference)) for difference in differences) / len(differences)


def test_the_arm_loss_is_the_papers() -> None:
    model = llama()
    loss, figures = ArmObjective(beta=0.05).loss(model, batch())
    gaps = [log_prob(model, pair.prompt, pair.chosen) - log_prob(model, pair.prompt, pair.rejected) for pair in PAIRS]
    assert loss.item() == pytest.approx(sigmoid_loss([0.05 * gap for gap in gaps]), abs=1e-5)
    assert figures["margin"].item() == pytest.approx(sum(gaps) / 3, abs=1e-3)
    assert figures["accuracy"].item() == pytest.approx(sum(gap > 0 for gap in gaps) / 3)


def test_length_normalisation_and_margin_are_options() -> None:
    model = llama()
    loss, _ = ArmObjective(beta=2.0, margin=0.3, length_normalised=True).loss(model, batch())
    gaps = [
        log_prob(model, pair.prompt, pair.chosen) / len(pair.chosen)
        - log_prob(model, pair.prompt, pair.rejected) / len(pair.rejected)
        for pair in PAIRS
    ]
    assert loss.item() == pytest.approx(sigmoid_loss([2.0 * gap - 0.3 for gap in gaps]), abs=1e-5)


@pytest.mark.parametrize("is_adapter", [True, False])
def test_the_dpo_loss_is_against_the_model_before_training(is_adapter: bool) -> None:
    """The reference is the model without its adapter, or a copy of it."""
    reference = llama()
    model = moved(llama()) if is_adapter else llama(seed=5)
    loss, figures = DpoObjective(beta=0.1, reference=None if is_adapter else reference).loss(model, batch())
    gaps = [
        log_prob(model, pair.prompt, pair.chosen)
        - log_prob(reference, pair.prompt, pair.chosen)
        - log_prob(model, pair.prompt, pair.rejected)
        + log_prob(reference, pair.prompt, pair.rejected)
        for pair in PAIRS
    ]
    assert loss.item() == pytest.approx(sigmoid_loss([0.1 * gap for gap in gaps]), abs=1e-5)
    assert figures["margin"].item() == pytest.approx(sum(gaps) / 3, abs=1e-3)
    assert loss.requires_grad


def test_dpo_starts_at_log_two() -> None:
    loss, _ = DpoObjective(beta=0.1, reference=None).loss(add_adapter(llama(), rank=4, seed=0), batch())
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_distillation_is_the_mean_divergence_of_the_responses_tokens() -> None:
    teacher = llama()
    model = cut_layers(teacher, [0, 2])
    texts = [EncodedText([5, 6, 7], [1, 2, 3]), EncodedText([8], [4])]
    loss, _ = DistillationObjective(teacher).loss(model, Batch(**collate_examples(texts)))
    divergences = []
    for text in texts:
        tokens = torch.tensor([text.prompt + text.response])
        here = slice(len(text.prompt) - 1, -1)
        with torch.inference_mode():
            expected, found = (m(tokens).logits[0, here].double().log_softmax(-1) for m in (teacher, model))
        divergences += (expected.exp() * (expected - found)).sum(-1).tolist()
    assert loss.item() == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)


@pytest.mark.parametrize(
    ("workers", "micro_batch", "expected"), [(1, 32, 12), (2, 32, 6), (2, 4, 3), (3, 4, 4), (1, 5, 4), (12, 32, 1)]
)
def test_a_batch_is_shared_out_in_equal_parts(workers: int, micro_batch: int, expected: int) -> None:
    settings = RunSettings(model="m", batch_size=12, micro_batch=micro_batch)
    assert settings.micro_batch_for(workers) == expected


@pytest.mark.parametrize("workers", [5, 24])
def test_a_batch_that_cannot_be_shared_out_is_refused(workers: int) -> None:
    with pytest.raises(InvalidConfiguration, match=f"12 cannot be shared evenly by {workers} workers"):
        RunSettings(model="m", batch_size=12).micro_batch_for(workers)
