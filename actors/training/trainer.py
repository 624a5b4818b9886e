"""transformers' trainer with the objectives of guides: what a batch is, what its loss is, what is written down.

The loop itself (workers, accumulation, clipping, schedule, checkpoints, resuming) is transformers' and accelerate's.

Shapes: B pairs or texts, L positions of prompt and response, T positions of the response, V vocabulary.
"""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from transformers import Trainer, TrainerCallback, TrainingArguments

from actors.training.base_law import BaseLaw
from actors.training.encoding import EncodedPair, EncodedText
from actors.training.objective import (
    Batch,
    arm_loss,
    collate,
    distillation_loss,
    dpo_loss,
    response_log_probs,
    response_logits,
    token_weights,
)

Example = EncodedPair | EncodedText
FIGURES = ("accuracy", "divergence", "loss", "margin")
"""What objectives on pairs measure; `divergence` under a base alone."""

Figures = dict[str, Tensor]
"""Means over a batch, by name."""


class Objective(Protocol):
    """What training minimises."""

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Figures]:
        """Return the loss of a batch and what to write down of it."""
        ...


class ArmObjective:
    """GenARM's objective on pairs: see `arm_loss`."""

    def __init__(self, *, beta: float, margin: float = 0.0, length_normalised: bool = False) -> None:
        self._beta = beta
        self._margin = margin
        self._length_normalised = length_normalised

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Figures]:
        """Return the loss, the share of pairs ranked rightly, and the mean difference of log-probabilities."""
        log_probs = response_log_probs(response_logits(model, batch), batch.targets_BT)
        if self._length_normalised:
            log_probs = log_probs / batch.num_targets_B
        chosen_B, rejected_B = log_probs.chunk(2)
        loss = arm_loss(chosen_B, rejected_B, beta=self._beta, margin=self._margin)
        return loss, _pair_figures(chosen_B - rejected_B)


class DpoObjective:
    """DPO on pairs, against the model as it was before training: see `dpo_loss`."""

    def __init__(self, *, beta: float, reference: Any) -> None:
        """Take the reference: a frozen model, or none where the trained model is itself under a LoRA adapter."""
        self._beta = beta
        self._reference = reference

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Figures]:
        """Return the loss, the share of pairs ranked rightly by the reward log p/p_ref, and its mean difference."""
        chosen_B, rejected_B = response_log_probs(response_logits(model, batch), batch.targets_BT).chunk(2)
        with torch.no_grad(), self._as_reference(model) as reference:
            before = response_log_probs(response_logits(reference, batch), batch.targets_BT).chunk(2)
        loss = dpo_loss(chosen_B, rejected_B, (before[0], before[1]), beta=self._beta)
        return loss, _pair_figures(chosen_B - before[0] - rejected_B + before[1])

    @contextlib.contextmanager
    def _as_reference(self, model: Any) -> Any:
        if self._reference is not None:
            yield self._reference
            return
        adapted = getattr(model, "module", model)
        with adapted.disable_adapter():
            yield adapted


class GuidedObjective:
    """DPO on pairs with the base and the guide together as what is trained, against the base alone; the base is frozen.

    The guided law is p(y) ∝ p_base(y) p_guide(y)^w at w = 1, token by token, and DPO's reference is the base itself.
    The optimum is p_base exp(r / beta), what GenARM aims at (arXiv 2410.08193), so the guide is made for weight 1, and
    beta bounds how far it moves the base as it does in DPO (arXiv 2305.18290). With few pairs that loss makes chosen
    responses less likely too, as long as rejected ones lose more: what it takes from both goes to other texts. KL, over
    the whole vocabulary at every token, keeps that in bounds.
    """

    def __init__(self, *, beta: float, kl: float, base: BaseLaw) -> None:
        """Take DPO's beta, and what a nat of KL(guided || base) a token costs beside it."""
        self._beta = beta
        self._kl = kl
        self._base = base

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Figures]:
        """Return the loss, the share of pairs ranked rightly by log p/p_base, its mean difference, and KL a token."""
        compared = self._base.compare(model, batch)
        chosen_B, rejected_B = (compared.guided_B - compared.before_B).chunk(2)
        # Of each pair, so that a step's mean is the same however it is shared out.
        nats_2B, num_tokens_2B = (values_B.view(2, -1) for values_B in (compared.divergence_B, batch.num_targets_B))
        divergence = (nats_2B.sum(0) / num_tokens_2B.sum(0)).mean()
        loss = arm_loss(chosen_B, rejected_B, beta=self._beta) + self._kl * divergence
        return loss, {**_pair_figures(chosen_B - rejected_B), "divergence": divergence.detach()}


class DistillationObjective:
    """KL from a teacher over the whole vocabulary, on the responses' tokens: see `distillation_loss`."""

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Figures]:
        """Return the divergence in nats a token."""
        with torch.no_grad():
            teacher_BTV = response_logits(self._teacher, batch)
        return distillation_loss(response_logits(model, batch), teacher_BTV, batch.targets_BT, batch.weights_B), {}


