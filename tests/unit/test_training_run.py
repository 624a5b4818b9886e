"""A training run in one process: one loss curve, however a step is shared out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from torch import distributed

from actors.training.encoding import EncodedPair, EncodedText
from actors.training.run import LOG, RunSettings, train
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


@pytest.mark.parametrize(("objective", "lora_rank"), [("distillation", 0), ("distillation", 4), ("arm", 4), ("dpo", 4)])
def test_the_size_of_a_micro_batch_changes_nothing(model: str, tmp_path: Path, objective: Any, lora_rank: int) -> None:
    curves = {
        size: losses(
            RunSettings(
                model=model,
                objective=objective,
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
