"""What `trimtab train` and `trimtab derive` share: the workers on Ray, the output folder, the progress that people see.

Every worker runs `actors.training.run.train`; the output folder must be one that all of them see.
"""

import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import ray
import torch
from ray.exceptions import OutOfMemoryError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from actors.settings import locate_model
from actors.training.card import write_card
from actors.training.data import Pairs, Texts
from actors.training.derive import adapter_reach
from actors.training.encoding import EncodedPair, Report, ResponseEncoder, TokenLimits, arrange
from actors.training.run import CHECKPOINTS, LOG, RESULT, SETTINGS, RunSettings, describe, newest_checkpoint, train
from actors.training.trainer import Example
from actors.vocabularies import end_tokens, load_tokenizer, max_positions
from cluster.errors import InvalidConfiguration
from deploy.jobs.outcome import BadOutcome
from deploy.jobs.training.options import RunOptions

LOW_REACH = 0.5
"""An adapter on less of the layers' weights than this is warned of."""

REPORT_PERIOD_S = 10.0
POLL_S = 0.5
FIGURES = ("loss", "accuracy", "margin", "divergence")
"""That the progress shows, of those that a step has."""
RAY = "ray"
"""Ray Train's own folder, below the output; gone after a run that came to its end."""

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
"""glibc keeps what large tensors leave behind: fresh pages for each of them took a third of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """How many processes train together, and what Ray sets aside for each."""

    count: int = 1
    cpus: float | None = None
    """An equal share of the cluster's if none is given."""

    gpus: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run and what it is of."""

    settings: RunSettings
    examples: Sequence[Example]
    validation: Sequence[EncodedPair]
    data: Sequence[str]
    """What the examples are, for the model card."""

    digest: str
    """Of the data: a run is resumed on the same."""


class TrainingFailed(BadOutcome):
    """A worker died or raised; the checkpoints are there to go on from."""


class UselessGuide(BadOutcome):
    """Training came to its end, and what came of it should not be served."""


def locate(model: str, option: str = "--model") -> str:
    """Return what workers in other working folders can load: an absolute path, or a hub id as it is.

    Raises:
        InvalidConfiguration: a path where there is no model.
    """
    path = Path(model).expanduser()
    try:
        return locate_model(str(path.resolve()) if path.exists() else model)
    except ValueError as error:
        raise InvalidConfiguration(f"{option}: {error}") from error


def count_layers(model: str) -> int:
    """Return how many layers a model has.

    Raises:
        InvalidConfiguration: its configuration cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise InvalidConfiguration(f"--model: {model!r} cannot be loaded: {error}") from error
    return int(config.num_hidden_layers)


def response_encoder(model: str, options: RunOptions, *, base: str | None = None) -> ResponseEncoder:
    """Return the encoder of a model's tokens, for one that answers as its base does, under the limits that were given.

    Raises:
        InvalidConfiguration: the model has no tokenizer that can be used.
    """
    try:
        tokenizer = load_tokenizer(model)
        # A guide's answers end where its base's do, and both see every example.
        ends = end_tokens(base or model, tokenizer)
        positions = [limit for each in (model, base or model) if (limit := max_positions(each)) is not None]
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"--model: {error}") from error
    except (OSError, ValueError) as error:
        raise InvalidConfiguration(f"--model: {model!r} cannot be loaded: {error}") from error
    limits = TokenLimits(
        max_prompt=options.max_prompt_tokens,
        max_response=options.max_response_tokens,
        max_positions=min(positions, default=None),
    )
    return ResponseEncoder(tokenizer, limits, ends, skip_bad_rows=options.skip_bad_rows)


def describe_data(source: Pairs | Texts, report: Report) -> list[str]:
    """Return what the examples are, one fact an item."""
    return [
        f"{Path(source.source).name} (SHA-256 {source.digest[:16]}…), {source.num_rows} rows",
        *(f"{count} rows skipped: {reason}" for reason, count in sorted(source.skipped.items())),
        *report.lines(),
    ]