def _pair_figures(difference_B: Tensor) -> Figures:
    difference_B = difference_B.detach()
    return {"accuracy": (difference_B > 0).float().mean(), "margin": difference_B.mean()}


@dataclass(frozen=True, slots=True)
class WeighedText:
    """A text with its weight in the mean over the tokens of a step."""

    text: EncodedText
    weight: float


def weigh(examples: Sequence[Example], batch_size: int) -> list[EncodedPair | WeighedText]:
    """Give every text the weight of its tokens in its step's mean, `batch_size` examples a step.

    A step's loss is then the same however it is shared out into micro-batches of one size: a mean of their own means
    would count the tokens of short responses for more.
    """
    weighed: list[EncodedPair | WeighedText] = []
    for start in range(0, len(examples), batch_size):
        step = examples[start : start + batch_size]
        weights = token_weights([len(text.response) for text in step if isinstance(text, EncodedText)] or [1])
        weighed += [WeighedText(each, weights[0]) if isinstance(each, EncodedText) else each for each in step]
    return weighed


def collate_examples(examples: Sequence[Example | WeighedText]) -> dict[str, Tensor]:
    """Return the tensors of a `Batch`; of pairs, first all chosen responses and then all rejected ones, [2 B].

    Texts without a weight are a whole step.
    """
    prompts, responses, weights = [], [], []
    for side in ("chosen", "rejected"):
        pairs = [example for example in examples if isinstance(example, EncodedPair)]
        prompts += [pair.prompt for pair in pairs]
        responses += [getattr(pair, side) for pair in pairs]
    for example in examples:
        if isinstance(example, WeighedText):
            weights.append(example.weight)
        text = example.text if isinstance(example, WeighedText) else example
        if isinstance(text, EncodedText):
            prompts.append(text.prompt)
            responses.append(text.response)
    batch = collate(prompts, responses, weights)
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


class GuideTrainer(Trainer):
    """A `transformers.Trainer` over an `Objective`, on examples in the very order in which they are given."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        arguments: TrainingArguments,
        examples: Sequence[Example],
        validation: Sequence[EncodedPair] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=weigh(
                examples,
                arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
            ),
            eval_dataset=validation or None,
            data_collator=collate_examples,
        )
        # The loss is a mean over the rows of each micro-batch: accumulated ones are to be averaged.
        self.model_accepts_loss_kwargs = False
        self._objective = objective
        self._sums: dict[str, float] = defaultdict(float)
        self._num_summed = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the objective on one micro-batch, and note its figures for the next log."""
        loss, figures = self._objective.loss(model, Batch(**inputs))
        self._num_summed += 1
        for name, value in figures.items():
            self._sums[name] += value.item()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write down the figures, averaged over workers and micro-batches, beside the loss."""
        if "loss" in logs and self._num_summed:
            names = sorted(self._sums)
            means = torch.tensor([self._sums[name] / self._num_summed for name in names], device=self.args.device)
            if names:
                means = self.accelerator.reduce(means, "mean")
            logs.update(zip(names, means.tolist(), strict=True))
        self._sums.clear()
        self._num_summed = 0
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the kept-back pairs, write that down, and tell the callbacks that stop and that keep the best."""
        figures = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(self.eval_dataset).items()}
        self.log(figures)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    @torch.no_grad()
    def measure(self, examples: Sequence[EncodedPair]) -> dict[str, float]:
        """Return loss, accuracy and margin on pairs that were not trained on, shared out over the workers."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        sums: dict[str, float] = defaultdict(float)
        mine = examples[self.args.process_index :: self.args.world_size]
        size = self.args.per_device_train_batch_size
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            inputs = self._prepare_inputs(collate_examples(batch))
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                loss, figures = self._objective.loss(model, Batch(**inputs))
            for name, value in {"loss": loss, **figures}.items():
                sums[name] += value.item() * len(batch)
        # All workers add up the same names, also one that had no example.
        totals = torch.tensor(
            [[sums.get(name, 0.0), name in sums] for name in FIGURES], dtype=torch.float64, device=self.args.device
        )
        totals = self.accelerator.reduce(totals, "sum")
        return {
            name: total / len(examples)
            for name, (total, num_workers) in zip(FIGURES, totals.tolist(), strict=True)
            if num_workers
        }


class LogFile(TrainerCallback):
    """Writes every log as a line of JSON, from worker 0; a resumed run's file begins with the logs before it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what the checkpoint remembers; nothing, in a new run."""
        if state.is_world_process_zero:
            self._path.write_text("".join(json.dumps(line) + "\n" for line in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the newest log."""
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint when the last one is older than `period_s`; worker 0's clock decides for all."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        is_due = torch.tensor(time.monotonic() - self._saved_at > self._period_s, device=args.device)
        if distributed.is_initialized():
            distributed.broadcast(is_due, 0)
        control.should_save |= bool(is_due)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self._saved_at = time.monotonic()
