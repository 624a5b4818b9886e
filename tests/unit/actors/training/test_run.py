"""A training run in one process: one loss curve, however a step is shared out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import distributed
from transformers import AutoModelForCausalLM

from actors.training.encoding import EncodedPair, EncodedText
from actors.training.run import LOG, RESULT, RunSettings, train
from actors.training.trainer import WeighedText, collate_examples, weigh
from tests.tiny import llama, save

# peft reads a property that transformers has renamed; nothing we can say differently.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LENGTHS = (1, 2, 9, 30, 1, 17, 4, 3)
TEXTS = [EncodedText([5 + i, 6], [7 + (i * j) % 60 for j in range(length)]) for i, length in enumerate(LENGTHS)]
PAIRS = [EncodedPair(text.prompt, text.response, [3, *text.response][: 1 + i]) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(llama(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of one, as a worker has."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def losses(settings: RunSettings, examples: Any, output: Path) -> list[float]:
    output.mkdir()
    train(settings, examples, [], output)
    lines = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("objective", "lora_rank"), [("distillation", 0), ("distillation", 4), ("arm", 4), ("dpo", 4), ("guided", 4)]
)
def test_the_size_of_a_micro_batch_changes_nothing(model: str, tmp_path: Path, objective: Any, lora_rank: int) -> None:
    curves = {
        size: losses(
            RunSettings(
                model=model,
                objective=objective,
                base=model if objective == "guided" else None,
                kl=0.5,
                layers=(0, 2) if objective == "distillation" else None,
                lora_rank=lora_rank,
                batch_size=4,
                micro_batch=size,
                num_steps=3,
                learning_rate=1e-3,
            ),
            TEXTS if objective == "distillation" else PAIRS,
            tmp_path / str(size),
        )
        for size in ((1, 2, 4) if objective == "distillation" else (1, 4))
    }
    assert len(curves[4]) == 3
    for curve in curves.values():
        assert curve == pytest.approx(curves[4], rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_tokens_of_a_step_count_alike(size: int) -> None:
    weighed = weigh(TEXTS, 4)
    for start in (0, 4):
        step = weighed[start : start + 4]
        num_tokens = sum(LENGTHS[start : start + 4])
        assert all(isinstance(text, WeighedText) and text.weight == 4 / num_tokens for text in step)
        for first in range(0, 4, size):
            batch = collate_examples(step[first : first + size])
            assert batch["weights_B"].tolist() == pytest.approx([4 / num_tokens] * min(size, 4))
    assert weigh(PAIRS, 4) == PAIRS


SIDES = [EncodedPair([5, 6, 7 + i % 9], [10] * (1 + i % 4), [11] * (1 + i % 3)) for i in range(40)]
"""Token 10 is preferred to token 11, whatever comes before."""


@pytest.mark.parametrize("how", [{"map_only": True, "lora_rank": 0}, {"lora_rank": 4}, {"lora_rank": 0}])
def test_a_guide_trained_under_its_base_is_a_plain_model_that_prefers_what_was_chosen(
    model: str, tmp_path: Path, how: dict[str, Any]
) -> None:
    """Of the map alone, with an adapter, and of all weights; the best state by the kept-back pairs is what is left."""
    output = tmp_path / "guide"
    output.mkdir()
    settings = RunSettings(
        model=model,
        base=model,
        layers=(0, 1),
        objective="guided",
        beta=0.5,
        kl=0.05,
        map_rank=4,
        batch_size=8,
        micro_batch=8,
        num_steps=20,
        eval_every=5,
        learning_rate=2e-2,
        **how,
    )
    train(settings, SIDES[:32], SIDES[32:], output)
    log = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    looks = [line["eval_loss"] for line in log if "eval_loss" in line]
    result = json.loads((output / RESULT).read_text())["validation"]
    assert len(looks) == 4
    assert result["loss"] == pytest.approx(min(looks), rel=1e-4)
    assert result["accuracy"] == 1
    guide: Any = AutoModelForCausalLM.from_pretrained(output)
    with torch.inference_mode():
        last = guide(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert last[10] > last[11] + 1
    assert not guide.config.tie_word_embeddings
    assert (output / "adapter").is_dir() == (how != {"lora_rank": 0})


def test_training_ends_when_unseen_pairs_are_ranked_worse(model: str, tmp_path: Path) -> None:
    """The kept-back pairs say the opposite: their loss rises from the first look on."""
    output = tmp_path / "guide"
    output.mkdir()
    settings = RunSettings(
        model=model,
        base=model,
        objective="guided",
        map_only=True,
        lora_rank=0,
        batch_size=8,
        num_steps=100,
        eval_every=2,
        patience=3,
        learning_rate=2e-2,
        beta=0.5,
    )
    opposite = [EncodedPair(pair.prompt, pair.rejected, pair.chosen) for pair in SIDES[32:]]
    train(settings, SIDES[:32], opposite, output)
    log = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    assert max(line["step"] for line in log if "loss" in line) == 8
