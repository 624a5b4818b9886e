"""Makes the shipped guide, `positivity`, from the base model alone: `python -m deploy.make_positivity`.

Three stages, each kept in the output folder and skipped when it is there already:

    answers.jsonl    several answers of the base per training prompt, scored by VADER's compound sentiment
    distilled/       LoRA adapter of the cut base after distillation from the whole base on these answers
    adapter/         the same adapter after the ARM loss on pairs of answers: what is shipped

The held-out prompts are never read here.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from actors.training.derive import add_adapter, cut_layers, save_adapter
from actors.training.fit import fit
from actors.training.objective import (
    arm_loss,
    collate,
    distillation_loss,
    response_log_probs,
    response_logits,
)
from actors.training.preferences import pair_answers, sample_answers
from deploy.models import CHECKOUT, LAYERS

TRAIN_PROMPTS = CHECKOUT / "deploy" / "positivity" / "train_prompts.jsonl"
BASE = CHECKOUT / "models" / "smollm2-135m-instruct"

SEED = 2
RANK = 32

NUM_SAMPLES = 6
NUM_ROUNDS = 2
"""Times that every prompt is given its samples; a prompt's samples of one round are compared with each other."""

ANSWER_TOKENS = 48
PROMPTS_PER_BATCH = 20

DISTILLATION_BATCH = 32
DISTILLATION_STEPS = 260
DISTILLATION_RATE = 1.5e-3

MARGIN = 0.4
"""Smallest difference of compound scores, which lie between -1 and 1, that makes a pair."""

BETA = 0.05
"""Small, so that the reward grows large: `deploy.models` makes the merged guide's logits flatter by a half."""

ARM_BATCH = 6
"""Prompts, each with its samples of one round."""

ARM_STEPS = 120
ARM_RATE = 5e-4
FLUENCY = 0.05
"""Weight of the distillation loss on the pairs' texts beside the ARM loss: keeps the guide a language model."""

Item = TypeVar("Item")

Text = tuple[list[int], list[int]]
"""A prompt and a response, as tokens."""


