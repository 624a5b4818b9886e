"""Training a guide under its base: the law of both together, by either way of computing it, and what is left of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.training.base_law import BaseLaw, shared_output
from actors.training.derive import (
    add_adapter,
    cut_layers,
    freeze_all_but_map,
    merge_adapter,
    save_adapter,
    save_map,
    silence_output,
)
from actors.training.encoding import EncodedPair
from actors.training.objective import Batch
from actors.training.trainer import GuidedObjective, collate_examples
from tests.tiny import gemma2, llama

# peft reads a property that transformers has renamed; nothing we can say differently.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PAIRS = [
    EncodedPair([5, 6, 7, 8], [1, 2], [3, 4, 5, 6]),
    EncodedPair([9], [10, 11, 12], [13]),
    EncodedPair([14, 15], [16], [17, 18]),
]
BETA = 0.3
KL = 0.7


def batch() -> Batch:
    return Batch(**collate_examples(PAIRS))


def log_prob(models: list[Any], prompt: list[int], response: list[int]) -> float:
    """Of the response under the product of the models, from their logits for this sequence alone."""
    with torch.inference_mode():
        logits = sum(model(torch.tensor([prompt + response])).logits[0].double() for model in models)
    law = logits.log_softmax(-1)
    return float(sum(law[len(prompt) - 1 + i, token] for i, token in enumerate(response)))


def guide_of(base: Any, *, scale: float) -> Any:
    """A cut of the base under an adapter, whose map and adapter are no longer zero, if `scale` is not."""
    guide = silence_output(cut_layers(base, [0]), 4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        guide.get_output_embeddings().map.up.normal_(std=scale, generator=generator)
    return guide


def adapted(guide: Any, *, scale: float) -> Any:
    model = add_adapter(guide, rank=4, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale, generator=generator)
    return model


def expected_loss(base: Any, guide: Any) -> float:
    losses = []
    for pair in PAIRS:
        chosen, rejected = (
            log_prob([base, guide], pair.prompt, side) - log_prob([base], pair.prompt, side)
            for side in (pair.chosen, pair.rejected)
        )
        losses.append(math.log1p(math.exp(-BETA * (chosen - rejected))))
    return sum(losses) / len(losses) + KL * divergence(base, guide)


def divergence(base: Any, guide: Any) -> float:
    """KL(both || base) a token of each pair, the mean over pairs, from logits for each sequence alone."""
    by_pair = []
    for pair in PAIRS:
        nats: list[float] = []
        for response in (pair.chosen, pair.rejected):
            tokens = torch.tensor([pair.prompt + response])
            with torch.inference_mode():
                own, steer = (model(tokens).logits[0].double() for model in (base, guide))
            rows = slice(len(pair.prompt) - 1, -1)
            law, before = (own + steer)[rows].log_softmax(-1), own[rows].log_softmax(-1)
            nats += (law.exp() * (law - before)).sum(-1).tolist()
        by_pair.append(sum(nats) / len(nats))
    return sum(by_pair) / len(by_pair)


def test_a_new_guide_is_no_guide_at_all() -> None:
    base = llama()
    guide = silence_output(cut_layers(base, [0]), 4)
    assert (guide(torch.tensor([[5, 6, 7]])).logits == 0).all()
    loss, figures = GuidedObjective(beta=BETA, kl=KL, base=BaseLaw(llama(), guide)).loss(
        adapted(guide, scale=0), batch()
    )
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert figures["margin"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", [llama, gemma2])
def test_the_loss_is_dpos_on_the_product_of_base_and_guide(kind: Any) -> None:
    """Llama shares the output layer; Gemma 2 caps its logits, so that nothing can be shared."""
    guide = guide_of(kind(), scale=0.3)
    law = BaseLaw(kind(), guide)
    objective, model = GuidedObjective(beta=BETA, kl=KL, base=law), adapted(guide, scale=0.2)
    first, _ = objective.loss(model, batch())
    again, figures = objective.loss(model, batch())
    guide.get_output_embeddings().ends_in_hidden = False
    wanted = expected_loss(kind(), model)
    assert first.item() == pytest.approx(wanted, abs=1e-5)
    assert again.item() == pytest.approx(wanted, abs=1e-5), "what is kept of the base is what was computed"
    assert figures["divergence"].item() == pytest.approx(divergence(kind(), model), abs=1e-5)
    assert figures["accuracy"].item() in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


def test_the_shared_way_has_the_gradients_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for is_shared in (True, False):
        if not is_shared:
            monkeypatch.setattr("actors.training.base_law.shared_output", lambda base, guide: None)
        guide = guide_of(llama(), scale=0.3)
        law = BaseLaw(llama(), guide)
        model = adapted(guide, scale=0.2)
        loss, _ = GuidedObjective(beta=BETA, kl=KL, base=law).loss(model, batch())
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    shared, plain = gradients
    assert any("map" in name for name in shared)
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-6)


def test_what_is_shared_is_the_same_layer_and_nothing_after_it() -> None:
    for kind, is_shared in ((llama, True), (gemma2, False)):
        guide = silence_output(cut_layers(kind(), [0]), 4)
        assert (shared_output(kind(), guide) is not None) == is_shared
    assert shared_output(llama(seed=1), silence_output(cut_layers(llama(seed=2), [0]), 4)) is None


def test_a_saved_guide_is_a_plain_model_with_the_logits_of_the_trained_one(tmp_path: Path) -> None:
    guide = guide_of(llama(), scale=0.3)
    model = adapted(guide, scale=0.2)
    tokens = torch.tensor([[5, 6, 7, 8]])
    save_adapter(model, tmp_path / "adapter")
    plain = merge_adapter(cut_layers(llama(), [0]), tmp_path / "adapter")
    plain.save_pretrained(tmp_path / "guide")
    loaded = type(plain).from_pretrained(tmp_path / "guide")
    with torch.inference_mode():
        # The adapter is rounded to bfloat16.
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0.05, atol=0.05)
        torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=0, atol=0)


def test_a_map_alone_is_trained_saved_and_put_back(tmp_path: Path) -> None:
    guide = freeze_all_but_map(guide_of(llama(), scale=0.3))
    assert {name for name, value in guide.named_parameters() if value.requires_grad} == {
        "lm_head.map.down",
        "lm_head.map.up",
    }
    tokens = torch.tensor([[5, 6, 7, 8]])
    save_map(guide, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "map.safetensors").stat().st_size < 10_000
    plain = merge_adapter(cut_layers(llama(), [0]), tmp_path / "adapter")
    with torch.inference_mode():
        # The map is rounded to bfloat16.
        torch.testing.assert_close(plain(tokens).logits, guide(tokens).logits, rtol=0.05, atol=0.05)
