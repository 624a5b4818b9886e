"""The optimisation loop, and the ARM loss in it."""

import pytest
import torch

from actors.training.derive import add_adapter
from actors.training.fit import fit
from actors.training.objective import arm_loss, collate, response_log_probs, response_logits
from tests.tiny import llama

# peft reads a property that transformers has renamed; nothing we can say differently.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_the_arm_loss_teaches_a_model_to_prefer_the_chosen() -> None:
    guide = add_adapter(llama(), rank=4, seed=0)
    frozen = {name: value.clone() for name, value in guide.named_parameters() if not value.requires_grad}
    batch = collate([[5, 6, 7]] * 2, [[1, 2, 3], [4, 5, 6]])

    def loss(_: int) -> torch.Tensor:
        chosen_B, rejected_B = response_log_probs(response_logits(guide, batch), batch.targets_BT).chunk(2)
        return arm_loss(chosen_B, rejected_B, beta=0.1)

    losses = []
    fit(guide, range(100), loss, num_steps=30, learning_rate=1e-2, report=lambda _, value: losses.append(value))
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, dict(guide.named_parameters())[name]) for name, value in frozen.items())
    assert not guide.training