def adapter_rank(options: RunOptions, default: int, lora_alpha: float | None = None) -> int:
    """Return the rank of the adapter to train, 0 where all weights are.

    Raises:
        InvalidConfiguration: it is below 1, or belongs to an adapter and all weights are trained.
    """
    if options.full:
        for name, value in (("--lora-rank", options.lora_rank), ("--lora-alpha", lora_alpha)):
            if value is not None:
                raise InvalidConfiguration(f"{name}: --full trains no adapter; leave one of them out")
        return 0
    rank = default if options.lora_rank is None else options.lora_rank
    if rank < 1:
        raise InvalidConfiguration(f"--lora-rank: {rank} is less than 1; --full trains all weights")
    return rank


def describe_adapter(settings: RunSettings) -> list[str]:
    """Return what the run's adapter is, one fact an item; nothing where none is trained. Loads no weights."""
    if not settings.lora_rank:
        return []
    config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    with torch.device("meta"):
        reach = adapter_reach(AutoModelForCausalLM.from_config(config))
    facts = [f"the adapter, of rank {settings.lora_rank}, reaches {reach:.0%} of the weights of the layers"]
    if reach < LOW_REACH:
        facts.append(
            f"WARNING: an adapter cannot reach the other {1 - reach:.0%}, experts that the model holds as one "
            "parameter; --full trains all weights"
        )
    return facts


def choose_dtype(choice: str, *, on_gpu: bool) -> str:
    """Return the type of the products: for `auto` bfloat16 on GPUs and on processors with instructions for it."""
    if choice != "auto":
        return choice
    has_instructions = any(
        torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )
    return "bfloat16" if on_gpu or has_instructions else "float32"


def shared_settings(
    model: str, options: RunOptions, num_examples: int, *, default_rate: float, min_steps: int = 1
) -> dict[str, Any]:
    """Return what `RunSettings` of every kind of training take from the options.

    Raises:
        InvalidConfiguration: the learning rate cannot be.
    """
    rate = default_rate if options.learning_rate is None else options.learning_rate
    if rate <= 0:
        raise InvalidConfiguration(f"--learning-rate: {rate} is not above 0")
    return {
        "model": model,
        "learning_rate": rate,
        "batch_size": options.batch_size,
        "micro_batch": options.micro_batch,
        "num_steps": num_steps(options, num_examples, min_steps),
        "seed": options.seed,
        "dtype": choose_dtype(options.dtype, on_gpu=bool(options.gpus_per_worker)),
        "device": "cuda" if options.gpus_per_worker else "cpu",
        "checkpoint_every": options.checkpoint_every,
    }


def num_steps(options: RunOptions, num_examples: int, min_steps: int = 1) -> int:
    """Return the run's length: `--steps`, or what `--epochs` take; by default one epoch, and `min_steps` or more."""
    if options.steps is not None:
        return options.steps
    if options.epochs is None:
        return max(min_steps, round(num_examples / options.batch_size))
    return max(1, round(options.epochs * num_examples / options.batch_size))


def run(job: Job, options: RunOptions) -> dict[str, float]:
    """Train on the cluster, and return the figures on validation pairs (empty if there were none).

    Raises:
        InvalidConfiguration: the run cannot start; the output folder is as it was.
        TrainingFailed: a worker died or raised.
    """
    print("\n".join(job.data), file=sys.stderr)
    output = options.output.resolve()
    workers = Workers(count=options.workers, cpus=options.cpus_per_worker, gpus=options.gpus_per_worker)
    lengths = [example.length for example in job.examples]
    # What would stop every worker stops here, before any model is loaded.
    job.settings.micro_batch_for(workers.count)
    arrange(lengths, batch_size=job.settings.batch_size, num_steps=1, seed=0)
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    cpus = workers.cpus or max(1, ray.cluster_resources().get("CPU", 1) // workers.count)
    check_room({"CPU": cpus * workers.count, "GPU": workers.gpus * workers.count})
    num_done = prepare_output(job, output, resume=options.resume)
    with progress(output / LOG, total=job.settings.num_steps, num_done=num_done, file=sys.stderr):
        _fit(job, output, replace(workers, cpus=cpus))
    validation: dict[str, float] = json.loads((output / RESULT).read_text())["validation"]
    log = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    write_card(output / "README.md", settings=describe(job.settings), data=job.data, log=log, validation=validation)
    return validation


def _fit(job: Job, output: Path, workers: Workers) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "settings": job.settings,
            "examples": ray.put([job.examples, job.validation]),
            "output": str(output),
        },
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
        ),
        run_config=RunConfig(name="run", storage_path=str(output / RAY), worker_runtime_env={"env_vars": ALLOCATOR}),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise TrainingFailed(
            f"{_reason(error)}\nLogs are in {output / RAY}, checkpoints in {output / CHECKPOINTS}: "
            "the same command with --resume goes on."
        ) from error
    shutil.rmtree(output / RAY)