class Recipe:
    """The base with its tokenizer, and the folder in which the stages leave their results."""

    def __init__(self, base: Path, output: Path) -> None:
        self.output = output
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        # bfloat16 is four times as fast as float32 on CPUs that have it, and eager attention is what is fast there.
        self.base: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
        self.analyzer = SentimentIntensityAnalyzer()
        self.end_token: int = self.tokenizer.eos_token_id

    def write_answers(self) -> None:
        """Sample and score answers to the training prompts; a stopped run goes on after its last batch."""
        partial = self.output / "answers.partial"
        num_done = len(_read(partial)) if partial.exists() else 0
        prompts = sorted((self.prompt_tokens(line["messages"]) for line in _read(TRAIN_PROMPTS)), key=len) * NUM_ROUNDS
        for start in range(num_done, len(prompts), PROMPTS_PER_BATCH):
            self.answer(prompts[start : start + PROMPTS_PER_BATCH], start, partial)
            print(f"answered {min(start + PROMPTS_PER_BATCH, len(prompts))} of {len(prompts)} prompts", flush=True)
        partial.rename(self.output / "answers.jsonl")

    def answer(self, prompts: list[list[int]], start: int, path: Path) -> None:
        """Append the answers to one batch of prompts, whose first is number `start` of all."""
        answers = sample_answers(
            self.base,
            prompts,
            num_samples=NUM_SAMPLES,
            max_tokens=ANSWER_TOKENS,
            end_token=self.end_token,
            generator=torch.Generator().manual_seed(SEED + start),
        )
        records = [
            {"prompt": prompt, "answers": drawn, "rewards": [self.reward(tokens) for tokens in drawn]}
            for prompt, drawn in zip(prompts, answers, strict=True)
        ]
        with path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def full_length_rewards(self, record: dict[str, Any]) -> list[float]:
        """The answers' rewards, NaN for those that ended early, which no comparison holds for.

        Summed log-probabilities of a short and a long answer differ by tens of nats for their length alone: such pairs
        would have the largest gradients and say nothing of the reward.
        """
        rewards = zip(record["answers"], record["rewards"], strict=True)
        return [reward if len(answer) == ANSWER_TOKENS else math.nan for answer, reward in rewards]

    def is_comparable(self, record: dict[str, Any]) -> bool:
        """Whether there is any pair among the answers."""
        better, _ = pair_answers(torch.tensor([self.full_length_rewards(record)]), margin=MARGIN)
        return len(better) > 0

    def reward(self, tokens: Sequence[int]) -> float:
        """VADER's compound sentiment of the text, between -1 and 1."""
        return self.analyzer.polarity_scores(self.tokenizer.decode(tokens, skip_special_tokens=True))["compound"]

    def prompt_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """The messages in the base's template, up to where its answer begins."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def distil(self) -> None:
        """Train a new adapter of the cut base to predict as the whole base does, on all texts written so far."""
        texts = [
            (record["prompt"], answer)
            for record in _read(self.output / "answers.jsonl")
            for answer in record["answers"]
        ]
        guide = add_adapter(cut_layers(self.base, LAYERS), rank=RANK, seed=SEED)

        def loss(batch: list[Text]) -> Tensor:
            logits_BTV, teacher_BTV, targets_BT = self._logits(guide, batch)
            return distillation_loss(logits_BTV, teacher_BTV, targets_BT)

        batches = _batches(texts, DISTILLATION_BATCH, lambda text: len(text[0]) + len(text[1]))
        fit(
            guide,
            batches,
            loss,
            num_steps=DISTILLATION_STEPS,
            learning_rate=DISTILLATION_RATE,
            report=_Progress("distillation", DISTILLATION_STEPS),
        )
        save_adapter(guide, self.output / "distilled")

    def train_arm(self) -> None:
        """Go on with the distilled adapter under the ARM loss, with the distillation loss beside it."""
        records = [record for record in _read(self.output / "answers.jsonl") if self.is_comparable(record)]
        guide = PeftModel.from_pretrained(
            cut_layers(self.base, LAYERS), str(self.output / "distilled"), is_trainable=True
        )

        def loss(batch: list[dict[str, Any]]) -> Tensor:
            texts = [(record["prompt"], answer) for record in batch for answer in record["answers"]]
            logits_BTV, teacher_BTV, targets_BT = self._logits(guide, texts)
            log_probs_B = response_log_probs(logits_BTV, targets_BT)
            rewards_PK = torch.tensor([self.full_length_rewards(record) for record in batch])
            better, worse = pair_answers(rewards_PK, margin=MARGIN)
            fluency = distillation_loss(logits_BTV, teacher_BTV, targets_BT)
            return arm_loss(log_probs_B[better], log_probs_B[worse], beta=BETA) + FLUENCY * fluency

        fit(
            guide,
            _batches(records, ARM_BATCH, lambda record: len(record["prompt"])),
            loss,
            num_steps=ARM_STEPS,
            learning_rate=ARM_RATE,
            report=_Progress("ARM", ARM_STEPS),
        )
        save_adapter(guide, self.output / "adapter")

    def _logits(self, guide: Any, texts: Sequence[Text]) -> tuple[Tensor, Tensor, Tensor]:
        """The guide's and the base's logits for the texts' responses, and the responses' tokens."""
        batch = collate([prompt for prompt, _ in texts], [response for _, response in texts])
        with torch.no_grad():
            teacher_BTV = response_logits(self.base, batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = response_logits(guide, batch)
        return logits_BTV, teacher_BTV, batch.targets_BT


class _Progress:
    """Prints the mean loss of every ten steps."""

    def __init__(self, stage: str, num_steps: int) -> None:
        self._stage = stage
        self._num_steps = num_steps
        self._started = time.monotonic()
        self._losses: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        if step % 10 == 0 or step == self._num_steps:
            mean = sum(self._losses) / len(self._losses)
            elapsed_s = time.monotonic() - self._started
            print(f"{self._stage} {step}/{self._num_steps}: loss {mean:.3f}, {elapsed_s:.0f} s", flush=True)
            self._losses.clear()


def _batches(items: Sequence[Item], size: int, length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Shuffled batches without end, each of items of about the same length."""
    rng = random.Random(SEED)
    while True:
        shuffled = rng.sample(items, len(items))
        batches = []
        for start in range(0, len(shuffled), 16 * size):
            block = sorted(shuffled[start : start + 16 * size], key=length)
            batches += [block[i : i + size] for i in range(0, len(block) - size + 1, size)]
        rng.shuffle(batches)
        yield from batches


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=BASE, help="directory of the base model")
    parser.add_argument("--output", type=Path, required=True, help="folder of the stages' results")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(arguments.base, arguments.output)
    for name, stage in (
        ("answers.jsonl", recipe.write_answers),
        ("distilled", recipe.distil),
        ("adapter", recipe.train_arm),
    ):
        if (arguments.output / name).exists():
            print(f"{name} is there already")
        else:
            stage()


if __name__ == "__main__":
    main()
