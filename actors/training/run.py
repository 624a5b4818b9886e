"""One training run, as each of its workers sees it: the model, its objective, checkpoints, and what is left at the end.

Runs alone or in the process group that whoever starts the workers has set up; knows nothing of Ray.
"""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.helpers import disable_input_dtype_casting
from transformers import AutoTokenizer, EarlyStoppingCallback, TrainingArguments, set_seed

from actors.engine.models.loading import load_whole
from actors.training.base_law import BaseLaw
from actors.training.derive import (
    ADAPTER,
    add_adapter,
    cut_layers,
    fold_output,
    freeze_all_but_map,
    merge_adapter,
    save_adapter,
    save_map,
    silence_output,
)
from actors.training.encoding import EncodedPair, arrange
from actors.training.trainer import (
    ArmObjective,
    DistillationObjective,
    DpoObjective,
    Example,
    GuidedObjective,
    GuideTrainer,
    LogFile,
    Objective,
    SaveEvery,
)
from cluster.errors import InvalidConfiguration

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
SETTINGS = "settings.json"
RESULT = "result.json"
CHECKPOINT_PERIOD_S = 120.0
"""Between checkpoints at most, whatever the number of steps between them: a slow run too finds one to go on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Everything that decides what comes out of a run, but for the examples."""

    model: str
    """Directory or hub id of what is trained; of the teacher, where `layers` are cut out of it."""

    layers: tuple[int, ...] | None = None
    """Train a cut of the model to these layers."""

    objective: Literal["arm", "guided", "dpo", "distillation"] = "arm"
    base: str | None = None
    """Directory or hub id of the base that a guide is trained under, with the objective `guided`."""

    beta: float = 0.05
    kl: float = 0.0
    """What a nat of KL(guided || base) a token costs, with the objective `guided`."""

    margin: float = 0.0
    length_normalised: bool = False
    lora_rank: int = 8
    """Of an adapter on all projections; 0 trains all weights."""

    lora_alpha: float = 16
    map_rank: int = 8
    """Of the matrix before the output layer, with the objective `guided`."""

    map_only: bool = False
    """Train that matrix alone; the model's layers stay as they are."""

    learning_rate: float = 5e-4
    warmup_share: float = 0.04
    """Of the steps; the rate then falls along a cosine."""

    batch_size: int = 32
    """Pairs or texts of a step, over all workers."""

    micro_batch: int = 32
    """Pairs or texts that a worker computes at once, at most."""

    num_steps: int = 100
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: products in bfloat16; what is trained stays float32."""

    device: Literal["cpu", "cuda"] = "cpu"
    checkpoint_every: int = 50
    """Steps between checkpoints; between looks at the kept-back pairs as well, if that is `eval_every` or more."""

    eval_every: int = 20
    """Steps between looks at the pairs that are kept back. The best of these states is what is left in the end."""

    patience: int = 3
    """Looks in a row without a lower loss that end the run."""

    @property
    def period(self) -> int:
        """Steps between looks, each of which is a checkpoint."""
        return min(self.eval_every, self.checkpoint_every)

    def micro_batch_for(self, num_workers: int) -> int:
        """Return how many examples a worker computes at once: the largest share of its part that fits.

        Raises:
            InvalidConfiguration: the batch cannot be shared out evenly.
        """
        share, rest = divmod(self.batch_size, num_workers)
        if rest or not share:
            raise InvalidConfiguration(
                f"--batch-size: {self.batch_size} cannot be shared evenly by {num_workers} workers; choose a multiple"
            )
        return max(size for size in range(1, min(share, self.micro_batch) + 1) if share % size == 0)


def train(settings: RunSettings, examples: Sequence[Example], validation: Sequence[EncodedPair], output: Path) -> None:
    """Train, or go on from the newest checkpoint under `output`, and leave a model directory there.

    Call it in every process of the process group, or in one alone. Worker 0 writes: `model.safetensors` with
    configuration and tokenizer, `adapter/` if one was trained, `log.jsonl`, `result.json`, `tensorboard/`.

    Raises:
        InvalidConfiguration: the examples are too few, or the model cannot be had.
    """
    num_workers = int(os.environ.get("WORLD_SIZE", "1"))
    order = arrange(
        [example.length for example in examples],
        batch_size=settings.batch_size,
        num_steps=settings.num_steps,
        seed=settings.seed,
    )
    set_seed(settings.seed)
    model, objective = build(settings)
    arguments = _arguments(settings, output, num_workers, has_validation=bool(validation))
    trainer = GuideTrainer(model, objective, arguments, [examples[index] for index in order], validation)
    trainer.add_callback(LogFile(output / LOG))
    trainer.add_callback(SaveEvery(CHECKPOINT_PERIOD_S))
    if validation:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=settings.patience))
    checkpoint = newest_checkpoint(output)
    # Under autocast the products are in bfloat16 anyway: peft need not make float32 copies of every input first.
    with disable_input_dtype_casting(model, active=settings.dtype == "bfloat16"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        measured = trainer.measure(validation) if validation else {}
    if trainer.is_world_process_zero():
        _save(trainer.accelerator.unwrap_model(trainer.model), settings, output)
        (output / RESULT).write_text(json.dumps({"validation": measured}, indent=2) + "\n")


def build(settings: RunSettings) -> tuple[Any, Objective]:
    """Load what is trained and whatever it is compared with, and return it with its objective."""
    # Products of frozen weights in bfloat16 need no copy of them for every pass; trained ones stay float32.
    is_frozen = settings.lora_rank > 0 or settings.map_only
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" and is_frozen else torch.float32
    # On processors torch's fused attention is slow backwards, and slow in bfloat16.
    attention = "eager" if settings.device == "cpu" else "sdpa"
    whole: Any = load_whole(settings.model, dtype=dtype, attn_implementation=attention).eval()
    model = whole if settings.layers is None else cut_layers(whole, settings.layers)
    if settings.objective == "guided":
        model = silence_output(model, settings.map_rank, settings.seed)
    objective = _objective(settings, whole, model)
    if settings.map_only:
        model = freeze_all_but_map(model)
    elif settings.lora_rank:
        model = add_adapter(model, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=settings.seed)
    return model, objective


def _objective(settings: RunSettings, whole: Any, model: Any) -> Objective:
    if settings.objective == "arm":
        return ArmObjective(beta=settings.beta, margin=settings.margin, length_normalised=settings.length_normalised)
    if settings.objective == "guided":
        return GuidedObjective(beta=settings.beta, kl=settings.kl, base=BaseLaw(_load_base(settings), model))
    if settings.objective == "dpo":
        reference = None if settings.lora_rank else copy.deepcopy(whole).requires_grad_(False)
        return DpoObjective(beta=settings.beta, reference=reference)
    if settings.layers is None:
        raise InvalidConfiguration("--layers: distillation is into a cut of the model; say which layers to keep")
    return DistillationObjective(whole.requires_grad_(False).to(settings.device))


def _load_base(settings: RunSettings) -> Any:
    """The base, frozen."""
    base: Any = load_whole(
        str(settings.base),
        dtype=torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32,
        attn_implementation="eager" if settings.device == "cpu" else "sdpa",
    )
    return base.to(settings.device)


def _arguments(settings: RunSettings, output: Path, num_workers: int, *, has_validation: bool) -> TrainingArguments:
    micro_batch = settings.micro_batch_for(num_workers)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")
    return TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        max_steps=settings.num_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.batch_size // (num_workers * micro_batch),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(settings.num_steps * settings.warmup_share)),
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=settings.period if has_validation else None,
        metric_for_best_model="eval_loss" if has_validation else None,
        greater_is_better=False if has_validation else None,
        load_best_model_at_end=has_validation,
        save_strategy="steps",
        save_steps=settings.period if has_validation else settings.checkpoint_every,
        save_total_limit=2,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        bf16=settings.dtype == "bfloat16",
        use_cpu=settings.device == "cpu",
        ddp_backend="gloo" if settings.device == "cpu" else "nccl",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=["tensorboard"],
        seed=settings.seed,
        log_level="error",
    )


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint that is whole; one whose writer was killed in the middle is passed over."""
    found = sorted(
        (output / CHECKPOINTS).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True
    )
    return next((path for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether its state, which is written last, can be read."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _save(trained: Any, settings: RunSettings, output: Path) -> None:
    """Leave the trained model as a plain directory; it has its configuration, which makes it a model, last."""
    if settings.map_only:
        save_map(trained, output / ADAPTER)
        trained = assemble(settings.model, settings.layers, output / ADAPTER)
    elif settings.lora_rank:
        save_adapter(trained, output / ADAPTER)
        trained = assemble(settings.model, settings.layers, output / ADAPTER)
    elif settings.objective == "guided":
        trained = fold_output(trained)
    partial = output / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    trained.save_pretrained(partial)
    AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False).save_pretrained(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(output / path.name)
    partial.rmdir()


def assemble(model: str, layers: Sequence[int] | None, adapter: Path) -> Any:
    """Return a model, or a cut of it, with an adapter merged into its weights: float32, whatever it was trained in."""
    whole: Any = load_whole(model, dtype=torch.float32)
    return merge_adapter(whole if layers is None else cut_layers(whole, layers), adapter)


def describe(settings: RunSettings) -> dict[str, Any]:
    """Return the settings as JSON has them."""
    return json.loads(json.dumps(asdict(settings)))