def check_room(wanted: Mapping[str, float]) -> None:
    """Say so if the workers must wait for others on the cluster.

    Raises:
        InvalidConfiguration: the cluster is too small for them.
    """
    all_there, free = ray.cluster_resources(), ray.available_resources()
    for name, amount in wanted.items():
        if amount > all_there.get(name, 0):
            raise InvalidConfiguration(
                f"the workers want {amount:g} {name}s and the cluster has {all_there.get(name, 0):g}; "
                f"lower --workers or --{name.lower()}s-per-worker"
            )
        if amount > free.get(name, 0):
            print(
                f"waiting: the workers want {amount:g} {name}s, of which {free.get(name, 0):g} are free (is a service "
                "running there? RAY_ADDRESS=local before the command starts a cluster of its own)",
                file=sys.stderr,
                flush=True,
            )


def _reason(error: Exception) -> str:
    """What the first worker that failed raised, without the way there."""
    failures = list(getattr(error, "worker_failures", {}).values())
    first = failures[0] if failures else error
    text = str(first).strip()
    if isinstance(first, OutOfMemoryError) or "OutOfMemoryError" in text:
        # Whole: it has the node's figures, and what used how much.
        return f"the workers ran out of memory; lower --micro-batch or --max-response-tokens. Ray says: {text}"
    return text.splitlines()[-1]


def _work(config: dict[str, Any]) -> None:
    examples, validation = ray.get(config["examples"])
    train(config["settings"], examples, validation, Path(config["output"]))


def prepare_output(job: Job, output: Path, *, resume: bool) -> int:
    """Make the folder ready and return the number of steps done before.

    Raises:
        InvalidConfiguration: it holds another run, or one that is not to be overwritten.
    """
    described = describe(job.settings) | {"data": job.digest}
    settings_file = output / SETTINGS
    if not settings_file.exists():
        if output.is_dir() and any(output.iterdir()):
            raise InvalidConfiguration(f"--output: {output} is not empty; choose a new folder")
        output.mkdir(parents=True, exist_ok=True)
        settings_file.write_text(json.dumps(described, indent=2) + "\n")
        return 0
    if not resume:
        raise InvalidConfiguration(f"--output: {output} holds a run; --resume goes on with it, or choose a new folder")
    before = json.loads(settings_file.read_text())
    changed = [name for name in described if described[name] != before.get(name)]
    if changed:
        name = changed[0]
        raise InvalidConfiguration(
            f"--resume: {name} was {before.get(name)!r} and is {described[name]!r} now; "
            "give the same settings and data, or a new --output"
        )
    checkpoint = newest_checkpoint(output)
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


@contextmanager
def progress(log: Path, *, total: int, num_done: int, file: IO[str]) -> Iterator[None]:
    """Show the steps that a worker writes into `log`: a bar on a terminal, elsewhere a line now and then."""
    is_over = threading.Event()
    log.unlink(missing_ok=True)
    thread = threading.Thread(target=_follow, args=(log, total, num_done, file, is_over))
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _follow(log: Path, total: int, num_done: int, file: IO[str], is_over: threading.Event) -> None:
    interval_s = 0.5 if file.isatty() else REPORT_PERIOD_S
    with tqdm(total=total, initial=num_done, unit="step", file=file, mininterval=interval_s, dynamic_ncols=True) as bar:
        position = 0
        while True:
            was_over = is_over.wait(POLL_S)
            lines = _read_lines(log, position)
            position += sum(map(len, lines))
            newest = next((step for step in map(json.loads, reversed(lines)) if "loss" in step), None)
            if newest is not None:
                bar.set_postfix_str(_figures(newest), refresh=False)
                bar.update(newest["step"] - bar.n)
            if was_over:
                return


def _read_lines(log: Path, position: int) -> list[bytes]:
    """The whole lines from there on; a last one that is being written stays for the next look."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(position)
        return [line for line in file if line.endswith(b"\n")]


def _figures(step: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {step[name]:.3f}" for name in ("loss", "accuracy", "margin", "divergence") if name in step
    )
